"""How to choose tokens: one `SamplingParams` per request, with vLLM's field names."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
from dataclasses import dataclass, field
from typing import Any, NoReturn

from llmkit import vllm_options
from llmkit.errors import InvalidRequestError, reject_unknown

_ALIASES = {"guided_decoding": "structured_outputs"}  # vLLM's older names


def _refusing(cls: type, where: str, table: dict[str, tuple[tuple[Any, ...], str]]) -> None:
    """Have the dataclass `cls` accept vLLM's options that ask for nothing, and refuse unknown ones with the nearest name."""
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = {_ALIASES.get(name, name): value for name, value in vllm_options.without_harmless(kwargs, table).items()}
        reject_unknown(kwargs, [f.name for f in dataclasses.fields(cls)], where, vllm_options.hints(table))
        plain_init(self, *args, **kwargs)

    cls.__init__ = init


@dataclass
class StructuredOutputs:
    """Constrain the answer to a language; give exactly one of the fields.

    json: a JSON schema (dict or text). json_object: any JSON object. regex: a full-match regular expression.
    choice: one of these strings. grammar: a Lark grammar, in llguidance's dialect.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        self.json_object = bool(self.json_object)
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            what = " and ".join(given) if given else "nothing"
            raise InvalidRequestError(
                f"structured_outputs needs exactly one of json, regex, choice, grammar, json_object; got {what}",
                param="structured_outputs",
            )
        if self.choice is not None and not (self.choice and _is_list(self.choice, str) and all(self.choice)):
            raise InvalidRequestError("structured_outputs.choice needs a list of non-empty strings", param="choice")
        if self.json is not None and not isinstance(self.json, (str, dict)):
            hint = "of a pydantic model it is Model.model_json_schema()"
            raise InvalidRequestError(f"structured_outputs.json needs a JSON schema, not {self.json!r}", hint, "json")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise InvalidRequestError(f"structured_outputs.{name} needs text; got {getattr(self, name)!r}", param=name)
        if isinstance(self.json, str):
            try:
                json.loads(self.json)
            except ValueError as e:
                raise InvalidRequestError(f"structured_outputs.json is not valid JSON: {e}", param="json") from e


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(_is_a(v, kind) for v in value)


def _is_a(value: object, kind: type) -> bool:
    """isinstance, except that True and False are no numbers. (numpy's are.)"""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass
class SamplingParams:
    """Sampling parameters of one request. Names, meanings and defaults are vLLM's, except that `max_tokens=None` means
    "to the end of the context", not 16.

    n: answers per prompt. temperature: 0 is greedy. top_k: 0 or -1 is off. top_p, min_p: nucleus and minimum probability
    relative to the best token. presence/frequency_penalty: OpenAI's, over generated tokens. repetition_penalty: over prompt
    and generated tokens, 1 is off. seed: makes this request repeatable, whatever else runs beside it. stop: strings that end
    the answer. stop_token_ids: ids that end it. bad_words: strings never generated. min_tokens: no eos and no stop id before.
    logprobs / prompt_logprobs: how many top log-probabilities to return per token (the chosen one always comes too; -1 = all).
    logit_bias: token id -> added to the logit. allowed_token_ids: only these. structured_outputs: see StructuredOutputs.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputs | None = field(default=None)

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else self._list("stop", str)
        self.bad_words = self._list("bad_words", str)
        self.stop_token_ids = [int(t) for t in self._list("stop_token_ids", numbers.Integral)]
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = [int(t) for t in self._list("allowed_token_ids", numbers.Integral)]
        if self.top_k == -1:
            self.top_k = 0
        if isinstance(self.structured_outputs, dict):
            self.structured_outputs = StructuredOutputs(**self.structured_outputs)
        if not isinstance(self.structured_outputs, (StructuredOutputs, type(None))):
            self._fail("structured_outputs", "a StructuredOutputs, such as StructuredOutputs(json=schema)")
        if self.logit_bias is not None:
            self.logit_bias = self._bias()
        self._validate()

    def _list(self, name: str, kind: type) -> list[Any]:
        value = getattr(self, name)
        value = value.tolist() if hasattr(value, "tolist") else value
        value = list(value) if isinstance(value, (tuple, set, frozenset)) else value or []
        if not _is_list(value, kind) or not all(v != "" for v in value):
            self._fail(name, "a list of non-empty strings" if kind is str else "a list of token ids")
        return list(value)

    def _bias(self) -> dict[int, float]:
        try:
            return {int(k): float(v) for k, v in (self.logit_bias or {}).items()}
        except (AttributeError, TypeError, ValueError):
            self._fail("logit_bias", "a dict of token id -> number")

    def _validate(self) -> None:
        self._number("temperature", 0.0, None)
        self._number("top_p", 0.0, 1.0, low_open=True)
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.0, None, low_open=True)
        self._integer("n", 1)
        self._integer("top_k", 0)
        self._integer("min_tokens", 0)
        self._integer("max_tokens", 1, optional=True)
        self._integer("seed", None, optional=True)
        self._integer("logprobs", -1, optional=True)
        self._integer("prompt_logprobs", -1, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            self._fail("min_tokens", f"at most max_tokens ({self.max_tokens})")
        if self.stop and not self.detokenize:
            self._fail("stop", "used together with detokenize=True (stop strings are looked for in the text)")
        if any(not math.isfinite(v) for v in (self.logit_bias or {}).values()):
            self._fail("logit_bias", "a dict of token id -> finite number")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            self._fail("allowed_token_ids", "None or a non-empty list")

    def _number(self, name: str, low: float | None, high: float | None, low_open: bool = False) -> None:
        value: Any = getattr(self, name)
        ok = _is_a(value, numbers.Real) and math.isfinite(value)
        ok = ok and (low is None or (value > low if low_open else value >= low)) and (high is None or value <= high)
        if not ok:
            lower = "" if low is None else f"{'above' if low_open else 'at least'} {low:g}"
            self._fail(name, " and ".join(s for s in (lower, "" if high is None else f"at most {high:g}") if s) + ", and finite")
        setattr(self, name, float(value))

    def _integer(self, name: str, low: int | None, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not _is_a(value, numbers.Integral) or (low is not None and int(value) < low):
            self._fail(name, "an integer" + ("" if low is None else f" of at least {low}") + (" or None" if optional else ""))
        setattr(self, name, int(value))

    def _fail(self, name: str, need: str) -> NoReturn:
        raise InvalidRequestError(f"{name} must be {need}; got {getattr(self, name)!r}", param=name)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequestError when logit_bias or allowed_token_ids name a token the model does not have."""
    for name in ("logit_bias", "allowed_token_ids"):
        wrong = [t for t in getattr(params, name) or () if not 0 <= t < vocab_size]
        if wrong:
            raise InvalidRequestError(
                f"{name} names token {wrong[0]}, which the model does not have", f"ids go from 0 to {vocab_size - 1}", param=name
            )


_refusing(StructuredOutputs, "structured_outputs", vllm_options.STRUCTURED)
_refusing(SamplingParams, "SamplingParams", vllm_options.SAMPLING)
StructuredOutputsParams = GuidedDecodingParams = StructuredOutputs  # vLLM's names for it, now and before 0.12
