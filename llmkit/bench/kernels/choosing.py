"""From logits to tokens."""

from __future__ import annotations

import torch
from llmkit_kernels import filters, penalties, sampling
from torch import Tensor

from llmkit.bench.kernels.work import Inputs, Work

_TOP_K, _TOP_P = 20, 0.8  # what Qwen's own models ask for
_REPETITION, _FREQUENCY, _PRESENCE, _SAID = 1.25, 0.5, 0.25, 0.05


def draw(given: Inputs, batch: int, temperature: float) -> Work:
    """A token of each row of logits."""
    logits, rows = _logits(given, batch), torch.arange(batch, device=given.device)
    temperatures = torch.full((batch,), temperature, device=given.device)
    seeds, positions, last_token, token_ids = (torch.zeros_like(rows) for _ in range(4))
    scratch = sampling.SampleScratch(batch, given.config.vocab_size, given.device)

    def run(i: int) -> Tensor:
        mine = logits[i % len(logits)]
        return sampling.sample(mine, rows, temperatures, seeds, positions, last_token, token_ids, scratch, batch)

    def by_torch(i: int) -> Tensor:
        mine = logits[i % len(logits)]
        if temperature == 0:
            return mine.argmax(1)
        return (mine / temperature).softmax(1).div_(torch.empty_like(mine).exponential_()).argmax(1)

    want = None if temperature else lambda: logits[0].argmax(1)
    return Work(run, len(logits), logits[0].nbytes, want=want, by_torch=by_torch)


def keep(given: Inputs, batch: int) -> Work:
    """How many tokens top-k and top-p leave to each row."""
    logits, rows = _logits(given, batch), torch.arange(batch, device=given.device)
    k = min(_TOP_K, given.config.vocab_size)
    top_k, furthest = (torch.full((batch,), x, dtype=torch.int32, device=given.device) for x in (k, filters.NO_LIMIT))
    warm, top_p = (torch.full((batch,), x, device=given.device) for x in (1.0, _TOP_P))
    cuts, scratch = filters.Cuts(top_k, top_p, furthest), filters.FilterScratch(batch, given.config.vocab_size, given.device)

    def run(i: int) -> Tensor:
        return filters.keep(logits[i % len(logits)], rows, warm, cuts, scratch).limit

    def result(limit: Tensor) -> Tensor:
        bins = (logits[0].amax(1, keepdim=True) - logits[0]) * 8192
        return (bins.int() <= limit[:, None]).sum(1)

    def by_torch(i: int) -> Tensor:
        best = logits[i % len(logits)].topk(k, dim=1).values.softmax(1)
        return (best.cumsum(1) - best < _TOP_P).sum(1)

    return Work(run, len(logits), logits[0].nbytes, want=lambda: by_torch(0), result=result, by_torch=by_torch)


def penalise(given: Inputs, batch: int) -> Work:
    """Repetition, frequency and presence penalties, in place, where a twentieth of the vocabulary was said once."""
    logits, rows = _logits(given, batch), torch.arange(batch, device=given.device)
    before, said = logits[0].clone(), torch.rand(logits[0].shape, device=given.device) < _SAID
    repetition, frequency, presence = (
        torch.full((batch,), x, device=given.device) for x in (_REPETITION, _FREQUENCY, _PRESENCE)
    )
    asked = penalties.Penalties(repetition, frequency, presence, said.to(torch.int16) * 2)

    def run(i: int) -> Tensor:
        penalties.penalise(logits[i % len(logits)], rows, asked)
        return logits[i % len(logits)]

    def want() -> Tensor:
        edited = torch.where(before > 0, before / _REPETITION, before * _REPETITION) - (_FREQUENCY + _PRESENCE)
        return torch.where(said, edited, before)

    return Work(run, len(logits), asked.counts.nbytes + 2 * 4 * int(said.sum()), want=want)


def _logits(given: Inputs, batch: int) -> list[Tensor]:
    """float32 [batch, vocabulary], so many that no cache keeps them."""
    shape = (batch, given.config.vocab_size)
    return [given.normal(*shape, scale=3.0, dtype=torch.float32) for _ in range(given.copies(4 * shape[0] * shape[1]))]
