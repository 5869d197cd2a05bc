"""Whatever the logits say, what comes out under the mask is in the language, and it ends."""

import json
import re
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmkit.engine.grammar import Grammar
from llmkit.engine.sampler import History, Sampler, SamplingRows
from llmkit.errors import InvalidRequestError
from llmkit.sampling_params import SamplingParams, StructuredOutputs

EOS, END_OF_TURN = 0, 1
PADDING = 37  # rows of the model's vocabulary that the tokenizer has no token for
CLOSERS = '"]},:'


class TinyTokenizer:
    """A byte-level BPE of a few hundred tokens, trained here; all bytes are in it."""

    def __init__(self):
        self.rust = Tokenizer(models.BPE())
        self.rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.rust.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<eos>", "<end>"], initial_alphabet=alphabet)
        text = ['{"name": "bob", "age": 12}', "[true, false, null]\n    \n", 'red green blue "},{"', "hello   world"]
        self.rust.train_from_iterator(text * 3, trainer)
        self.eos_token_id = EOS
        self.vocab_size = self.rust.get_vocab_size()

    def backend_json(self):
        return self.rust.to_str()


@pytest.fixture(scope="module")
def tokenizer():
    return TinyTokenizer()


def compiled(tokenizer, eos_ids=None, **spec):
    return Grammar.compile(StructuredOutputs(**spec), tokenizer, tokenizer.vocab_size + PADDING, eos_ids)


def allowed(grammar, vocab_size):
    mask = np.full(-(-vocab_size // 32), -1, np.int32)
    grammar.fill_bitmask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size])


def speak(tokenizer, grammar, seed, temperature=1.0, limit=4000):
    """Sample from random logits under the grammar until eos; what closes a thing is favoured a little, so that it ends."""
    vocab = tokenizer.vocab_size + PADDING
    rows = SamplingRows(1, vocab, torch.device("cpu"))
    params = SamplingParams(temperature=temperature)
    rows.set(0, params, seed=seed, stop_ids=[], bad_words=[], grammar=grammar)
    sampler, history = Sampler(rows), SimpleNamespace(num_prompt=np.zeros(1, np.int32), num_tokens=np.zeros(1, np.int32))
    noise = torch.Generator().manual_seed(seed)
    closers = [tokenizer.rust.token_to_id(c) for c in CLOSERS]
    said = []
    for i in range(limit):
        logits = torch.randn(1, vocab, generator=noise)
        logits[0, closers] += 3.0 + i / 100
        history.num_tokens[0] = i
        token = int(sampler(logits, np.array([0]), history).token_ids)
        assert grammar.accept(token), f"{token} after {said}"
        if token in (EOS, END_OF_TURN):
            return tokenizer.rust.decode(said, skip_special_tokens=False)
        said.append(token)
    raise AssertionError(f"no end after {limit} tokens: ...{tokenizer.rust.decode(said[-80:])!r}")


SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"enum": ["x", 1, None]}, "minItems": 1, "maxItems": 4},
    {"type": "string", "maxLength": 12, "minLength": 2},
    {"type": "number", "minimum": -3, "maximum": 7.5},
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"k": {"const": "v"}}, "additionalProperties": False}]},
    {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}},
    {"type": "string", "pattern": "^[a-c]{2,5}(é|😀)$"},
]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_json_is_valid(tokenizer, schema, temperature):
    grammar = compiled(tokenizer, json=schema)
    for seed in range(6):
        jsonschema.validate(json.loads(speak(tokenizer, grammar.copy(), seed, temperature)), schema)


def test_a_schema_as_text_and_any_object(tokenizer):
    assert json.loads(speak(tokenizer, compiled(tokenizer, json='{"const": {"a": [1]}}'), 0)) == {"a": [1]}
    for seed in range(6):
        assert isinstance(json.loads(speak(tokenizer, compiled(tokenizer, json_object=True), seed)), dict)


@pytest.mark.parametrize("regex", ["a+b", r"\d{3}-\d{2}", "(red|green)( blue)?", "[^x]{1,3}", "é{2}😀", "^[a-zé_]{1,4}$"])
def test_regexes_match_in_full(tokenizer, regex):
    grammar = compiled(tokenizer, regex=regex)
    for seed in range(10):
        assert re.fullmatch(regex, speak(tokenizer, grammar.copy(), seed))


CHOICES = ["a", "ab", "abc", 'q"x', "new\nline", "back\\slash", "é😀", "/re/", "a b ", "%x", "\x00\x7f", "$(y)", "'"]


def test_choices_are_chosen_and_each_can_be(tokenizer):
    grammar = compiled(tokenizer, choice=CHOICES)
    assert {speak(tokenizer, grammar.copy(), seed) for seed in range(40)} <= set(CHOICES)
    for choice in CHOICES:
        one = grammar.copy()
        assert all(one.accept(t) for t in tokenizer.rust.encode(choice).ids), choice
        assert EOS in allowed(one, tokenizer.vocab_size)


def test_a_lark_grammar(tokenizer):
    grammar = compiled(tokenizer, grammar='start: "<" item ("," item)~0..2 ">"\nitem: /[a-z]{1,3}/')
    for seed in range(10):
        assert re.fullmatch("<[a-z]{1,3}(,[a-z]{1,3}){0,2}>", speak(tokenizer, grammar.copy(), seed))


def test_blanks_between_json_tokens_are_few(tokenizer):
    grammar = compiled(tokenizer, json={"type": "array", "items": {"type": "boolean"}, "maxItems": 3})
    assert grammar.accept(tokenizer.rust.token_to_id("["))
    run = []
    while len(run) < 200:
        blanks = [t for t in allowed(grammar, tokenizer.vocab_size) if tokenizer.rust.decode([t]).isspace()]
        if not blanks:
            break
        run.append(max(blanks, key=lambda t: (-len(tokenizer.rust.decode([t])), t)))
        assert grammar.accept(run[-1])
    assert tokenizer.rust.decode(run).count("\n") <= 1
    assert len(run) <= 43


@pytest.mark.parametrize("style", [{"separators": (",", ":")}, {}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}])
def test_the_usual_ways_to_write_json_are_all_allowed(tokenizer, style):
    grammar = compiled(tokenizer, json={"type": "object"})
    text = json.dumps({"name": [1, {"x": None}], "y": {"z": "bob"}}, **style)
    assert all(grammar.accept(t) for t in tokenizer.rust.encode(text).ids)
    assert grammar.accept(EOS)


def test_a_complete_answer_leaves_only_eos_any_of_them(tokenizer):
    vocab = tokenizer.vocab_size + PADDING
    grammar = compiled(tokenizer, eos_ids=[EOS, END_OF_TURN], regex="ab?")
    a, b = (tokenizer.rust.token_to_id(c) for c in "ab")
    assert EOS not in allowed(grammar, vocab)
    assert not grammar.accept(EOS)
    assert grammar.accept(a)
    assert not grammar.finished
    assert set(allowed(grammar, vocab)) == {EOS, END_OF_TURN, b}
    early, late = compiled(tokenizer, eos_ids=[EOS, END_OF_TURN], regex="ab?"), grammar
    assert early.accept(a)
    assert early.accept(END_OF_TURN)
    assert early.finished
    assert late.accept(b)
    assert late.finished
    assert set(allowed(late, vocab)) == {EOS, END_OF_TURN}
    assert not late.accept(b)
    assert late.accept(END_OF_TURN)
    assert set(allowed(compiled(tokenizer, regex="b*"), vocab)) >= {EOS}  # by default the tokenizer's own


def test_a_refused_token_changes_nothing_and_a_copy_starts_anew(tokenizer):
    grammar = compiled(tokenizer, regex="abc")
    a, b = (tokenizer.rust.token_to_id(c) for c in "ab")
    assert not grammar.accept(b)
    assert not grammar.accept(-1)
    assert not grammar.accept(tokenizer.vocab_size + 3)
    assert grammar.accept(a)
    assert grammar.copy().accept(a)
    assert grammar.accept(b)


def test_the_mask_fits_the_model_not_the_tokenizer(tokenizer):
    padded = compiled(tokenizer, regex="(?s:.*)")
    assert allowed(padded, tokenizer.vocab_size + PADDING).max() < tokenizer.vocab_size
    small = Grammar.compile(StructuredOutputs(regex="[a-z]+"), tokenizer, 100)
    mask = np.full(4, -1, np.int32)
    small.fill_bitmask(mask)
    wide = np.full(40, -1, np.int32)
    small.fill_bitmask(wide)
    assert mask.tolist() == wide[:4].tolist()
    assert not wide[-20:].any()


INVALID = [
    ({"json": {"type": "strin"}}, "strin"),
    ({"json": {"type": "object", "not": {}}}, "not"),
    ({"json": {"$ref": "#/nope"}}, "/nope"),
    ({"json": "[1]"}, "an object, not [1]"),
    ({"json": {"type": "string", "pattern": "a(b"}}, "unclosed group"),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum"),
    ({"regex": "a(b"}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    ({"grammar": 'start: "a'}, "1(10)"),
]


@pytest.mark.parametrize(("spec", "message"), INVALID)
def test_invalid_languages_are_typed_errors_with_the_place(tokenizer, spec, message):
    with pytest.raises(InvalidRequestError, match=re.escape(message)) as e:
        compiled(tokenizer, **spec)
    assert e.value.param == "structured_outputs"
    assert f"structured_outputs.{next(iter(spec))}" in e.value.message
    assert "<state>" not in e.value.message


def test_the_tokenizer_is_read_once(tokenizer, monkeypatch):
    compiled(tokenizer, regex="a")
    monkeypatch.setattr(tokenizer, "backend_json", lambda: pytest.fail("built again"))
    compiled(tokenizer, regex="b")


def test_several_grammars_in_one_batch(tokenizer):
    vocab = tokenizer.vocab_size + PADDING
    rows = SamplingRows(3, vocab, torch.device("cpu"))
    grammars = [compiled(tokenizer, regex="[xy]"), None, compiled(tokenizer, regex="[0-9]")]
    for r, grammar in enumerate(grammars):
        rows.set(r, SamplingParams(temperature=0), seed=0, stop_ids=[], bad_words=[], grammar=grammar)
    logits = torch.zeros(3, vocab)
    logits[:, vocab - 1] = 9.0
    history = History(np.zeros((3, 4), np.int32), np.ones(3, np.int32), np.ones(3, np.int32))
    tokens = Sampler(rows)(logits, np.array([2, 1, 0]), history).token_ids.tolist()
    assert tokens[1] == vocab - 1
    assert tokenizer.rust.decode([tokens[0]]) in "0123456789"
    assert tokenizer.rust.decode([tokens[2]]) in "xy"
