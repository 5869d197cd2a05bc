"""Structured output: a language the answer must belong to, as a mask over the next token. Around llguidance's matcher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmkit.errors import InvalidRequestError
from llmkit.sampling_params import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Between two JSON tokens: nothing, one space, or one line break with its indentation. llguidance's default is any amount, and
# a model that has lost its way fills the whole context with blanks; compact, json.dumps and indented forms all still fit.
JSON_WHITESPACE = r" |\r?\n[ \t]{0,40}"
_CACHE = "_llguidance_tokenizers"


class GrammarTokenizer(Protocol):
    """What a grammar needs to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def backend_json(self) -> str: ...


class Grammar:
    """Where one answer stands in its language: `fill_bitmask`, sample, `accept`, again, until `finished`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        # llguidance wants a buffer of exactly its own vocabulary's size
        self._mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)

    @classmethod
    def compile(
        cls, spec: StructuredOutputs, tokenizer: GrammarTokenizer, vocab_size: int, eos_ids: Sequence[int] | None = None
    ) -> Grammar:
        """The language of `spec`, over a model's vocabulary (which may be padded beyond the tokenizer's).

        eos_ids: any of them ends an answer that may end; by default the tokenizer's one. Raises InvalidRequestError
        (param="structured_outputs") with llguidance's message and the place when the language is malformed or unsupported.
        """
        from llguidance import LLMatcher, LLParserLimits

        ll_tokenizer = _ll_tokenizer(tokenizer, vocab_size, eos_ids)
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(ll_tokenizer, _source(spec), log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(spec, matcher.get_error())
        return cls(matcher, ll_tokenizer)

    @property
    def finished(self) -> bool:
        """True when nothing can be added: only an eos may follow, or has come."""
        return self._matcher.is_stopped()

    def fill_bitmask(self, out: np.ndarray) -> None:
        """Write which tokens may come next to `out`, int32 [ceil(V / 32)]: bit t % 32 of word t // 32 is token t."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        shared = min(out.size, self._mask.size)
        out[:shared] = self._mask[:shared]
        out[shared:] = 0

    def accept(self, token_id: int) -> bool:
        """Go on by one generated token (eos too). False when it is not in the language; then nothing has changed."""
        if self.finished:
            return token_id in self._tokenizer.eos_tokens
        return token_id >= 0 and self._matcher.try_consume_tokens([token_id]) == 1

    def copy(self) -> Grammar:
        """The same language from its beginning: one for each of n answers. Cheap, nothing is compiled again."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Grammar(matcher, self._tokenizer)


def _source(spec: StructuredOutputs) -> str:
    """`spec` in llguidance's own notation."""
    from llguidance import LLMatcher

    if spec.regex is not None:
        return LLMatcher.grammar_from_regex(spec.regex)
    if spec.grammar is not None:
        return LLMatcher.grammar_from_lark(spec.grammar)
    if spec.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in spec.choice))
    schema = {"type": "object"} if spec.json_object else spec.json
    schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, dict):
        raise _invalid(spec, f"a JSON schema is an object, not {json.dumps(schema)}")
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_WHITESPACE})


def _ll_tokenizer(tokenizer: GrammarTokenizer, vocab_size: int, eos_ids: Sequence[int] | None) -> LLTokenizer:
    """llguidance's view of `tokenizer`: seconds to build for a large vocabulary, so it is kept on the tokenizer itself."""
    from llguidance import LLTokenizer

    eos = tuple(eos_ids or [t for t in (tokenizer.eos_token_id,) if t is not None])
    cache: dict[tuple[int, tuple[int, ...]], LLTokenizer] = tokenizer.__dict__.setdefault(_CACHE, {})
    if (vocab_size, eos) not in cache:
        # a model may have fewer rows than its tokenizer has tokens; llguidance needs them all, fill_bitmask drops the rest
        num_tokens = max(vocab_size, tokenizer.vocab_size)
        cache[vocab_size, eos] = LLTokenizer(tokenizer.backend_json(), n_vocab=num_tokens, eos_token=list(eos) or None)
    return cache[vocab_size, eos]


def _invalid(spec: StructuredOutputs, message: str) -> InvalidRequestError:
    kind = next(f.name for f in fields(spec) if getattr(spec, f.name) not in (None, False))
    return InvalidRequestError(
        f"structured_outputs.{kind} cannot be used: {message.strip()}",
        "mend it there; schemas are read as JSON Schema 2020-12, regexes as Rust's, grammars as llguidance's Lark",
        param="structured_outputs",
    )
