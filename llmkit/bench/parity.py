"""Parity: does llmkit choose the tokens that transformers chooses, and where it does not, was it more than a near tie?

Greedy answers of both engines to the same prompts, each prompt alone and all in one batch. In float32 the answers alone are to be
equal. In bfloat16, products of other shapes round differently, so transformers differs from itself between batch sizes: that is
the noise to hold llmkit's differences against. At the first token that differs, transformers in float32 says how far the two
tokens are apart.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmkit.bench.contenders import CONTENDERS, Contender, Subject, Transformers, check_length
from llmkit.bench.measure import say
from llmkit.bench.report import Machine
from llmkit.errors import ConfigError, LlmkitError

Answers = list[list[int]]
Gap = Callable[[list[int], int, int], float]

OURS, NOISE = ("llmkit alone", "transformers alone"), ("transformers alone", "transformers batched")
PAIRS = (OURS, NOISE, ("llmkit alone", "llmkit batched"), ("llmkit batched", "transformers batched"))
LONGEST = 64  # tokens of a prompt


@dataclass(frozen=True)
class Difference:
    """Where two answers to a prompt (its number) part: the answer's tokens so far, then one's next token and the other's.
    gap: between their log-probabilities, by transformers in float32."""

    prompt: int
    shared: list[int]
    left: int
    right: int
    gap: float


@dataclass
class Comparison:
    """Answers of `output_len` tokens to `prompts` prompts, made in two ways: `left` and `right`, names as in PAIRS."""

    dtype: str
    left: str
    right: str
    prompts: int
    output_len: int
    differences: list[Difference] = field(default_factory=list)

    @property
    def between(self) -> tuple[str, str]:
        return self.left, self.right

    @property
    def figures(self) -> dict[str, float | None]:
        """rate: share of prompts whose answers differ. same: mean share of an answer before the first difference. Gaps: None
        without any difference."""
        gaps = [d.gap for d in self.differences]
        lost = sum(self.output_len - len(d.shared) for d in self.differences)
        return {
            "rate": len(gaps) / self.prompts,
            "same": 1 - lost / (self.prompts * self.output_len),
            "gap_median": statistics.median(gaps) if gaps else None,
            "gap_largest": max(gaps, default=None),
        }

    @property
    def cells(self) -> list[str]:
        """As a row of the table."""
        f = self.figures
        gaps = ["–" if f[name] is None else f"{f[name]:.5f}" for name in ("gap_median", "gap_largest")]
        return [self.dtype, " / ".join(self.between), f"{len(self.differences)} of {self.prompts}", f"{f['rate']:.1%}",
                f"{f['same']:.1%}", *gaps]  # fmt: skip


TITLES = ["dtype", "between", "differ", "rate", "same before", "gap median", "largest"]


# ---- measuring


def read_texts(count: int, file: str | None = None) -> list[str]:
    """The first `count` texts of ours, or lines of a file that are not empty. ConfigError when there are fewer."""
    from llmkit.bench.texts import TEXTS

    if file and not Path(file).is_file():
        raise ConfigError(f"--prompts {file}: there is no such file", "a text file with a prompt a line")
    lines = [line for line in Path(file).read_text("utf-8").splitlines() if line.strip()] if file else TEXTS
    if count > len(lines):
        raise ConfigError(f"there are {len(lines)} prompts, not {count}",
                          f"--num-prompts {len(lines)} or less, or --prompts FILE with as many lines")  # fmt: skip
    return list(lines[:count])


def encode(texts: Sequence[str], folder: Path) -> list[list[int]]:
    """Their tokens by the model's own tokenizer, at most LONGEST of each."""
    from llmkit.tokenizer import Tokenizer

    return [ids[:LONGEST] for ids in Tokenizer.from_folder(folder).encode_batch(texts)]


def measure_parity(subjects: Sequence[Subject], prompts: Sequence[list[int]], output_len: int) -> list[Comparison]:
    """All PAIRS for each subject: one model in several dtypes. Engines come in turn, each with the memory to itself."""
    with exact_float32():
        answers = [answers_of(s, prompts, output_len) for s in subjects]
        with reference(subjects[0]) as gap:
            return [compare(s.dtype_name, pair, said, prompts, gap) for s, said in zip(subjects, answers) for pair in PAIRS]


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 is multiplied as float32, not as TF32, which is torch's default too."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def answers_of(subject: Subject, prompts: Sequence[list[int]], output_len: int) -> dict[str, Answers]:
    """What each engine says: "llmkit alone", "llmkit batched", and the same for the others."""
    said: dict[str, Answers] = {}
    for name, make in CONTENDERS.items():
        say(f"{subject.dtype_name}: {name}")
        with closing(make(subject)) as contender:
            check_length([contender], max(map(len, prompts)) + output_len)
            said[f"{name} alone"] = [ask(contender, [p], output_len)[0] for p in prompts]
            said[f"{name} batched"] = ask(contender, prompts, output_len)
    return said


def ask(contender: Contender, prompts: Sequence[list[int]], output_len: int) -> Answers:
    """Greedy answers of exactly this many tokens; LlmkitError when there are others, for they would compare by accident."""
    answers = contender.generate(prompts, [output_len] * len(prompts))
    if {len(a) for a in answers} != {output_len}:
        raise LlmkitError(f"{contender.name} answered {sorted(map(len, answers))} tokens where {output_len} were asked for",
                          "this is a bug in llmkit.bench or in the engine")  # fmt: skip
    return answers


@contextmanager
def reference(subject: Subject) -> Iterator[Gap]:
    """(context, token, token) -> between their log-probabilities after this context, read at once by transformers in float32."""
    import torch

    say("float32: transformers, what the differences weigh")
    with closing(Transformers(replace(subject, dtype=torch.float32))) as judge:

        def gap(context: list[int], left: int, right: int) -> float:
            with torch.inference_mode():
                logits = judge.model(torch.tensor([context], device=subject.device)).logits[0, -1]
            return abs(float(logits[left] - logits[right]))  # the softmax's divisor is the same for both

        yield gap


def compare(dtype: str, pair: tuple[str, str], said: dict[str, Answers], prompts: Sequence[list[int]], gap: Gap) -> Comparison:
    """Where the answers of the two differ, and by how much."""
    left, right = (said[name] for name in pair)
    found = Comparison(dtype, *pair, len(prompts), len(left[0]))
    for i, (prompt, a, b) in enumerate(zip(prompts, left, right)):
        if a != b:
            n = next(n for n, (x, y) in enumerate(zip(a, b)) if x != y)
            found.differences.append(Difference(i, a[:n], a[n], b[n], gap(prompt + a[:n], a[n], b[n])))
    return found


# ---- what is shown


@dataclass
class ParityReport:
    """Everything of one run. options: the arguments in force."""

    model: str
    machine: Machine
    prompts: list[list[int]]
    comparisons: list[Comparison]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Difference]:
        """Where llmkit's float32 answers are not transformers'."""
        return [d for c in self.comparisons if c.dtype == "float32" and c.between == OURS for d in c.differences]

    @property
    def work(self) -> str:
        return f"{len(self.prompts)} prompts, {self.comparisons[0].output_len} tokens each"

    def text(self) -> str:
        """For the terminal."""
        lengths = sorted(map(len, self.prompts))
        return "\n".join([
            f"llmkit bench parity · {self.model} · {self.work}",
            str(self.machine),
            f"prompts of {lengths[0]} to {lengths[-1]} tokens; greedy, no end before the last token; transformers with its sdpa "
            "attention, batches padded on the left",
            "float32 is multiplied as float32: torch.backends.cuda.matmul.allow_tf32 = False",
            "", _table([TITLES, *(c.cells for c in self.comparisons)]), "",
            "gap: at the first difference, between the log-probabilities of the two tokens, by transformers in float32",
            *self._verdicts(),
        ])  # fmt: skip

    def _verdicts(self) -> list[str]:
        lines = []
        for ours, noise in (self.comparisons[i : i + 2] for i in range(0, len(self.comparisons), len(PAIRS))):
            if ours.dtype == "float32":
                lines += [] if ours.differences else ["float32: llmkit says what transformers says, token by token"]
                lines += [f"float32: prompt {d.prompt}, token {len(d.shared)}: llmkit {d.left}, transformers {d.right}, "
                          f"gap {d.gap:.7f}" for d in ours.differences]  # fmt: skip
            else:
                lines.append(f"{ours.dtype}: llmkit differs from transformers in {len(ours.differences)} of {ours.prompts}, "
                             f"transformers from itself in {len(noise.differences)}")  # fmt: skip
        return lines

    def markdown(self) -> str:
        """Rows for RESULTS.md."""
        versions = "llmkit {llmkit}, transformers {transformers}".format(**self.machine.versions)
        start = f"| {self.machine.date} | {self.machine.device} | parity: {self.model}"
        return "\n".join(f"{start} {c.dtype}, {self.work}, {' / '.join(c.between)}, {versions} | {_figure(c)} | – |"
                         for c in self.comparisons)  # fmt: skip

    def json(self) -> str:
        """Everything, each difference included."""
        comparisons = [asdict(c) | c.figures for c in self.comparisons]
        return json.dumps(asdict(self) | {"comparisons": comparisons, "allow_tf32": False}, indent=1)


def _figure(c: Comparison) -> str:
    return "; ".join(f"{title} {cell}" for title, cell in zip(TITLES[2:], c.cells[2:]) if cell != "–")


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = ([cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in aligned)
