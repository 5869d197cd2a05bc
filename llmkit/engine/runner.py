"""Runs a batch on the device: copy in, forward, sample."""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from llmkit_kernels.reference import as_bytes

from llmkit import ops
from llmkit.attention import create_backend
from llmkit.engine.batch import Batch
from llmkit.engine.memory import GiB
from llmkit.engine.pooling import Pooled, pool
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.engine.sampler import History, SampledTokens, Sampler, SamplingRows, TopLogprobs, top_logprobs
from llmkit.engine.scheduler import Schedule
from llmkit.errors import OutOfMemoryError
from llmkit.models.decoder import Decoder
from llmkit.transfer import fill, send

_LOGIT_ROWS = 256  # prompt logprobs: logits of at most so many positions at a time


@dataclass
class StepResult:
    """sampled: one token for each of batch.sampled, None when there are none. prompt_logprobs: (request, its next positions).
    pooled: embeddings that are complete."""

    sampled: SampledTokens | None
    prompt_logprobs: list[tuple[Request, TopLogprobs]]
    pooled: Pooled | None = None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, for masked reads must never meet a NaN. On a CPU the system's own: a page of the cache costs nothing until it is
    used, where torch would write all of it (17 s for 4 GiB on two busy cores)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = _untouched(size)
    except OSError as e:
        hint = "lower kv_cache_memory, num_kv_blocks or max_model_len"
        raise OutOfMemoryError(f"there is no room for a KV cache of {size / GiB:,.1f} GiB: {e.strerror}", hint) from e
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _untouched(size: int) -> mmap.mmap:
    """Memory that reads as zeros, in small pages: a block lies in twice as many places as there are layers, and with large pages
    the first one had 120 MB cleared for it, which took 6 to 180 ms of the first token's time."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # of a kernel that has no large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class Passes(Protocol):
    """What computes a step: a decoder, or what runs it with fewer kernels."""

    def forward(self, input_ids: torch.Tensor, step: Any) -> torch.Tensor:
        """input_ids int64 [T] -> hidden states [T, hidden]; writes the step's keys and values."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] -> float32 [R, vocab]."""
        ...


class Runner:
    """Owns the KV cache and the buffers whose addresses never change, so that a captured graph can replay over them.

    kv_cache: [layers, 2, num_blocks, G, block_size, D], of the model's kv_dtype. input_ids, positions, slot_mapping: int64
    [max_tokens].
    last_token: int64 [rows], the newest token of each row; it is written by the sampler on the device and read by the next
    step there, so that decoding never waits for the host.

    mixed_tokens: how many tokens a step with prompts should have where others decode in it; None: as many as are allowed.
    """

    mixed_tokens: int | None = None

    def __init__(self, model: Decoder, rows: Rows, num_blocks: int, max_tokens: int) -> None:
        c, device = model.config, model.device
        self.model, self.device = model, device
        self.passes: Passes = model
        shape = (c.num_layers, 2, num_blocks, c.num_kv_heads, rows.block_size, c.head_dim)
        self.kv_cache = _zeros(shape, model.kv_dtype, device)
        self._blocks = as_bytes(self.kv_cache)  # to clear and to copy
        self.backend = create_backend(self.kv_cache, model.rotary, c.num_heads, set(c.windows), model.attention)
        self.input_ids, self.positions, self.slot_mapping = torch.zeros(3, max_tokens, dtype=torch.int64, device=device).unbind(0)
        self.last_token = torch.zeros(len(rows.requests), dtype=torch.int64, device=device)
        self.attach(rows)

    def attach(self, rows: Rows) -> None:
        """Serve these rows, with no sampling parameters yet."""
        self.rows = rows
        self.sampling = SamplingRows(len(rows.requests), self.model.config.vocab_size, self.device)
        self.sampler = Sampler(self.sampling)
        self.history = History(rows.token_ids, rows.num_prompt, rows.num_tokens)

    @torch.inference_mode()
    def run(self, batch: Batch, schedule: Schedule) -> StepResult:
        """Compute the step's tokens and choose the next ones."""
        self._clear(schedule)
        self._copy_blocks(schedule)
        later = self._loads_later(batch, schedule)
        if not later:
            self._load_rows(schedule)
        hidden = self._forward(batch)
        if later:
            self._load_rows(schedule)
        asked, sampled = self._prompt_logprobs(batch, hidden), None
        if batch.sampled.size:
            sampled = self._choose(self.passes.logits(hidden[self._index(batch.last_tokens)]), batch)
        return StepResult(sampled, asked, pool(batch, hidden, self.rows))

    def _choose(self, logits: torch.Tensor, batch: Batch) -> SampledTokens:
        """One token for each of batch.sampled from float32 [R, V]."""
        rows = batch.rows[batch.sampled]
        sampled = self.sampler(logits, rows, self.history)
        self.last_token[self._index(rows)] = sampled.token_ids
        return sampled

    def steps_ahead(self, batch: Batch) -> int:
        """How many steps may be launched after this one before its tokens are on the host. The batch alone decides, never the
        clock: who is in a step, and so how its numbers are rounded, must not differ from run to run."""
        return 0

    def _index(self, indices: np.ndarray) -> torch.Tensor:
        return send(indices, self.device)

    def _clear(self, schedule: Schedule) -> None:
        """Fill blocks with zeros for their new owners: 0 · NaN is NaN, so what others left there is never quite masked."""
        if self.device.type == "cpu":  # where an index takes five times as long or more; on a GPU each block would be a launch
            for block in schedule.fresh:
                self._blocks[:, :, block].zero_()
        elif schedule.fresh:
            self._blocks[:, :, self._index(np.array(schedule.fresh))] = 0
        schedule.fresh.clear()

    def _copy_blocks(self, schedule: Schedule) -> None:
        """What is left in `copies` afterwards was not made, should the step fail."""
        if schedule.copies:
            source, target = self._index(np.array(schedule.copies)).unbind(1)
            self._blocks[:, :, target] = self._blocks[:, :, source]
            schedule.copies.clear()

    def _loads_later(self, batch: Batch, schedule: Schedule) -> bool:
        """Whether `_load_rows` may come after the pass, while the device computes it."""
        return False

    def _load_rows(self, schedule: Schedule) -> None:
        """Unload rows that were given back; load what new ones need."""
        while self.rows.released:
            self.sampling.clear(self.rows.released.pop())
        if not schedule.admitted:
            return
        for request in schedule.admitted:
            self.sampling.set(request.row, request.params, seed=request.seed, stop_ids=request.stop_ids,
                              bad_words=request.bad_words, grammar=request.grammar)  # fmt: skip
        self._begin(schedule.admitted)

    def _begin(self, requests: list[Request]) -> None:
        """What the device must know of requests whose rows are new: here, their newest token."""
        rows = np.array([r.row for r in requests])
        newest = self.rows.token_ids[rows, self.rows.num_tokens[rows] - 1].astype(np.int64)
        self.last_token[self._index(rows)] = self._index(newest)

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, hidden]."""
        t, decodes = batch.num_tokens, batch.num_decodes
        fill(self.input_ids[:t], batch.input_ids)
        fill(self.positions[:t], batch.positions)
        fill(self.slot_mapping[:t], batch.slot_mapping)
        if decodes:
            self.input_ids[:decodes] = self.last_token[self._index(batch.rows[:decodes])]
        step = self.backend.prepare(batch, self.positions[:t], self.slot_mapping[:t])
        return self.passes.forward(self.input_ids[:t], step)

    def _prompt_logprobs(self, batch: Batch, hidden: torch.Tensor) -> list[tuple[Request, TopLogprobs]]:
        """For the requests that asked: position i of a prompt says how likely its token i+1 was."""
        found: list[tuple[Request, TopLogprobs]] = []
        for i, row in enumerate(batch.rows):
            request = self.rows.requests[row]
            if request is None or request.params.prompt_logprobs is None:
                continue
            start, end = int(batch.context_lens[i] - batch.num_new[i]), int(batch.context_lens[i])
            offset = int(batch.cu_seqlens[i]) - start
            first = max(start, len(request.prompt_logprobs) - 1)  # after a preemption some are known already
            for lo in range(first, min(end, len(request.prompt) - 1), _LOGIT_ROWS):
                hi = min(lo + _LOGIT_ROWS, end, len(request.prompt) - 1)
                targets = self._index(request.prompt[lo + 1 : hi + 1].astype(np.int64))
                logits = self.passes.logits(hidden[offset + lo : offset + hi])
                found.append((request, top_logprobs(logits, targets, request.params.prompt_logprobs)))
        return found


def create_runner(model: Decoder, rows: Rows, num_blocks: int, max_tokens: int, enforce_eager: bool = False) -> Runner:
    """The quickest runner for the model's device: graphs of our kernels on a GPU, else plain torch."""
    in_torch = model.attention is not None and model.attention.name == "torch"
    if ops.has_kernels(model.device, model.dtype) and not in_torch:
        from llmkit.engine.cuda_runner import CudaRunner
        from llmkit.models.fused import FusedForward

        if FusedForward.supports(model):
            return CudaRunner(model, rows, num_blocks, max_tokens, enforce_eager)
    return Runner(model, rows, num_blocks, max_tokens)
