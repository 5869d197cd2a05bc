"""The runner on a GPU with our kernels: decode steps as graphs, with the next tokens drawn inside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from llmkit_kernels.launch import compile_ahead
from torch import Tensor

from llmkit.attention.fixed import FixedBackend
from llmkit.attention.flash import FlashBackend
from llmkit.attention.triton import TritonBackend
from llmkit.engine import prompt_graphs
from llmkit.engine.batch import Batch
from llmkit.engine.drawing import Drawing, Work
from llmkit.engine.graphs import DecodeGraphs, DeviceRows
from llmkit.engine.memory import LITTLE, graph_tokens
from llmkit.engine.prompt_graphs import PromptGraphs
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.engine.runner import Runner, StepResult
from llmkit.engine.sampler import SampledTokens, TopLogprobs, compute_top, places
from llmkit.engine.scheduler import Schedule
from llmkit.models.decoder import Decoder
from llmkit.models.fixed import FixedForward
from llmkit.models.fused import FusedForward


class _OnTheWay(SampledTokens):
    """Tokens that are being copied to the host while the device goes on; the next step may overwrite their place there.

    top: what `compute_top` gave of the rows at `asked`; as `logprobs` once the tokens are on the host.
    """

    def __init__(self, token_ids: Tensor, top: tuple[Tensor, ...], asked: np.ndarray) -> None:
        super().__init__(token_ids, None)
        self._asked = asked
        self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (token_ids, *top)]
        for host, there in zip(self._host, (token_ids, *top)):
            host.copy_(there, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def to_host(self) -> np.ndarray:
        self._arrived.synchronize()
        token_ids, *top = (t.numpy() for t in self._host)
        if top:
            self.logprobs = TopLogprobs(*top, where=places(self._asked, len(token_ids)))
        return token_ids


class CudaRunner(Runner):
    """A `Runner` whose steps are replayed graphs: those of decodes alone, and those with prompts that are not too large. Others
    take the eager road, on the same rows."""

    def __init__(self, model: Decoder, rows: Rows, num_blocks: int, max_tokens: int, enforce_eager: bool = False) -> None:
        self.enforce_eager = enforce_eager
        embedding = model.embedding.weight
        # of whichever graph ran last; made once, for when rows are attached again memory may be short
        self._logits = torch.empty(len(rows.requests), model.config.vocab_size, dtype=torch.float32, device=model.device)
        self._graph_tokens = graph_tokens(model.weight_bytes)
        self._hidden = None if enforce_eager else embedding.new_empty(self._graph_tokens, embedding.shape[1])
        super().__init__(model, rows, num_blocks, max_tokens)
        self.passes = self.fused = FixedForward(model) if isinstance(self.backend, FixedBackend) else FusedForward(model)
        self._replays_prompts = not isinstance(self.backend, FlashBackend)  # which computes prompts itself

    def attach(self, rows: Rows) -> None:
        super().attach(rows)
        backend, count = self.backend, len(rows.requests)
        assert isinstance(backend, TritonBackend)  # or `create_runner` would have made a plain runner
        self.decoding = backend
        self.state = DeviceRows(count, rows.block_table.shape[1], self.device)
        self.last_token = self.state.last_token
        self.drawing = Drawing(self.state, rows, self.sampling)
        self.graphs = DecodeGraphs(self._decode, self.state, count, self.enforce_eager, self._compile)
        self.prompts = PromptGraphs(lambda ids, step: self.fused.forward(ids, step), backend, self.state, self._hidden)
        self._compiled: set[prompt_graphs.Size | None] = set()  # sizes of steps with prompts; None: larger ones

    @property
    def mixed_tokens(self) -> int | None:
        """As `Runner.mixed_tokens`: what is replayed and as short as pays, measured on an H100. Who waits for a big model to read
        its weights may as well compute these tokens; a small one's products want four times as many to be quick."""
        tokens = self._graph_tokens
        return None if not self._replays_prompts else tokens // 2 if self.model.weight_bytes > LITTLE else tokens

    @torch.inference_mode()
    def run(self, batch: Batch, schedule: Schedule) -> StepResult:
        """As `Runner.run`."""
        if batch.num_decodes < len(batch.rows):
            return super().run(batch, schedule)
        self._copy_blocks(schedule)
        self._load_rows(schedule)
        self._send_tables()
        token_ids, logits = self.graphs.run(batch.rows, self.drawing.work(batch.rows))
        return StepResult(self._finish(token_ids, logits, batch.rows), [])

    def _loads_later(self, batch: Batch, schedule: Schedule) -> bool:
        """As `Runner._loads_later`: a first token waits for the host. Not where somebody new decodes, whose token the pass looks
        up, nor where compiling asks how tokens will be drawn."""
        new = {r.row for r in schedule.admitted}
        return self._size(batch) in self._compiled and new.isdisjoint(batch.rows[: batch.num_decodes].tolist())

    def _size(self, batch: Batch) -> prompt_graphs.Size | None:
        return prompt_graphs.size_of(batch, self._graph_tokens) if self._replays_prompts else None

    def _forward(self, batch: Batch) -> Tensor:
        """As `Runner._forward`."""
        size = self._size(batch)
        if size:
            self._send_tables()
            self.prompts.load(batch, size)
        if size not in self._compiled:
            self._compiled.add(size)
            self._compile(lambda: self._use_kernels(batch, size))
        return self.prompts.run(size)[: batch.num_tokens] if size else super()._forward(batch)

    def _use_kernels(self, batch: Batch, size: prompt_graphs.Size | None) -> None:
        """All that a step with prompts uses, of which nothing is kept."""
        hidden = self.prompts.compute(size) if size else super()._forward(batch)
        if count := len(batch.sampled):
            nobody = torch.full((count,), self.state.num_rows, device=self.device)
            self.drawing.draw(self.fused.logits(hidden[:count]), nobody, self.drawing.work(batch.rows[batch.sampled]))

    def _compile(self, body: Callable[[], object]) -> None:
        with self.fused.one_layer_of_each_kind():
            compile_ahead(body)

    def _clear(self, schedule: Schedule) -> None:
        """Not needed: our kernels keep no number that reaches through a mask, see `rope_cache`."""

    def _begin(self, requests: list[Request]) -> None:
        """As `Runner._begin`; how their tokens are drawn, too."""
        self.drawing.load(requests)

    def _send_tables(self) -> None:
        if self.rows.grown:
            rows = np.fromiter(self.rows.grown, np.int64, len(self.rows.grown))
            self.rows.grown.clear()
            self.state.update_tables(rows, self.rows.block_table[rows])

    def _decode(self, rows: Tensor, work: Work) -> tuple[Tensor, Tensor]:
        """The body of a graph: one token of each row."""
        state = self.state
        step = self.decoding.prepare_decode(state.position, state.block_table, rows)
        logits = self.fused.decode(state.last_token, rows, step, self._logits[: len(rows)])
        return self.drawing.draw(logits, rows, work), logits

    def _choose(self, logits: Tensor, batch: Batch) -> SampledTokens:
        rows = batch.rows[batch.sampled]
        return self._finish(self.drawing.draw(logits, self._index(rows), self.drawing.work(rows)), logits, rows)

    def steps_ahead(self, batch: Batch) -> int:
        """As `Runner.steps_ahead`: one where the device chooses the tokens by itself, and more where the host, held up for a
        moment, would be late. Two where steps are short: of a small model where nobody reads along (for whoever comes next waits
        for one more), and after decodes that read little. Four where nobody reads along, and each will go on to an end that is
        known: no token of theirs is computed for nothing."""
        rows, weights = batch.rows, self.model.weight_bytes
        if self.drawing.by_torch(rows[batch.sampled]).size:
            return 0
        if not self.rows.read_along[rows].any():
            if batch.num_tokens <= self._graph_tokens and not self.rows.may_stop[rows].any():
                return 4
            return 2 if weights < LITTLE else 1
        if batch.num_decodes < len(rows):
            return 1
        keys = int(batch.context_lens.sum()) * self.model.config.kv_bytes_per_token * self.kv_cache.element_size()
        return 2 if weights + keys < LITTLE else 1

    def _finish(self, token_ids: Tensor, logits: Tensor, rows: np.ndarray) -> SampledTokens:
        """Draw again, in torch, for the rows that ask for more than the device knows; and the log-probabilities, of logits that
        nobody edited."""
        unusual = self.drawing.by_torch(rows)
        if unusual.size:
            at = self._index(unusual)
            drawn = self.sampler.choose(logits[at], rows[unusual], self.history)
            token_ids = token_ids.index_copy(0, at, drawn)
            self.last_token[self._index(rows[unusual])] = drawn.clamp_min(0)
        asked = self.sampling.using("logprobs", rows)
        if not asked.size:
            return _OnTheWay(token_ids, (), asked)
        at = slice(None) if asked.size == len(rows) else self._index(asked)
        return _OnTheWay(token_ids, compute_top(logits[at], token_ids[at], self.sampling.most_logprobs(rows[asked])), asked)
