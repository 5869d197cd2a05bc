"""The sampler against a plain per-row reference, transformers' warpers, and chi-square tests of what it draws."""

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from llmkit.engine.sampler import (
    NO_TOKEN,
    Cuts,
    History,
    Sampler,
    SamplingRows,
    draw,
    draw_filtered,
    edit_logits,
    greedy,
    top_logprobs,
    uniforms,
)
from llmkit.errors import InvalidRequestError
from llmkit.sampling_params import SamplingParams

CPU = torch.device("cpu")
ALMOST_ONE = (1 << 44) - 1  # the largest uniform there is


class OnlyThese:
    """A grammar that allows some tokens."""

    def __init__(self, tokens, finished=False):
        self.tokens, self.finished = tokens, finished

    def fill_bitmask(self, out):
        for t in self.tokens:
            out[t // 32] |= np.uint32(1 << (t % 32)).astype(np.int32)


def make_rows(all_params, vocab_size, stop_ids=(0,), bad_words=(), grammars=None, first_row=0):
    rows = SamplingRows(len(all_params) + first_row, vocab_size, CPU)
    for i, params in enumerate(all_params):
        rows.set(
            i + first_row,
            params,
            seed=params.seed or 0,
            stop_ids=stop_ids,
            bad_words=list(bad_words),
            grammar=(grammars or {}).get(i),
        )
    return rows


def make_history(prompts, answers):
    length = max(len(p) + len(a) for p, a in zip(prompts, answers))
    tokens = np.full((len(prompts), length + 3), 1, np.int32)  # what lies beyond num_tokens is old rubbish, not padding
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        tokens[i, : len(prompt) + len(answer)] = prompt + answer
    num_prompt = np.array([len(p) for p in prompts], np.int32)
    return History(tokens, num_prompt, num_prompt + np.array([len(a) for a in answers], np.int32))


def plain_history(num_rows, generated=0):
    return make_history([[1]] * num_rows, [[2] * generated] * num_rows)


def reference_edit(logits, params, prompt, answer, stop_ids, bad_words, grammar):
    """One row, token by token, in the documented order."""
    out = logits.astype(np.float64).copy()
    vocab = range(len(out))
    for t in vocab:
        if params.allowed_token_ids and t not in params.allowed_token_ids:
            out[t] = -np.inf
        if grammar and t not in grammar.tokens:
            out[t] = -np.inf
        for word in bad_words:
            if word[-1] == t and answer[len(answer) - len(word) + 1 :] == word[:-1] and len(answer) >= len(word) - 1:
                out[t] = -np.inf
        if len(answer) < params.min_tokens and t in stop_ids:
            out[t] = -np.inf
        out[t] += (params.logit_bias or {}).get(t, 0.0)
        if t in prompt + answer:
            out[t] = out[t] / params.repetition_penalty if out[t] > 0 else out[t] * params.repetition_penalty
        out[t] -= params.frequency_penalty * answer.count(t)
        out[t] -= params.presence_penalty * (t in answer)
    return out


def reference_support(logits, params):
    """Which tokens may be drawn: min_p, then top_k (ties stay), then top_p (the one that crosses stays)."""
    z = logits.astype(np.float64) / params.temperature
    p = np.exp(z - z.max())
    keep = (p > 0) & (p >= params.min_p * p.max())
    p = np.where(keep, p, 0)
    if params.top_k:
        keep &= logits >= np.sort(np.where(keep, logits, -np.inf))[::-1][min(params.top_k, len(z)) - 1]
    p = np.where(keep, p, 0)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    keep[order[before >= params.top_p]] = False if params.top_p < 1 else keep[order[before >= params.top_p]]
    return keep


def draws(logits, params, count, seed=5):
    """`count` draws from one distribution: rows that differ in their seeds only."""
    n, v = count, len(logits)
    rows = make_rows([params.clone(seed=seed * 1_000_003 + i) for i in range(n)], v)
    batch = torch.from_numpy(np.repeat(logits[None].astype(np.float32), n, 0))
    return Sampler(rows)(batch, np.arange(n), plain_history(n)).token_ids.numpy()


def chi_square(counts, probs):
    expected = probs * counts.sum()
    return float((((counts - expected) ** 2)[probs > 0] / expected[probs > 0]).sum())


def chi_square_limit(dof):
    """The 0.9999 quantile, by Wilson and Hilferty."""
    return dof * (1 - 2 / (9 * dof) + 3.719 * np.sqrt(2 / (9 * dof))) ** 3


# --- editing ------------------------------------------------------------------------------------------------------------

EDITS = [
    SamplingParams(),
    SamplingParams(allowed_token_ids=[3, 3, 7, 12, 40]),
    SamplingParams(min_tokens=9),
    SamplingParams(min_tokens=4),
    SamplingParams(logit_bias={5: 3.5, 39: -100.0}),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6, frequency_penalty=0.4),
    SamplingParams(frequency_penalty=-1.1),
    SamplingParams(presence_penalty=1.3),
    SamplingParams(
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=-0.5,
        logit_bias={1: 2.0, 0: 50.0},
        min_tokens=9,
        allowed_token_ids=list(range(30)),
    ),
]


@pytest.mark.parametrize("seed", range(4))
def test_edits_match_the_plain_reference(seed):
    rng, vocab = np.random.default_rng(seed), 41
    n = len(EDITS)
    prompts = [rng.integers(0, vocab, rng.integers(1, 9)).tolist() for _ in range(n)]
    answers = [rng.integers(0, vocab, rng.integers(0, 8)).tolist() for _ in range(n)]
    answers[0], answers[1], answers[2] = [4, 8, 15], [8, 15], [15]
    bad = [[11], [15, 16], [8, 15, 23], [4, 8, 15, 38], [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]]
    grammars = {3: OnlyThese([2, 31, 32, 40]), 9: OnlyThese(list(range(0, 41, 3)))}
    rows = make_rows(EDITS, vocab, stop_ids=[0, 33, 99], bad_words=bad, grammars=grammars)
    row_ids = rng.permutation(n)
    logits = (rng.standard_normal((n, vocab)) * 3).astype(np.float32)
    edited = torch.from_numpy(logits.copy())
    edit_logits(edited, rows, row_ids, make_history(prompts, answers))
    for i, r in enumerate(row_ids):
        want = reference_edit(logits[i], EDITS[r], prompts[r], answers[r], [0, 33], bad, grammars.get(r))
        np.testing.assert_allclose(edited[i].numpy(), want, rtol=1e-5, atol=1e-5)


def test_repetition_penalty_is_transformers():
    rng = np.random.default_rng(0)
    prompt, answer = [3, 5, 5, 9], [9, 1, 3]
    logits = torch.from_numpy(rng.standard_normal((1, 20)).astype(np.float32))
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits.clone())
    edit_logits(logits, make_rows([SamplingParams(repetition_penalty=1.3)], 20), np.array([0]), make_history([prompt], [answer]))
    torch.testing.assert_close(logits, want)


def test_unused_features_cost_nothing_and_clear_forgets():
    rows = make_rows([SamplingParams(), SamplingParams(logit_bias={1: 9.0}, top_k=3)], 8)
    ids = np.array([1, 0])
    assert rows.using("bias", ids).tolist() == [0]
    assert rows.using("filtered", ids).tolist() == [0]
    assert rows.using("penalised", ids).size == 0
    rows.clear(1)
    assert rows.using("bias", ids).size == rows.using("filtered", ids).size == 0
    rows.set(1, SamplingParams(temperature=0), seed=1, stop_ids=[], bad_words=[], grammar=None)
    assert rows.using("sampled", ids).tolist() == [1]


def test_an_answer_that_is_complete_may_end_before_min_tokens():
    params = SamplingParams(min_tokens=5, temperature=0)
    for finished, want in ((True, 0), (False, NO_TOKEN)):
        rows = make_rows([params], 8, stop_ids=[0], grammars={0: OnlyThese([0], finished)})
        assert Sampler(rows)(torch.zeros(1, 8), np.array([0]), plain_history(1)).token_ids.tolist() == [want]


@pytest.mark.parametrize("wrong", [{"logit_bias": {8: 1.0}}, {"allowed_token_ids": [-1]}, {"allowed_token_ids": [2, 900]}])
def test_ids_outside_the_vocabulary_are_refused_by_name(wrong):
    with pytest.raises(InvalidRequestError, match="ids go from 0 to 7") as e:
        make_rows([SamplingParams(**wrong)], 8)
    assert e.value.param == next(iter(wrong))


# --- filters ------------------------------------------------------------------------------------------------------------

FILTERS = [
    SamplingParams(top_k=1),
    SamplingParams(top_k=5, temperature=0.7),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.3, temperature=1.5),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=1.0),
    SamplingParams(min_p=0.02, top_k=9, top_p=0.7, temperature=1.3),
    SamplingParams(top_k=10**6, top_p=0.9),
]


@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("vocab", [30, 700])
def test_support_matches_the_plain_reference(params, vocab):
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal(vocab) * 3).astype(np.float32)
    want = reference_support(logits, params)
    drawn = np.bincount(draws(logits, params, 4000), minlength=vocab)
    assert not drawn[~want].any()
    p = np.where(want, np.exp(logits / params.temperature - (logits / params.temperature).max()), 0)
    p /= p.sum()
    assert (drawn[p > 0.005] > 0).all()


@pytest.mark.parametrize("width", [3, 16, 200])
@pytest.mark.parametrize("params", [p for p in FILTERS if p.top_k < 1000])
def test_support_matches_transformers_and_not_the_width(params, width, monkeypatch):
    """Every quantile of the draw, so the whole support is seen; in candidate windows that do and do not suffice."""
    monkeypatch.setattr("llmkit.engine.sampler._WIDTHS", (width,))
    logits = torch.from_numpy((np.random.default_rng(1).standard_normal(90) * 2).astype(np.float32))
    want = logits[None] / params.temperature
    if params.min_p:
        want = MinPLogitsWarper(params.min_p)(None, want)
    if params.top_k:
        want = TopKLogitsWarper(params.top_k)(None, want)
    if params.top_p < 1:
        want = TopPLogitsWarper(params.top_p)(None, want)
    assert set(every_quantile(logits, params, 20_000)) == set(torch.isfinite(want[0]).nonzero().flatten().tolist())


def every_quantile(logits, params, n):
    uniform = torch.arange(n, dtype=torch.int64) * ((1 << 44) // n)
    cuts = Cuts(
        torch.full((n,), params.top_k or len(logits)), torch.full((n,), params.top_p), torch.full((n,), params.min_p), uniform
    )
    return draw_filtered(logits.repeat(n, 1), torch.full((n,), params.temperature), cuts).tolist()


@pytest.mark.parametrize("width", [2, 6, 7, 20, 50])
def test_ties(width, monkeypatch):
    """top_k keeps what ties with the k-th; top_p counts tied tokens one by one, smaller ids first; whatever topk's order."""
    monkeypatch.setattr("llmkit.engine.sampler._WIDTHS", (width,))
    logits = torch.full((40,), -20.0)
    logits[[30, 7, 21, 2, 13]] = 1.0
    logits[9] = 2.0
    assert set(every_quantile(logits, SamplingParams(top_k=3), 999)) == {9, 2, 7, 13, 21, 30}
    # probabilities: e/(e+5) = 0.352 for token 9, 0.1296 for each of the five
    assert set(every_quantile(logits, SamplingParams(top_p=0.6), 999)) == {9, 2, 7}
    assert set(every_quantile(logits, SamplingParams(top_p=0.3), 999)) == {9}


def test_top_p_keeps_the_token_that_crosses_and_not_the_next():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2}), (0.99, {0, 1, 2, 3})):
        assert set(every_quantile(logits, SamplingParams(top_p=top_p), 999)) == kept


def test_a_flat_large_vocabulary_needs_every_fallback():
    vocab = 20_000
    logits = np.linspace(0, 0.5, vocab).astype(np.float32)
    drawn = draws(logits, SamplingParams(top_p=0.5), 200)
    want = reference_support(logits, SamplingParams(top_p=0.5))
    assert want.sum() > 8192
    assert want[np.setdiff1d(drawn, np.flatnonzero(~want)[-2:])].all()  # the border may move by a rounding
    assert drawn.min() < vocab - 8192


# --- drawing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.8), SamplingParams(top_k=8), SamplingParams(top_p=0.9, min_p=0.01)]
)
def test_frequencies(params):
    logits = (np.random.default_rng(3).standard_normal(40) * 1.5).astype(np.float32)
    keep = reference_support(logits, params)
    p = np.where(keep, np.exp(logits.astype(np.float64) / params.temperature), 0)
    p /= p.sum()
    counts = np.bincount(draws(logits, params, 20_000), minlength=40)
    assert not counts[~keep].any()
    assert chi_square(counts, p) < chi_square_limit(keep.sum() - 1)


def test_frequencies_over_the_tokens_of_one_request():
    """The same test along the other axis: one seed, many positions."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    u = torch.from_numpy(uniforms(np.full(20_000, 42, np.uint64), np.arange(20_000)))
    drawn = draw(torch.from_numpy(logits).repeat(20_000, 1), torch.ones(20_000), u).numpy()
    assert chi_square(np.bincount(drawn, minlength=4), np.exp(logits)) < chi_square_limit(3)
    pairs = np.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
    assert chi_square(pairs, np.outer(np.exp(logits), np.exp(logits)).ravel()) < chi_square_limit(15)


def test_uniforms_are_uniform_and_streams_are_apart():
    u = uniforms(np.arange(100_000, dtype=np.uint64), np.zeros(100_000, np.int64))
    assert u.min() >= 0
    assert u.max() <= ALMOST_ONE
    assert chi_square(np.bincount(u >> 36, minlength=256), np.full(256, 1 / 256)) < chi_square_limit(255)
    step = np.uint64(0x9E3779B97F4A7C15)  # seeds one hash step apart must not be one stream, shifted
    a, b = (uniforms(np.full(64, s, np.uint64), np.arange(64)) for s in (np.uint64(7), np.uint64(7) + step))
    assert not np.intersect1d(a, b).size


MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(seed=2, top_p=0.9),
    SamplingParams(seed=3, top_k=20, temperature=1.4),
    SamplingParams(seed=4, min_p=0.05, repetition_penalty=1.2),
    SamplingParams(seed=5, frequency_penalty=0.5, logprobs=2),
    SamplingParams(seed=-6, top_p=0.99, temperature=3.0),
    SamplingParams(seed=2**80, presence_penalty=0.5, top_k=300),
]


def test_a_request_draws_the_same_alone_and_in_any_batch():
    vocab, rng = 6000, np.random.default_rng(0)
    n = len(MIXED)
    history = make_history([[1, 2, 3 + i] for i in range(n)], [list(range(5, 5 + i)) for i in range(n)])
    logits = torch.from_numpy(np.round(rng.standard_normal((n, vocab)) * 8).astype(np.float32) / 4)  # many ties
    sampler = Sampler(make_rows(MIXED, vocab))
    alone = [sampler(logits[i : i + 1].clone(), np.array([i]), history).token_ids.item() for i in range(n)]
    for _ in range(5):
        batch = rng.permutation(n)[: rng.integers(2, n + 1)]
        assert sampler(logits[batch], batch, history).token_ids.tolist() == [alone[i] for i in batch]
    assert alone[1] == logits[1].argmax()


def test_the_row_does_not_matter_but_the_seed_and_the_position_do():
    vocab = 3000
    logits = torch.zeros(1, vocab)

    def token(seed, generated, first_row=0):
        rows = make_rows([SamplingParams(seed=seed)], vocab, first_row=first_row)
        history = plain_history(first_row + 1, generated)
        return Sampler(rows)(logits.clone(), np.array([first_row]), history).token_ids.item()

    assert token(7, 3) == token(7, 3) == token(7, 3, first_row=4)
    assert len({token(7, 3), token(8, 3), token(7, 4), token(-7, 3)}) == 4


@pytest.mark.parametrize("vocab", [5, 151_936])
def test_a_masked_token_is_never_drawn_at_the_ends_of_the_scale(vocab):
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, -1] = float("-inf")
    logits[:, vocab // 2 :] -= 60.0  # a long tail of nearly nothing, in which a float CDF stands still
    uniform = torch.tensor([0, 1, ALMOST_ONE - 1, ALMOST_ONE])
    off = Cuts(torch.full((4,), vocab), torch.ones(4), torch.full((4,), 1e-30), uniform)
    for token in (draw(logits.clone(), torch.ones(4), uniform), draw_filtered(logits.clone(), torch.ones(4), off)):
        assert torch.isfinite(logits.gather(1, token[:, None])).all()


def test_greedy_and_tiny_temperatures():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]]).repeat(3, 1)
    rows = make_rows([SamplingParams(temperature=t) for t in (0.0, 1e-9, 1e-4)], 4)
    tokens = Sampler(rows)(logits * 1e4, np.arange(3), plain_history(3)).token_ids.tolist()
    assert tokens[:2] == [1, 1]
    assert tokens[2] in (1, 2)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9)])
def test_no_possible_token_is_said_and_harms_nobody_else(params):
    logits = torch.zeros(4, 600)
    logits[0] = float("-inf")
    logits[1, 5] = float("nan")
    logits[2, 3] = 50.0
    tokens = Sampler(make_rows([params] * 4, 600))(logits, np.arange(4), plain_history(4)).token_ids.tolist()
    assert tokens[:3] == [NO_TOKEN, NO_TOKEN, 3]
    assert 0 <= tokens[3] < 600
    assert greedy(torch.full((1, 4), float("-inf"))).item() == NO_TOKEN


# --- log-probabilities --------------------------------------------------------------------------------------------------


def test_top_logprobs_are_the_raw_log_softmax():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([int(logits[0].argmax()), 7, 49])
    top = top_logprobs(logits, chosen, 4)
    want = logits.log_softmax(-1)
    assert top.token_ids.shape == top.logprobs.shape == (3, 5)
    np.testing.assert_allclose(top.logprobs[:, 0], want.gather(1, chosen[:, None])[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(top.token_ids[:, 1:], want.argsort(-1, descending=True)[:, :4])
    assert top.ranks.tolist() == [1, *((want[i] > want[i, chosen[i]]).sum().item() + 1 for i in (1, 2))]
    assert top_logprobs(logits, chosen, -1).token_ids.shape == (3, 51)
    assert top_logprobs(logits, chosen, 0).row(1, 0, str).keys() == {7}


def test_a_row_in_vllms_form():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    row = top_logprobs(logits, torch.tensor([0]), 2).row(0, 2, "<{}>".format)
    assert list(row) == [0, 1, 2]
    assert [(lp.rank, lp.decoded_token) for lp in row.values()] == [(4, "<0>"), (1, "<1>"), (2, "<2>")]
    assert list(top_logprobs(logits, torch.tensor([1]), 2).row(0, 2, str)) == [1, 2]
    assert len(top_logprobs(logits, torch.tensor([1]), 4).row(0, -1, str)) == 4


def test_logprobs_are_of_the_model_and_only_for_who_asked():
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0, logprobs=2, logit_bias={3: 100.0}), SamplingParams()]
    params += [SamplingParams(logprobs=-1, temperature=0.2, top_k=1)]
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    raw = logits.log_softmax(-1)
    out = Sampler(make_rows(params, 10))(logits, np.arange(4), plain_history(4))
    assert out.token_ids[1] == 3
    assert out.logprobs.where.tolist() == [-1, 0, -1, 1]
    row = out.logprobs.row(1, 2, str)
    assert row[3].logprob == pytest.approx(raw[1, 3].item())
    assert row[3].rank == (raw[1] > raw[1, 3]).sum() + 1
    assert set(row) == {3, *raw[1].topk(2).indices.tolist()}
    assert len(out.logprobs.row(3, -1, str)) == 10
    assert Sampler(make_rows(params[:1], 10))(logits[:1], np.array([0]), plain_history(1)).logprobs is None
