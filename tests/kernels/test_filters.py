"""What a row may draw, and penalties: the kernels against a sort in float64 and against the sampler of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from llmkit_kernels import filters, penalties, sampling

from llmkit.engine.sampler import History, edit_logits
from llmkit.engine.sampling_rows import SamplingRows
from llmkit.sampling_params import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OFF = (0, 1.0, 0.0)
# (top_k, top_p, min_p)
CUTS = [OFF, (1, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.8, 0.0), (20, 0.8, 0.0), (0, 1.0, 0.1), (50, 0.95, 0.02), (3, 0.01, 0.0),
        (7, 0.999, 0.3), (0, 0.9999, 0.0), (10**6, 0.5, 0.0)]  # fmt: skip
NATS = 2.0**-13  # tokens nearer than that are equals


def cuts_of(each: list[tuple[int, float, float]], vocab: int) -> filters.Cuts:
    top_k = [min(k, vocab) if 0 < k < vocab else filters.NO_LIMIT for k, _, _ in each]
    far = [filters.furthest(min_p) for _, _, min_p in each]
    top_p = torch.tensor([p for _, p, _ in each], device=DEVICE)
    return filters.Cuts(torch.tensor(top_k, dtype=torch.int32, device=DEVICE), top_p,
                        torch.tensor(far, dtype=torch.int32, device=DEVICE))  # fmt: skip


def farthest_kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    """By a sort in float64: the distance in nats of the last token kept from the first, ties with it included."""
    scaled = logits.double().cpu().sort(descending=True).values / temperature
    probs = scaled.softmax(0)
    kept = probs >= min_p * probs[0]
    if 0 < top_k < len(scaled):
        kept &= scaled >= scaled[top_k - 1]
    weight = probs * kept
    kept &= (weight.cumsum(0) - weight < top_p * weight.sum()) | (top_p >= 1)
    return float(scaled[0] - scaled[kept.nonzero().max()])


def logits_of(kind: str, batch: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randn(batch, vocab, generator=generator)
    kinds = {"peaked": x * 6, "flat": x * 0.01, "bfloat16": (x * 4).bfloat16().float(), "wide": x * 40, "equal": x * 0 + 3}
    return kinds[kind].to(DEVICE)


@pytest.mark.parametrize("kind", ["peaked", "flat", "bfloat16", "wide", "equal"])
@pytest.mark.parametrize("vocab", [1, 2, 700, 9000])
def test_keeps_what_a_sort_keeps(kind: str, vocab: int) -> None:
    logits, count = logits_of(kind, len(CUTS), vocab), len(CUTS)
    rows = torch.arange(count, device=DEVICE).flip(0)
    temperatures = torch.linspace(0.3, 1.5, count, device=DEVICE)
    scratch = filters.FilterScratch(count, vocab, DEVICE)
    scratch.histograms.fill_(99)  # nothing may be left of the step before
    kept = filters.keep(logits, rows, temperatures, cuts_of(CUTS, vocab), scratch)
    assert torch.equal(kept.top, logits.max(1).values)
    for b, row in enumerate(rows.tolist()):
        limit, expected = int(kept.limit[b]), farthest_kept(logits[b], float(temperatures[row]), *CUTS[row])
        if limit == filters.NO_LIMIT:
            assert CUTS[row] == OFF or expected > 32 or CUTS[row][1:] == OFF[1:], "only top-k may find nothing to cut"
            continue
        distance = (logits[b].max() - logits[b]).double() / float(temperatures[row])
        found = float(distance[(distance / NATS).floor() <= limit].max())
        slack = 2 * NATS + 1e-6 * expected  # equals of top-k and of top-p; and float32
        assert expected - slack <= found <= expected + slack, CUTS[row]


def test_a_greedy_row_keeps_everything_and_the_first_is_never_lost() -> None:
    logits = logits_of("peaked", 2, 300)
    cuts, rows = cuts_of([(3, 0.5, 0.5), (1, 1e-30, 1.0)], 300), torch.arange(2, device=DEVICE)
    kept = filters.keep(logits, rows, torch.tensor([0.0, 0.5], device=DEVICE), cuts, filters.FilterScratch(2, 300, DEVICE))
    assert kept.limit.tolist() == [filters.NO_LIMIT, 0]


def test_a_row_keeps_the_same_in_every_company() -> None:
    logits, count = logits_of("peaked", 6, 5000), 6
    temperatures, cuts = torch.full((count,), 0.7, device=DEVICE), cuts_of([(20, 0.8, 0.0)] * count, 5000)
    rows = torch.arange(count, device=DEVICE)
    together = filters.keep(logits, rows, temperatures, cuts, filters.FilterScratch(count, 5000, DEVICE)).limit.tolist()
    alone = [filters.keep(logits[i : i + 1], rows[i : i + 1], temperatures, cuts, filters.FilterScratch(1, 5000, DEVICE))
             for i in range(count)]  # fmt: skip
    assert together == [int(kept.limit[0]) for kept in alone]


def test_draws_are_among_the_kept_and_fit_their_probabilities() -> None:
    draws, probabilities = 300, torch.tensor([0.4, 0.02, 0.25, 0.2, 0.13], device=DEVICE)
    logits, rows = probabilities.log().repeat(draws, 1), torch.arange(draws, device=DEVICE)
    warm, zero = torch.ones(draws, device=DEVICE), torch.zeros_like(rows)
    one = filters.keep(logits[:1], rows[:1], warm, cuts_of([(4, 0.8, 0.0)], 5), filters.FilterScratch(1, 5, DEVICE))
    kept = filters.Kept(one.limit.repeat(draws), one.top.repeat(draws))
    scratch = sampling.SampleScratch(draws, 5, DEVICE)
    out = sampling.sample(logits, rows, warm, rows * 7 + 3, zero.clone(), zero.clone(), rows.clone(), scratch, draws, kept)
    seen = torch.bincount(out.cpu(), minlength=5)
    assert seen[[1, 4]].tolist() == [0, 0]  # 0.4 + 0.25 + 0.2 of 0.98 is more than 0.8
    expected = torch.tensor([0.4, 0.25, 0.2]) / 0.85 * draws
    assert ((seen[[0, 2, 3]] - expected) ** 2 / expected).sum() < 13.82  # 0.999 quantile of chi-square with 2 degrees of freedom


def test_a_plain_row_draws_the_same_beside_filtered_ones() -> None:
    logits, rows = logits_of("peaked", 3, 5000), torch.arange(3, device=DEVICE)
    warm, zero = torch.ones(3, device=DEVICE), torch.zeros_like(rows)
    cuts = cuts_of([OFF, (2, 1.0, 0.0), OFF], 5000)
    kept = filters.keep(logits, rows, warm, cuts, filters.FilterScratch(3, 5000, DEVICE))
    outs = [sampling.sample(logits, rows, warm, rows + 5, zero.clone(), zero.clone(), rows.clone(),
                            sampling.SampleScratch(3, 5000, DEVICE), 3, k) for k in (None, kept)]  # fmt: skip
    assert outs[0][[0, 2]].tolist() == outs[1][[0, 2]].tolist()


@pytest.mark.parametrize("vocab", [50, 5000])
def test_penalties_are_those_of_the_cpu_while_tokens_are_drawn(vocab: int) -> None:
    r = np.random.default_rng(0)
    each = [SamplingParams(repetition_penalty=1.3), SamplingParams(),
            SamplingParams(frequency_penalty=0.5, presence_penalty=-0.4),
            SamplingParams(repetition_penalty=0.8, frequency_penalty=-0.2, presence_penalty=1.0)]  # fmt: skip
    on_cpu = SamplingRows(4, vocab, torch.device("cpu"))
    for row, params in enumerate(each):
        on_cpu.set(row, params, seed=0, stop_ids=(), bad_words=[], grammar=None)
    num_prompt, num_tokens = np.array([5, 4, 1, 7], np.int32), np.array([9, 4, 3, 7], np.int32)
    history = History(r.integers(0, min(vocab, 12), (4, 40)).astype(np.int32), num_prompt, num_tokens)
    lines = torch.from_numpy(history.token_ids.astype(np.int64))
    counts = [penalties.counted(line[:start], line[start:end], vocab) for line, start, end in zip(lines, num_prompt, num_tokens)]
    repetition, frequency, presence = torch.tensor(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in each], device=DEVICE
    ).T.contiguous()
    mine = penalties.Penalties(repetition, frequency, presence, torch.stack(counts).to(DEVICE))
    rows = torch.tensor([2, 0, 3, 1], device=DEVICE)
    for _ in range(3):
        logits = torch.from_numpy(r.normal(size=(4, vocab)).astype(np.float32)) * 3
        got, want = logits.clone().to(DEVICE), logits.clone()
        penalties.penalise(got, rows, mine)
        edit_logits(want, on_cpu, rows.cpu().numpy(), history)
        torch.testing.assert_close(got.cpu(), want)
        said = r.integers(0, min(vocab, 12), 4)
        history.token_ids[rows.cpu(), num_tokens[rows.cpu()]] = said
        num_tokens[:] += 1
        penalties.count(torch.from_numpy(said).to(DEVICE), rows, mine, 4)


def test_padding_and_failed_draws_are_not_counted() -> None:
    ones, counts = torch.full((3,), 1.5, device=DEVICE), torch.zeros(3, 8, dtype=torch.int16, device=DEVICE)
    counts[0, 1] = 32767
    mine = penalties.Penalties(ones, ones, ones, counts)
    penalties.count(torch.tensor([5, -1, 1], device=DEVICE), torch.tensor([2, 1, 0], device=DEVICE), mine, 2)
    assert counts.nonzero().tolist() == [[0, 1]]
    assert counts[0, 1] == 32767, "full"
