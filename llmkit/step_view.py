"""One engine step, made visible: which requests ran, with which tokens, in which blocks."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.engine.engine import Engine, StepOutput
from llmkit.engine.request import Request
from llmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class SequenceView:
    """A sequence in a step. phase: "prefill" or "decode". computed: tokens in the KV cache before the step; new: computed by it.
    token: what was sampled, None while the prompt is not done."""

    request_id: str
    phase: str
    computed: int
    new: int
    block_table: list[int]
    input_text: str
    token: int | None
    token_text: str | None
    finish_reason: str | None


@dataclass(frozen=True)
class StepView:
    """A whole step. Prints as a table; in a notebook it is an HTML table."""

    step: int
    sequences: list[SequenceView]
    num_tokens: int
    token_budget: int
    free_blocks: int
    total_blocks: int
    waiting: int
    preempted: list[str]

    def __str__(self) -> str:
        head = (
            f"step {self.step}: {self.num_tokens}/{self.token_budget} tokens, {len(self.sequences)} sequences, "
            f"{self.waiting} waiting, {self.free_blocks}/{self.total_blocks} blocks free"
        )
        lines = [
            f"  {s.request_id:<8} {s.phase:<8} {s.computed:>5} +{s.new:<5} blocks {s.block_table} -> {s.token_text!r}"
            for s in self.sequences
        ]
        return "\n".join([head, *lines, *(f"  {r} was preempted" for r in self.preempted)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from html import escape

        names = ("request", "phase", "cached", "new", "block table", "input", "sampled")
        rows = [
            (s.request_id, s.phase, s.computed, s.new, " ".join(map(str, s.block_table)), repr(s.input_text), repr(s.token_text))
            for s in self.sequences
        ]
        cells = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        head = "".join(f"<th>{n}</th>" for n in names)
        caption = escape(str(self).splitlines()[0])
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"


def view_step(engine: Engine, output: StepOutput, tokenizer: Tokenizer) -> StepView:
    """Describe a step that has just run."""
    batch, sampled = output.batch, dict(zip(output.requests, output.token_ids.tolist()))
    sequences = [_view_sequence(engine, output, i, sampled, tokenizer) for i in range(len(batch.rows))]
    return StepView(
        step=engine.num_steps,
        sequences=sequences,
        num_tokens=batch.num_tokens,
        token_budget=engine.scheduler.token_budget,
        free_blocks=engine.pool.num_free,
        total_blocks=engine.pool.num_usable,
        waiting=engine.scheduler.num_waiting,
        preempted=[r.id for r in output.schedule.preempted],
    )


def _view_sequence(
    engine: Engine, output: StepOutput, i: int, sampled: dict[Request, int], tokenizer: Tokenizer
) -> SequenceView:
    batch, request = output.batch, output.schedule.owners[i]
    new, context = int(batch.num_new[i]), int(batch.context_lens[i])
    token = sampled.get(request)
    begin = int(batch.cu_seqlens[i])
    return SequenceView(
        request_id=request.id,
        phase="decode" if context > len(request.prompt) else "prefill",
        computed=context - new,
        new=new,
        block_table=batch.block_tables[i, : -(-context // engine.pool.block_size)].tolist(),
        input_text=tokenizer.decode(batch.input_ids[begin : begin + new].tolist(), skip_special_tokens=False),
        token=token,
        token_text=None if token is None else tokenizer.token_text(token),
        finish_reason=request.finish_reason,
    )
