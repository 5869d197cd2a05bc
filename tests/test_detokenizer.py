"""Joined pieces equal the whole text, however tokens arrive; no half character, no half stop string is ever shown."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmkit.detokenizer import Detokenizer
from llmkit.sampling_params import SamplingParams
from llmkit.tokenizer import RustBackend, Tokenizer

SPECIALS = ["<s>", "</s>"]
CORPUS = ["Hello world, hello there. Stop here: END of it", "你好，世界！天气很好", "👨‍👩‍👧‍👦 café 🇨🇳"] * 3
FAMILY = "他说：你好👨‍👩‍👧‍👦，再见🇨🇳 café"


@functools.cache
def byte_level() -> Tokenizer:
    rust = Rust(models.BPE())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIALS))
    rust.add_tokens(["<｜tool▁call｜>", "Ġéx"])  # the second is decoded through the byte alphabet, as odd as that is
    return Tokenizer(RustBackend(rust), {"eos_token": "</s>"})


@functools.cache
def sentencepiece() -> Tokenizer:
    words = [*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁Hello", "▁wor", "ld", "h", "好", ",", "▁▁", "END"]
    rust = Rust(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    rust.add_special_tokens(SPECIALS)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Sequence(steps)
    return Tokenizer(RustBackend(rust), {"eos_token": "</s>"})


@functools.cache
def metaspace() -> Tokenizer:
    """Neither of the two spellings we know: takes the general way."""
    rust = Rust(models.BPE({w: i for i, w in enumerate([*SPECIALS, "▁Hello", "▁wor", "ld", "▁", "好", "!"])}, []))
    rust.add_special_tokens(SPECIALS)
    rust.decoder = decoders.Metaspace()
    return Tokenizer(RustBackend(rust), {"eos_token": "</s>"})


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def bytes_of_sentencepiece(text: str) -> list[int]:
    return [len(SPECIALS) + b for b in text.encode()]


def chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    result, at = [], 0
    for size in sizes:
        result.append(ids[at : at + size])
        at += size
    return [*result, ids[at:]]


def stream(tokenizer: Tokenizer, parts: list[list[int]], **params) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params))
    pieces = [detokenizer.push(part) for part in parts] + [detokenizer.flush()]
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.flush() == ""
    return pieces, detokenizer


sizes = st.lists(st.integers(0, 5), max_size=20)


@given(st.data(), sizes, st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_ids_in_any_chunks_byte_level(data, sizes, skip):
    tokenizer = byte_level()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))  # 2 beyond: padding of the embedding
    pieces, _ = stream(tokenizer, chunks(ids, sizes), skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip)


@given(st.text(max_size=40), sizes)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_whole_and_never_broken(text, sizes):
    tokenizer = byte_level()
    pieces, _ = stream(tokenizer, chunks(ids_of(text, tokenizer), sizes), skip_special_tokens=False)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.data(), sizes, st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_ids_in_any_chunks_sentencepiece(data, sizes, skip):
    tokenizer = sentencepiece()
    token = st.integers(258, tokenizer.vocab_size + 2).map(lambda i: [i]) | st.sampled_from([[0], [1]])
    character = st.characters(codec="utf-8").map(bytes_of_sentencepiece)
    ids = [i for part in data.draw(st.lists(token | character, max_size=20)) for i in part]
    pieces, _ = stream(tokenizer, chunks(ids, sizes), skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip)


@given(st.lists(st.integers(0x80, 0xFF), max_size=3), st.sampled_from([[], [258], [264, 260]]))
@settings(deadline=None)
def test_invalid_byte_runs_sentencepiece(run, after):
    tokenizer = sentencepiece()
    ids = [259, *(len(SPECIALS) + b for b in run), *after]
    try:
        bytes(run).decode()
    except UnicodeDecodeError:
        if any(len(bytes(run[i:j]).decode("utf-8", "ignore")) for i in range(3) for j in range(i, 4)):
            return  # whole characters inside an invalid run: the documented exception
    assert "".join(stream(tokenizer, [[i] for i in ids])[0]) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 9), max_size=30), sizes, st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_ids_in_any_chunks_other_decoders(ids, sizes, skip):
    pieces, _ = stream(metaspace(), chunks(ids, sizes), skip_special_tokens=skip)
    assert "".join(pieces) == metaspace().decode(ids, skip)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()])
def test_characters_come_whole(tokenizer):
    ids = bytes_of_sentencepiece(FAMILY) if tokenizer is sentencepiece() else ids_of(FAMILY, tokenizer)
    pieces, _ = stream(tokenizer, [[i] for i in ids])
    assert "".join(pieces) == FAMILY
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= 10


def test_flush_shows_incomplete_bytes():
    assert stream(sentencepiece(), [bytes_of_sentencepiece("好")[:2]])[0] == ["", "\ufffd\ufffd"]
    rare = ids_of("\U0001f9ff", byte_level())  # not in the corpus: one token a byte, or nearly
    assert len(rare) > 1
    assert stream(byte_level(), [rare[:-1]])[0] == ["", "\ufffd"]


def test_space_after_the_prompt_is_kept():
    tokenizer = sentencepiece()
    hello = tokenizer.id_of("▁Hello")
    for prompt, expected in (([], "Hello"), ([0], "Hello"), ([0, tokenizer.id_of("ld")], " Hello")):
        assert Detokenizer(tokenizer, SamplingParams(), prompt_token_ids=prompt).push([hello]) == expected
    general = Detokenizer(metaspace(), SamplingParams(), prompt_token_ids=[4])
    assert general.push([2, 3]) == " Hello wor"


def test_no_text_when_nobody_wants_it():
    assert stream(byte_level(), [[5, 6, 7]], detokenize=False)[0] == ["", ""]


# --- stop strings ---


def first_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The plain meaning: read character by character, halt when the text ends with a stop string (the longest of those)."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    st.text("abc你👨", max_size=30),
    st.lists(st.text("abc你👨", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes,
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_equal_their_plain_meaning(text, stops, sizes, include):
    tokenizer = byte_level()
    parts = chunks(ids_of(text, tokenizer), sizes)
    pieces, detokenizer = stream(tokenizer, parts, stop=stops, include_stop_str_in_output=include)
    assert ("".join(pieces), detokenizer.stop_reason) == first_stop(text, stops, include)


@given(st.text("abEND", max_size=30), st.lists(st.text("abEND", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_exactly_the_possible_beginning_is_held_back(text, stops):
    tokenizer, detokenizer = byte_level(), Detokenizer(byte_level(), SamplingParams(stop=stops))
    ids = ids_of(text, tokenizer)
    for n, token in enumerate(ids, 1):
        detokenizer.push([token])
        if detokenizer.stop_reason is not None:
            break
        seen = tokenizer.decode(ids[:n])
        held = max((k for k in range(len(seen) + 1) for s in stops if k < len(s) and seen.endswith(s[:k])), default=0)
        assert detokenizer.text == seen[: len(seen) - held]


def test_the_completing_token_is_told():
    tokenizer = byte_level()
    ids = ids_of("abc: E", tokenizer) + ids_of("ND", tokenizer)
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="END"))
    assert detokenizer.push([*ids, *ids_of(" more", tokenizer)]) == "abc: "
    assert (detokenizer.stop_reason, detokenizer.stop_token_count) == ("END", len(ids))
    assert (detokenizer.push(ids), detokenizer.flush(), detokenizer.text) == ("", "", "abc: ")


def test_stop_strings_within_min_tokens_do_not_count():
    tokenizer = byte_level()
    ids = [i for c in "xENDyENDz" for i in ids_of(c, tokenizer)]
    pieces, detokenizer = stream(tokenizer, [ids], stop=["END"], min_tokens=4)
    assert ("".join(pieces), detokenizer.stop_token_count) == ("xENDy", 8)
    pieces, detokenizer = stream(tokenizer, [ids], stop=["END"], min_tokens=3)
    assert ("".join(pieces), detokenizer.stop_token_count) == ("x", 4)


def test_held_back_text_is_released_at_the_end():
    pieces, detokenizer = stream(byte_level(), [ids_of("the EN", byte_level())], stop=["END"])
    assert (pieces, detokenizer.stop_reason) == (["the ", "EN"], None)


def test_special_tokens_as_stop_strings():
    tokenizer = byte_level()
    ids = [*ids_of("hello", tokenizer), tokenizer.id_of("</s>"), *ids_of("x", tokenizer)]
    shown, detokenizer = stream(tokenizer, [ids], stop=["</s>"], skip_special_tokens=False)
    assert ("".join(shown), detokenizer.stop_reason) == ("hello", "</s>")
    hidden, detokenizer = stream(tokenizer, [ids], stop=["</s>"])
    assert ("".join(hidden), detokenizer.stop_reason) == ("hellox", None)


def test_a_match_that_did_not_count_is_not_found_later():
    tokenizer = byte_level()
    ids = [i for c in "abcx" for i in ids_of(c, tokenizer)]  # "ab" is complete too early, and held back as "abcd" may follow
    pieces, detokenizer = stream(tokenizer, [[i] for i in ids], stop=["ab", "abcd"], min_tokens=2)
    assert ("".join(pieces), detokenizer.stop_reason) == ("abcx", None)
