"""How the tokens of a step are drawn on the device, so that it can go on to the next step without the host.

The parameters of the running requests lie there, one entry a row: temperature, seed, top-k, top-p, min-p and penalties. What else
a request may ask for (grammars, word lists, ...) the sampler in torch does, and the device waits for it. So it does where
penalties and log-probabilities meet: the latter are of logits that the former have not touched. Which road a request takes
depends on its own parameters alone, never on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from llmkit_kernels import filters, penalties, sampling
from torch import Tensor

from llmkit.engine.graphs import DeviceRows
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.engine.sampling_rows import FEATURES, GREEDY_BELOW, SamplingRows
from llmkit.transfer import send

_ON_THE_DEVICE = {"sampled", "filtered", "penalised", "logprobs"}
_BY_TORCH = tuple(f for f in FEATURES if f not in _ON_THE_DEVICE)
_NOBODY = np.empty(0, np.int64)


class Work(IntEnum):
    """What a batch needs of the device, each level with those below; graphs are captured for each."""

    DRAW = 0
    FILTER = 1
    PENALISE = 2


class Drawing:
    """Chooses tokens on the device; `load` when requests get their rows. From then on each draw moves their position on."""

    def __init__(self, state: DeviceRows, rows: Rows, sampling_rows: SamplingRows) -> None:
        self.state, self.rows, self.sampling = state, rows, sampling_rows
        self.device = state.position.device
        self.penalties: penalties.Penalties | None = None  # made when first needed: a count for each row and token
        self._work = np.zeros(state.num_rows + 1, np.int8)  # padding is the last row, and asks for nothing

    def load(self, requests: Sequence[Request]) -> None:
        """Take over the parameters of requests whose rows are new, their newest tokens, and where these stand. Rows of torch's
        road ask for nothing here."""
        ids = np.array([r.row for r in requests])
        by_torch = _mask(self.by_torch(ids), len(ids))
        s = self.sampling
        greedy = (s.temperature.host[ids] < GREEDY_BELOW) | (s.top_k.host[ids] == 1)
        cutting = _mask(s.using("filtered", ids), len(ids)) & ~greedy & ~by_torch
        temperature = np.where(greedy, np.float32(0), s.temperature.host[ids])
        top_k = np.where(cutting & (s.top_k.host[ids] < s.vocab_size), s.top_k.host[ids], filters.NO_LIMIT)
        top_p = np.where(cutting, s.top_p.host[ids], np.float32(1))
        furthest = [filters.furthest(float(p)) if cut else filters.NO_LIMIT for p, cut in zip(s.min_p.host[ids], cutting)]
        position, seeds = self.rows.num_tokens[ids] - 1, np.array([r.seed & (2**62 - 1) for r in requests])
        numbers = np.stack((temperature.view(np.int32), top_k, top_p.view(np.int32), furthest)).astype(np.int32)
        at = self.state.admit(ids, np.stack((self.rows.token_ids[ids, position], position, seeds)).astype(np.int64), numbers)
        penalised = _mask(s.using("penalised", ids), len(ids)) & ~by_torch
        self._load_penalties(ids, at, penalised)
        self._work[ids] = np.where(penalised, Work.PENALISE, np.where(cutting, Work.FILTER, Work.DRAW))

    def _load_penalties(self, ids: np.ndarray, at: Tensor, penalised: np.ndarray) -> None:
        if self.penalties is None and not penalised.any():
            return
        p = self.penalties = self.penalties or self._no_penalties()
        s = self.sampling
        for mine, theirs, off in ((p.repetition, s.repetition_penalty, 1), (p.frequency, s.frequency_penalty, 0),
                                  (p.presence, s.presence_penalty, 0)):  # fmt: skip
            mine[at] = self._send(np.where(penalised, theirs.host[ids], np.float32(off)))
        for row in ids[penalised]:
            start, end = int(self.rows.num_prompt[row]), int(self.rows.num_tokens[row])
            tokens = self._send(self.rows.token_ids[row, :end].astype(np.int64))
            p.counts[row] = penalties.counted(tokens[:start], tokens[start:], s.vocab_size)

    def _no_penalties(self) -> penalties.Penalties:
        count, device = self.state.num_rows + 1, self.device
        frequency, presence = torch.zeros(2, count, device=device).unbind(0)
        counts = torch.zeros(count, self.sampling.vocab_size, dtype=torch.int16, device=device)
        return penalties.Penalties(torch.ones(count, device=device), frequency, presence, counts)

    def work(self, rows: np.ndarray) -> Work:
        """What these rows, int64 [B], need."""
        return Work(int(self._work[rows].max(initial=0)))

    def by_torch(self, rows: np.ndarray) -> np.ndarray:
        """Positions in the batch, int64, of the rows whose tokens torch's sampler chooses."""
        using = self.sampling.using
        asked = [found for feature in _BY_TORCH if (found := using(feature, rows)).size]
        if (penalised := using("penalised", rows)).size and (told := using("logprobs", rows)).size:
            asked.append(np.intersect1d(penalised, told))
        return np.unique(np.concatenate(asked)) if asked else _NOBODY

    def draw(self, logits: Tensor, rows: Tensor, work: Work) -> Tensor:
        """A token for each of `logits` fp32 [B, V] of rows int64 [B] -> int64 [B]. Penalties edit the logits in place."""
        s, (batch, vocab) = self.state, logits.shape
        if work == Work.PENALISE:
            assert self.penalties is not None  # `load` has made them
            penalties.penalise(logits, rows, self.penalties)
        kept = None
        if work >= Work.FILTER:
            kept = filters.keep(logits, rows, s.temperature, s.cuts, filters.FilterScratch(batch, vocab, self.device))
        scratch = sampling.SampleScratch(batch, vocab, self.device)
        token_ids = sampling.sample(
            logits, rows, s.temperature, s.seed, s.position, s.last_token, torch.empty_like(rows), scratch, s.num_rows, kept
        )
        if work == Work.PENALISE and self.penalties is not None:
            penalties.count(token_ids, rows, self.penalties, s.num_rows)
        return token_ids

    def _send(self, values: np.ndarray) -> Tensor:
        return send(values, self.device)


def _mask(positions: np.ndarray, count: int) -> np.ndarray:
    """bool [count], True at these positions."""
    mask = np.zeros(count, bool)
    mask[positions] = True
    return mask
