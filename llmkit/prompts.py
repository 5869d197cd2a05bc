"""From what a user passes to requests that can run; everything that cannot run is refused here, before anything is queued."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmkit.engine.grammar import Grammar
from llmkit.engine.request import Request
from llmkit.errors import InvalidRequestError
from llmkit.sampling_params import SamplingParams, check_token_ids
from llmkit.tokenizer import Tokenizer
from llmkit.vllm_options import reject_vllm_options

if TYPE_CHECKING:
    from llmkit.engine.start import Started

Prompt = str | Sequence[int] | Mapping[str, Any]


_DICT_KEYS = ("prompt", "prompt_token_ids")
_NO_SAMPLING = SamplingParams(temperature=0.0)


def as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many -> a list of prompts. A list of integers is ONE prompt, of token ids."""
    if isinstance(prompts, (str, Mapping)) or _is_token_ids(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        hint = "make it a list: prompts.tolist()" if hasattr(prompts, "tolist") else "make it a list: list(prompts)"
        raise _wrong_type(prompts, hint if isinstance(prompts, Iterable) and not isinstance(prompts, bytes) else None)
    if not prompts:
        raise InvalidRequestError("there is no prompt: the list is empty", "give at least one prompt", param="prompt")
    return list(prompts)


def _wrong_type(value: Any, hint: str | None = None) -> InvalidRequestError:
    what = f"a prompt is text, a list of token ids, or a list of these; got {type(value).__name__}"
    return InvalidRequestError(what, hint, param="prompt")


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and bool(value) and _are_ids(value)


def _are_ids(values: Iterable[Any]) -> bool:
    """Whether all are integers; by their types, of which there is mostly one, for a prompt may have 100,000 items."""
    types = list(map(type, values))
    return types.count(int) == len(types) or all(issubclass(t, (int, np.integer)) and t is not bool for t in set(types))


class _Ids(NamedTuple):
    """A prompt of token ids, with its text when the caller told."""

    ids: Sequence[int]
    text: str | None = None


def _unwrap(prompt: Any) -> str | _Ids:
    """A prompt in any of its forms -> text or ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return _from_dict(prompt)
    if not _is_token_ids(prompt) and not (isinstance(prompt, (list, tuple)) and not prompt):
        raise _wrong_type(prompt, "all items of a list of token ids are integers" if isinstance(prompt, (list, tuple)) else None)
    return _Ids(prompt)


def _from_dict(prompt: Mapping[str, Any]) -> str | _Ids:
    reject_vllm_options({k: v for k, v in prompt.items() if k not in _DICT_KEYS}, "a prompt dict", _DICT_KEYS)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if not isinstance(text, (str, type(None))) or (text is None and ids is None):
        raise InvalidRequestError("a prompt dict needs 'prompt' (text) or 'prompt_token_ids' (a list)", param="prompt")
    if ids is None:
        return text or ""
    unwrapped = _unwrap(ids)
    if isinstance(unwrapped, str):
        raise InvalidRequestError("prompt_token_ids needs a list of integers; got text", "give it as 'prompt'", param="prompt")
    return unwrapped._replace(text=text)


@dataclass(frozen=True)
class Rules:
    """What requests of one engine must keep to, and what they mean where they are silent. Plain data: it travels to a server's
    front. eos_ids: every id that ends an answer. defaults: the sampling parameters of a request that brings none."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    seed: int
    eos_ids: tuple[int, ...]
    defaults: dict[str, Any]


class RequestBuilder:
    """Validates and tokenises for one engine. compiles: whether requests get their grammars here, or where the engine is.
    first_number, stride: how requests are counted, so that several builders for one engine give none of them the same seed."""

    def __init__(
        self, tokenizer: Tokenizer, rules: Rules, *, compiles: bool = True, first_number: int = 0, stride: int = 1
    ) -> None:
        self._tokenizer, self._rules, self._compiles = tokenizer, rules, compiles
        self._vocab_size, self._max_len, self.eos_ids = rules.vocab_size, rules.max_model_len, rules.eos_ids
        self.defaults = SamplingParams(**rules.defaults)
        self._ids = itertools.count(first_number, stride)

    def build(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None = 0, add_special_tokens: bool = True, read_along: bool = True,
    ) -> list[tuple[str | None, list[Request]]]:  # fmt: skip
        """For each prompt its text and its n requests, the first of which the others are forks of. read_along: as theirs."""
        encoded = self._encode(prompts, add_special_tokens)
        each, ranks = self._params(params, len(encoded)), self._priorities(priority, len(encoded))
        grammars = self._grammars(each)
        return [(n, self._requests(t, p, r, grammars, read_along)) for (n, t), p, r in zip(encoded, each, ranks)]

    def build_pooled(self, prompts: Sequence[Prompt], pooling: str) -> list[tuple[str | None, Request]]:
        """For each prompt its text and a request that ends with a vector."""
        built: list[tuple[str | None, Request]] = []
        for text, tokens in self._encode(prompts, add_special_tokens=True):
            self._check_length(tokens, self._max_len, "it")
            name, ids = f"emb-{next(self._ids)}", np.array(tokens, np.int32)
            built.append((text, Request(name, ids, _NO_SAMPLING, max_total=len(ids), pooling=pooling, read_along=False)))
        return built

    def _encode(self, prompts: Sequence[Prompt], add_special_tokens: bool) -> list[tuple[str | None, Sequence[int] | np.ndarray]]:
        """The text, where it is known, and the token ids of each prompt."""
        plain = [_unwrap(p) for p in prompts]
        texts = [p for p in plain if isinstance(p, str)]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens))
        return [(p, next(encoded)) if isinstance(p, str) else (p.text, self._token_ids(p.ids)) for p in plain]

    def _token_ids(self, ids: Sequence[int]) -> np.ndarray:
        """int32 [P]; in numpy, for all prompts are looked at before the first one is computed."""
        try:
            values = np.fromiter(ids, np.int64, len(ids))
            low, high = int(values.min(initial=0)), int(values.max(initial=0))
        except OverflowError:  # beyond 64 bits
            low, high = min(ids), max(ids)
        if low < 0 or high >= self._vocab_size:
            what = f"token id {low if low < 0 else high} is outside the vocabulary (0 to {self._vocab_size - 1})"
            raise InvalidRequestError(what, "encode the prompt with this model's tokenizer: get_tokenizer()", param="prompt")
        return values.astype(np.int32)

    @staticmethod
    def _priorities(priority: int | Sequence[int] | None, count: int) -> list[int]:
        each = list(priority) if isinstance(priority, Sequence) else [0 if priority is None else priority] * count
        if len(each) != count or not _are_ids(each):
            raise InvalidRequestError(f"priority must be an integer or {count} of them; got {priority!r}", param="priority")
        return each

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            return [self.defaults] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
            raise InvalidRequestError("sampling_params must be a SamplingParams or a list of them", param="sampling_params")
        if len(params) != count:
            raise InvalidRequestError(f"{count} prompts but {len(params)} sampling_params", param="sampling_params")
        return list(params)

    def _requests(
        self, tokens: Sequence[int] | np.ndarray, params: SamplingParams, priority: int, grammars: dict[int, Grammar],
        read_along: bool,
    ) -> list[Request]:  # fmt: skip
        self._check(tokens, params)
        base = f"req-{next(self._ids)}"
        stops = tuple(dict.fromkeys([*(() if params.ignore_eos else self.eos_ids), *(params.stop_token_ids or ())]))
        seed = params.seed if params.seed is not None else _fresh_seed(self._rules.seed, base)
        grammar = grammars.get(id(params))
        prompt = np.asarray(tokens, np.int32)
        total = self._max_len if params.max_tokens is None else min(self._max_len, len(tokens) + params.max_tokens)
        first: Request | None = None
        requests: list[Request] = []
        for i in range(params.n):
            request = Request(
                id=base if i == 0 else f"{base}/{i}", prompt=prompt, params=params, stop_ids=stops,
                bad_words=self._bad_words(params.bad_words), grammar=grammar.copy() if grammar else None,
                seed=seed + i, max_total=total, priority=priority, fork_of=first, read_along=read_along,
            )  # fmt: skip
            first = first or request
            requests.append(request)
        return requests

    def _check(self, tokens: Sequence[int] | np.ndarray, params: SamplingParams) -> None:
        self._check_length(tokens, self._max_len - 1, "with at least one answer token it")
        limit = self._rules.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and limit >= 0 and (asked > limit or asked < 0):
                raise InvalidRequestError(f"{name}={asked} is more than this engine's max_logprobs={limit}",
                                          f"load the model with max_logprobs={asked}", param=name)  # fmt: skip
        check_token_ids(params, self._vocab_size)

    def _check_length(self, tokens: Sequence[int] | np.ndarray, most: int, what: str) -> None:
        if not len(tokens):
            raise InvalidRequestError("the prompt is empty", "give at least one character or one token id", param="prompt")
        if len(tokens) > most:
            raise InvalidRequestError(
                f"the prompt has {len(tokens)} tokens, and {what} must fit {self._max_len} of context",
                f"shorten it, or load the model with max_model_len > {len(tokens)}", param="prompt",
            )  # fmt: skip

    def _grammars(self, each: list[SamplingParams]) -> dict[int, Grammar]:
        """id(params) -> what its answers must belong to; compiled once for all prompts that share the params."""
        specs = {id(p): p.structured_outputs for p in each if self._compiles and p.structured_outputs is not None}
        return {
            key: Grammar.compile(spec, self._tokenizer, self._vocab_size, self.eos_ids or None) for key, spec in specs.items()
        }

    def _bad_words(self, words: Iterable[str] | None) -> list[list[int]]:
        """Each word alone and after a space: tokenizers spell the two differently."""
        spelled = [self._tokenizer.encode(form, add_special_tokens=False) for w in words or () for form in (w, " " + w.lstrip())]
        return [list(t) for t in dict.fromkeys(map(tuple, spelled)) if t]


def rules_of(started: Started) -> Rules:
    """The rules of a started engine."""
    return Rules(
        vocab_size=started.model_config.vocab_size, max_model_len=started.engine.plan.max_model_len,
        max_logprobs=started.config.max_logprobs, seed=started.config.seed, eos_ids=_eos_ids(started),
        defaults=default_params(started),
    )  # fmt: skip


def _eos_ids(started: Started) -> tuple[int, ...]:
    """Every id that the model's files call the end: generation_config.json may name several (Llama 3, Qwen)."""
    named = started.generation_config.get("eos_token_id")
    ids = [*started.model_config.eos_token_ids, *(named if isinstance(named, list) else [named]), started.tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def default_params(started: Started) -> dict[str, Any]:
    """What a call without SamplingParams means: the model's own generation_config.json, as in vLLM."""
    own = started.generation_config if started.config.generation_config == "auto" else {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {n: own[n] for n in names if own.get(n) is not None}


def _fresh_seed(engine_seed: int, request_id: str) -> int:
    """A seed for a request that brings none: the engine's seed and the request's number decide, so a script repeats."""
    return (engine_seed << 32) + int(request_id.removeprefix("req-")) * 1_000_003
