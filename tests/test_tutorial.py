"""Scripts that were written for vLLM run after changing the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmkit

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[1]
MARK = "# ---- script\n"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=env, timeout=120)


def moved(script: str) -> str:
    """`script` with the import changed, and nothing else."""
    assert script.count("from vllm import") == 1
    return script.replace("from vllm import", "from llmkit import")


def test_the_tutorials_script(smollm2_folder):
    done = run(moved((FIXTURES / "vllm_tutorial.py").read_text()), str(smollm2_folder))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("Prompt: '你好，帮我介绍一下什么是大语言模型。', Generated text: '")
    assert second.startswith("Prompt: '可以给我将一个有趣的童话故事吗？', Generated text: '")
    assert len(first) > 60
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr  # the one line at load


def test_a_loaded_tokenizer_may_be_given(smollm2_folder):
    """The tutorial's comments suggest it: AutoTokenizer.from_pretrained(model, use_fast=False)."""
    script = """
import sys
from vllm import LLM, SamplingParams
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], use_fast=False)
messages = [{"role": "user", "content": "你好"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
llm = LLM(model=sys.argv[1], tokenizer=tokenizer, max_model_len=512)
print(len(llm.generate([text], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids) > 0)
"""
    done = run(moved(script), str(smollm2_folder))
    assert done.stdout == "True\n", done.stderr


SCRIPTS = {
    "0.4": """
import sys
from vllm import LLM, SamplingParams
params = SamplingParams(n=1, best_of=1, use_beam_search=False, length_penalty=1.0, early_stopping=False, temperature=0.8,
                        top_k=-1, top_p=0.95, max_tokens=4, logits_processors=None, truncate_prompt_tokens=None)
llm = LLM(sys.argv[1], load_format="dummy", tokenizer_mode="auto", trust_remote_code=True, tensor_parallel_size=1, dtype="half",
          quantization=None, seed=0, gpu_memory_utilization=0.9, swap_space=4, enforce_eager=True,
          max_context_len_to_capture=8192, disable_custom_all_reduce=False, max_num_seqs=8, block_size=16, max_model_len=256)
ids = llm.get_tokenizer().encode("Hello")
out = llm.generate(None, params, prompt_token_ids=[ids], use_tqdm=False, lora_request=None)
print(len(out), out[0].prompt_token_ids == ids, out[0].finished)
""",
    "0.8": """
import sys
import torch
from vllm import LLM, SamplingParams, GuidedDecodingParams
params = SamplingParams(max_tokens=4, guided_decoding=GuidedDecodingParams(choice=["yes", "no"], backend="auto"), extra_args=None)
llm = LLM(model=sys.argv[1], load_format="dummy", task="generate", dtype=torch.bfloat16, kv_cache_dtype="auto", swap_space=4,
          cpu_offload_gb=0, hf_overrides=None, disable_log_stats=True, enable_lora=False, max_num_seqs=8, max_model_len=256,
          hf_token=None, skip_tokenizer_init=False, generation_config="vllm", compilation_config=None, seed=None)
out = llm.generate({"prompt": "Hello"}, sampling_params=[params], use_tqdm=True, lora_request=None, priority=None)
print(len(out), out[0].outputs[0].text in ("yes", "no"), out[0].finished)
""",
    "now": """
import sys
from vllm import LLM, SamplingParams, StructuredOutputsParams
params = SamplingParams(max_tokens=4, structured_outputs=StructuredOutputsParams(regex="[a-c]{3}", disable_fallback=False))
with LLM(model=sys.argv[1], load_format="dummy", runner="auto", convert="auto", max_model_len=256, max_num_seqs=8,
         enable_prefix_caching=None, mm_processor_kwargs=None, pooler_config=None, structured_outputs_config=None) as llm:
    out = llm.chat([{"role": "user", "content": "Hello"}], params, use_tqdm=False, lora_request=None, add_generation_prompt=True,
                   chat_template_content_format="auto", tools=None, tokenization_kwargs=None)
    print(len(out), set(out[0].outputs[0].text) <= set("abc"), out[0].finished)
""",
}


@pytest.mark.parametrize("version", SCRIPTS)
def test_what_scripts_of_other_years_pass(version, dummy_folder):
    done = run(moved(SCRIPTS[version]), str(dummy_folder))
    assert done.stdout == "1 True True\n", done.stderr


def test_the_names_scripts_import():
    assert llmkit.StructuredOutputsParams is llmkit.StructuredOutputs is llmkit.GuidedDecodingParams
