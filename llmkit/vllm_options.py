"""vLLM's options that llmkit does not have: accepted where they ask for what llmkit does anyway, else refused with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmkit.errors import reject_unknown

_NO_ADAPTERS = "not available: merge the adapter into the model first"
_GENERATES = "llmkit generates text, and embeds it (LLM.embed)"
_POOLING = "say it in the call: embed(prompts, pooling=, normalize=)"
_TEXT_ONLY = "llmkit runs text models only"
_STRUCTURED = "drop it: structured output is always made by llguidance, and chosen with SamplingParams(structured_outputs=...)"
_ONE_DEVICE = "not available: this engine runs on one device, in the caller's process"
_LOGGED = "llmkit logs no requests; drop the option"
_NO_SPECULATION = "not available: there is no speculative decoding"

# name -> (values that ask for nothing, what to do instead of any other)
ENGINE: dict[str, tuple[tuple[Any, ...], str]] = {
    "additional_config": ((None, {}), "drop the option"),
    "allowed_local_media_path": (("", None), _TEXT_ONLY),
    "async_scheduling": ((None, False, True), "drop the option"),
    "calculate_kv_scales": ((False, None), "not available: kv_cache_dtype='fp8' rounds keys and values without scales"),
    "compilation_config": ((None,), "drop the option; enforce_eager=True switches graphs off"),
    "config_format": (("auto", "hf", None), "a model folder needs a Hugging Face config.json"),
    "convert": (("auto", "none", "embed", None), _GENERATES),
    "cpu_offload_gb": ((0, None), "not available; a smaller dtype or a quantised model needs less memory"),
    "data_parallel_size": ((1, None), "start one engine per GPU"),
    "disable_async_output_proc": ((True, False, None), "drop the option"),
    "disable_cascade_attn": ((True, False, None), "drop the option"),
    "disable_custom_all_reduce": ((True, False, None), "drop the option"),
    "disable_log_requests": ((True, False, None), _LOGGED),
    "disable_log_stats": ((True, False, None), "stats() has the numbers; drop the option"),
    "distributed_executor_backend": ((None, "uni", "mp"), _ONE_DEVICE),
    "enable_chunked_prefill": ((True, None), "chunked prefill is always on; long_prefill_token_threshold= caps the chunk"),
    "enable_expert_parallel": ((False, None), _ONE_DEVICE),
    "enable_lora": ((False, None), _NO_ADAPTERS),
    "enable_prompt_adapter": ((False, None), _NO_ADAPTERS),
    "enable_sleep_mode": ((False, None), "not available: close() gives all memory back"),
    "engine_use_ray": ((False, None), _ONE_DEVICE),
    "guided_decoding_backend": (("auto", "guidance", "llguidance", None), _STRUCTURED),
    "hf_config_path": ((None,), "give the model as a folder with its own config.json"),
    "hf_overrides": ((None, {}), "edit the model's config.json instead"),
    "hf_token": ((None, False, True), "log in once (`hf auth login`) or set HF_TOKEN in the environment"),
    "kv_cache_memory_bytes": ((None,), "use kv_cache_memory=, in GiB"),
    "limit_mm_per_prompt": ((None, {}), _TEXT_ONLY),
    "logits_processors": ((None, []), "use SamplingParams with logit_bias=, allowed_token_ids=, bad_words= or a grammar"),
    "max_context_len_to_capture": ((8192, None), "drop the option; enforce_eager=True switches graphs off"),
    "max_cpu_loras": ((None,), _NO_ADAPTERS),
    "max_lora_rank": ((16, None), _NO_ADAPTERS),
    "max_loras": ((1, None), _NO_ADAPTERS),
    "max_parallel_loading_workers": ((None,), "drop the option: one process loads the model"),
    "max_seq_len_to_capture": ((8192, None), "drop the option; enforce_eager=True switches graphs off"),
    "mm_processor_kwargs": ((None, {}), _TEXT_ONLY),
    "model_loader_extra_config": ((None, {}), "drop the option"),
    "num_scheduler_steps": ((1, None), "drop the option: every step is scheduled"),
    "num_speculative_tokens": ((None,), _NO_SPECULATION),
    "override_generation_config": ((None, {}), "give SamplingParams to the call instead"),
    "override_pooler_config": ((None,), _POOLING),
    "pipeline_parallel_size": ((1, None), _ONE_DEVICE),
    "pooler_config": ((None,), _POOLING),
    "preemption_mode": (("recompute", None), "preempted requests are recomputed, never swapped; drop the option"),
    "quantization_param_path": ((None,), "not available: kv_cache_dtype='fp8' rounds keys and values without scales"),
    "rope_scaling": ((None, {}), "write it into the model's config.json"),
    "rope_theta": ((None,), "write it into the model's config.json"),
    "runner": (("auto", "generate", "pooling", None), _GENERATES),
    "speculative_config": ((None,), _NO_SPECULATION),
    "speculative_model": ((None,), _NO_SPECULATION),
    "structured_outputs_config": ((None, {}), _STRUCTURED),
    "swap_space": ((0, 4, None), "preempted requests are recomputed, never swapped; drop the option"),
    "task": (("auto", "generate", "embed", "embedding", None), _GENERATES),
    "tokenizer_mode": (("auto", None), "the fast tokenizer is used whenever the model has one; drop the option"),
    "tokenizer_pool_size": ((0, None), "drop the option"),
    "tokenizer_revision": ((None,), "the tokenizer comes with the model: revision= covers both"),
    "use_v2_block_manager": ((True, False, None), "drop the option"),
    "worker_use_ray": ((False, None), _ONE_DEVICE),
}
# Flags of vLLM's server, by its options' names.
SERVER: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_media_domains": ((None, []), _TEXT_ONLY),
    "chat_template_text_format": (("string",), "drop it: the template's own form is found out"),
    "data_parallel_backend": (("mp",), _ONE_DEVICE),
    "data_parallel_rank": ((None,), _ONE_DEVICE),
    "disable_access_log_for_endpoints": ((None,), "drop it: requests are logged with --log-level info only"),
    "disable_fastapi_docs": ((False,), "use --no-enable-docs"),
    "disable_frontend_multiprocessing": ((False, True), "drop it: the engine always has a process of its own"),
    "disable_log_stats": ((True, False), "drop it: /metrics has the numbers"),
    "disable_uvicorn_access_log": ((True, False), "drop it: requests are logged with --log-level info only"),
    "enable_force_include_usage": ((False,), "ask for it in the request: stream_options={'include_usage': true}"),
    "enable_log_outputs": ((False,), _LOGGED),
    "enable_log_requests": ((False,), _LOGGED),
    "enable_prompt_tokens_details": ((True, False), "drop it: usage always has them"),
    "enable_request_id_headers": ((True, False), "drop it: every answer has X-Request-Id"),
    "enable_server_load_tracking": ((False,), "drop it: /metrics has the numbers"),
    "enable_ssl_refresh": ((False,), "restart the server when the certificate has changed"),
    "enable_tokenizer_info_endpoint": ((False,), "drop it: /tokenize and /detokenize are there"),
    "h11_max_header_count": ((256,), "drop it"),
    "h11_max_incomplete_event_size": ((4194304,), "drop it; --max-body-bytes limits requests"),
    "headless": ((False,), _ONE_DEVICE),
    "log_config_file": ((None,), "use --log-level"),
    "lora_modules": ((None,), _NO_ADAPTERS),
    "max_log_len": ((None,), _LOGGED),
    "middleware": ((None, []), "put a proxy in front of the server"),
    "prompt_adapters": ((None,), _NO_ADAPTERS),
    "tool_parser_plugin": ((None, ""), "the parsers are hermes, llama3_json, mistral and pythonic"),
    "tool_server": ((None,), "tools are called by the client"),
}
CALL: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_salt": ((None,), "reset_prefix_cache() forgets cached prefixes; enable_prefix_caching=False keeps none"),
    "chat_template_content_format": (("auto", "string", "openai"), "drop it: the template's own form is found out"),
    "guided_options_request": ((None,), "use SamplingParams(structured_outputs=...)"),
    "lora_request": ((None,), _NO_ADAPTERS),
    "mm_processor_kwargs": ((None, {}), _TEXT_ONLY),
    "multi_modal_data": ((None, {}), _TEXT_ONLY),
    "multi_modal_uuids": ((None, {}), _TEXT_ONLY),
    "pooling_params": ((None,), "say it in the call: embed(prompts, pooling=, normalize=)"),
    "prompt_adapter_request": ((None,), _NO_ADAPTERS),
    "prompt_embeds": ((None,), "give text or token ids"),
    "return_assistant_tokens_mask": ((False,), "drop it"),
    "tokenization_kwargs": ((None, {}), "tokenise with get_tokenizer().encode() and give the ids as prompts"),
}
SAMPLING: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_token_ids_mask": ((None,), "use allowed_token_ids="),
    "best_of": ((None, 1), "use n= and pick the best of the answers by cumulative_logprob"),
    "early_stopping": ((False, None), "beam search is not built; use n= with a temperature"),
    "extra_args": ((None, {}), "drop it"),
    "length_penalty": ((1.0, None), "beam search is not built; use n= with a temperature"),
    "logits_processors": ((None, []), "use logit_bias=, allowed_token_ids=, bad_words= or structured_outputs="),
    "output_kind": ((None,), "generate() returns whole answers, stream() the new pieces"),
    "truncate_prompt_tokens": ((None,), "truncate the prompt before the call"),
    "use_beam_search": ((False, None), "beam search is not built; use n= with a temperature"),
}
STRUCTURED: dict[str, tuple[tuple[Any, ...], str]] = {
    "backend": ((None, "auto", "guidance", "llguidance"), _STRUCTURED),
    "disable_additional_properties": ((False, None), "write additionalProperties: false into the schema"),
    "disable_any_whitespace": ((False, None), "drop it: at most one space or line break stands between two JSON tokens"),
    "disable_fallback": ((True, False, None), "drop it"),
    "structural_tag": ((None,), "use grammar= with a Lark grammar"),
    "whitespace_pattern": ((None,), "drop it: at most one space or line break stands between two JSON tokens"),
}


def without_harmless(options: dict[str, Any], table: dict[str, tuple[tuple[Any, ...], str]]) -> dict[str, Any]:
    """`options` less those that ask for what happens anyway."""
    return {n: v for n, v in options.items() if not (n in table and _is_any(v, table[n][0]))}


def hints(table: dict[str, tuple[tuple[Any, ...], str]]) -> dict[str, str]:
    """Name -> what to do instead, for `reject_unknown`."""
    return {name: hint for name, (_, hint) in table.items()}


def reject_vllm_options(options: dict[str, Any], where: str, known: Iterable[str]) -> None:
    """Refuse the keyword arguments of a call that llmkit does not know, unless they ask for nothing."""
    reject_unknown(without_harmless(options, CALL), known, where, hints(CALL))


def _is_any(value: Any, values: tuple[Any, ...]) -> bool:
    """`value in values`, but True is not 1, and things that compare oddly (arrays, tensors) are never in."""
    plain = type(value) in (str, int, float, dict, list)
    return any(value is v or (plain and not isinstance(v, bool) and value == v) for v in values)
