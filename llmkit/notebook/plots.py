"""Figures of the course. Each function draws one idea on the axes it is given and returns nothing.

`canvas` makes the axes: a light card with dark text, so that a figure reads the same on a light and on a dark page. Colours are
Okabe and Ito's, which colour-blind readers tell apart; every colour is named again in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llmkit.engine.memory import MemoryPlan
    from llmkit.outputs import CompletionOutput
    from llmkit.step_view import StepView

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY, PALE = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8f98", "#e3e6ea",
)  # fmt: skip
INK, CARD = "#24292f", "#fbfbfa"
GiB = 1 << 30


def canvas(columns: int = 1, height: float = 2.4, width: float = 8.6, **options: Any) -> Any:
    """Axes side by side on one card: one Axes, or an array of them. height, width: inches. options: of plt.subplots."""
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches between the card's edge and the drawing
    axes = plt.subplots(1, columns, figsize=(width, height), layout=layout, facecolor=CARD, **options)[1]
    for ax in np.ravel(axes):
        ax.set_facecolor(CARD)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[:].set_color(GREY)
        ax.tick_params(colors=INK, labelsize=9)
        ax.xaxis.label.set(color=INK, size=9)
        ax.yaxis.label.set(color=INK, size=9)
    return axes


def _title(ax: Axes, text: str, pad: float = 10) -> None:
    ax.set_title(text, loc="left", pad=pad, color=INK, size=11, weight="bold")


def plot_rates(ax: Axes, rates: Mapping[str, float], title: str, strong: str = "") -> None:
    """A horizontal bar a rate (tokens/s), with its number; bars whose name begins with `strong` are dark, by default the best."""
    names, values = list(rates), list(rates.values())
    dark = [name.startswith(strong) if strong else value == max(values) for name, value in rates.items()]
    bars = ax.barh(names, values, height=0.62, color=[BLUE if d else SKY for d in dark])
    ax.bar_label(bars, labels=[f"{v:,.0f} tokens/s" for v in values], padding=5, color=INK, size=9)
    _bare(ax)
    _title(ax, title)
    ax.set_xlim(0, max(values) * 1.22)
    ax.invert_yaxis()


def plot_stages(ax: Axes, stages: Mapping[str, float]) -> None:
    """What a start took, as one bar: a part a stage, in the order they ended; the names stand in the legend, in seconds."""
    colours, left = [BLUE, ORANGE, GREEN, SKY, PURPLE, RED, GREY], 0.0
    shown = {name: s for name, s in stages.items() if name != "until ready" and s >= 0.05}
    for (name, seconds), colour in zip(shown.items(), colours):
        ax.barh([0], [seconds], left=left, height=0.5, color=colour, edgecolor=CARD, label=f"{name} {seconds:.1f}")
        left += seconds
    ax.set(yticks=[], xlim=(0, left), ylim=(-0.3, 0.3), xlabel="seconds")
    ax.spines["left"].set_visible(False)
    _title(ax, "What the start took", pad=30)
    ax.legend(ncols=len(shown), loc="lower left", bbox_to_anchor=(0, 0.98), borderaxespad=0, borderpad=0.3, frameon=False,
              handlelength=1, columnspacing=1.4, labelcolor=INK, fontsize=9)  # fmt: skip


def plot_memory_plan(ax: Axes, plan: MemoryPlan) -> None:
    """The device's memory as one stacked bar; what is in each part stands in the legend, in GiB."""
    colours = {"other processes": GREY, "weights": BLUE, "activations": ORANGE, "KV cache": GREEN, "free": PALE}
    left = 0.0
    for name, size in plan.parts().items():
        ax.barh([0], [size / GiB], left=left, height=0.5, color=colours.get(name, PURPLE), edgecolor=CARD,
                label=f"{name} {size / GiB:.1f}")  # fmt: skip
        left += size / GiB
    ax.set(yticks=[], xlim=(0, left), ylim=(-0.3, 0.3), xlabel="GiB")
    _title(ax, f"Where the memory goes ({plan.device})", pad=30)
    ax.spines["left"].set_visible(False)
    ax.legend(ncols=len(plan.parts()), loc="lower left", bbox_to_anchor=(0, 0.98), borderaxespad=0, borderpad=0.3, frameon=False,
              handlelength=1, columnspacing=1.4, labelcolor=INK, fontsize=9)  # fmt: skip


def plot_capacity(ax: Axes, plan: MemoryPlan) -> None:
    """How many requests of a length hold all their keys and values at once. Both axes are logarithmic."""
    lengths = [n for n in (2**i for i in range(5, 25)) if n < plan.max_model_len] + [plan.max_model_len]
    fits = [requests_that_fit(plan, n) for n in lengths]
    ax.loglog(lengths, fits, color=GREEN, marker="o", markersize=4, base=2)
    ax.axhline(plan.max_num_seqs, color=GREY, linestyle="--", linewidth=1)
    ax.text(lengths[-1], plan.max_num_seqs * 1.25, f"a step takes {plan.max_num_seqs} at most", ha="right", color=INK, size=9)
    for i, offset, side in ((0, (6, 4), "left"), (-1, (-8, -9), "right")):
        ax.annotate(f"{fits[i]:,} of {lengths[i]:,} tokens", (lengths[i], fits[i]), offset, textcoords="offset points", ha=side,
                    color=INK, size=9)  # fmt: skip
    ax.set(xticks=lengths, xticklabels=[f"{n:,}" for n in lengths], xlabel="tokens a request (prompt + answer)")
    ax.set(ylabel="requests at once")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.margins(y=0.18)
    ax.minorticks_off()
    _title(ax, f"How many requests fit: {plan.kv_tokens:,} tokens, in blocks of {plan.block_size}")


def requests_that_fit(plan: MemoryPlan, length: int) -> int:
    """Requests of `length` tokens whose blocks fit together; a block belongs to one request, so a started one counts whole."""
    return (plan.num_blocks - 1) // -(-length // plan.block_size)


def plot_alternatives(axes: Sequence[Axes], answer: CompletionOutput) -> None:
    """For the first tokens of an answer made with logprobs=k, one on each of `axes`: the candidates and their probabilities."""
    from math import exp

    for number, (ax, token, candidates) in enumerate(zip(axes, answer.token_ids, answer.logprobs or ()), 1):
        ranked = sorted(candidates.items(), key=lambda item: -item[1].logprob)
        values = [exp(c.logprob) for _, c in ranked]
        bars = ax.barh(range(len(ranked)), values, height=0.7, color=[BLUE if i == token else PALE for i, _ in ranked])
        ax.bar_label(bars, labels=[f"{100 * v:.0f} %" for v in values], padding=4, color=INK, size=9)
        ax.set_yticks(range(len(ranked)), [repr(c.decoded_token) for _, c in ranked], family="monospace")
        _bare(ax)
        _title(ax, f"token {number}")
        ax.set_xlim(0, 1.3)
        ax.invert_yaxis()


def plot_arrivals(ax: Axes, seconds: Sequence[float], pieces: Sequence[str]) -> None:
    """When each piece of a streamed answer came, in milliseconds since the question."""
    ms = [1000 * s for s in seconds]
    ax.vlines(ms, 0, 1, color=SKY, linewidth=2)
    ax.vlines(ms[:1], 0, 1, color=RED, linewidth=3)
    ax.text(ms[0], 1.12, f"first token: {pieces[0].strip()!r}", color=RED, size=9)
    ax.set(yticks=[], xlim=(0, ms[-1] * 1.02), ylim=(0, 1), xlabel="ms since the question")
    ax.spines["left"].set_visible(False)
    _title(ax, "When each token came", pad=22)


def plot_waterfall(ax: Axes, requests: Mapping[str, Sequence[float]]) -> None:
    """A row a request: when it was sent, when its tokens came. Each value: seconds, the sending first, then one a token."""
    for y, (sent, *tokens) in enumerate(requests.values()):
        ax.barh([y], [tokens[0] - sent], left=sent, height=0.55, color=PALE, label="waiting for the first token")
        ax.barh([y], [tokens[-1] - tokens[0]], left=tokens[0], height=0.55, color=SKY, label="answering")
        ax.vlines(tokens, y - 0.275, y + 0.275, color=BLUE, linewidth=0.6, label="a token")
    ax.set(yticks=range(len(requests)), yticklabels=list(requests), xlabel="seconds since the first was sent")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, None)
    ax.invert_yaxis()
    _title(ax, "When each request was sent, and when its tokens came", pad=30)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.legend(handles.values(), handles.keys(), ncols=3, loc="lower left", bbox_to_anchor=(0, 0.98), borderaxespad=0,
              borderpad=0.3, frameon=False, handlelength=1, columnspacing=1.4, labelcolor=INK, fontsize=9)  # fmt: skip


def plot_steps(ax: Axes, steps: Sequence[StepView]) -> None:
    """Requests down, engine steps across: what each request computed in each step. Prompts are dark, single new tokens light."""
    names = list(dict.fromkeys(s.request_id for view in steps for s in view.sequences))
    colours = {"prefill": BLUE, "decode": ORANGE}
    for x, view in enumerate(steps):
        for s in view.sequences:
            y = names.index(s.request_id)
            ax.barh([y], [0.92], left=x + 0.04, height=0.6, color=colours[s.phase])
            text = f"{s.phase}\n{s.new} token{'s' * (s.new > 1)}"
            ax.text(x + 0.5, y, text, ha="center", va="center", size=9, color="white" if s.phase == "prefill" else INK)
    ax.set(xticks=[x + 0.5 for x in range(len(steps))], xticklabels=[f"step {x + 1}" for x in range(len(steps))],
           yticks=range(len(names)), yticklabels=[f"request {chr(65 + y)}" for y in range(len(names))])  # fmt: skip
    _bare(ax, keep_x=True)
    _title(ax, "Who computes what in each step")
    ax.set_ylim(len(names) - 0.5, -0.5)


def _bare(ax: Axes, keep_x: bool = False) -> None:
    """No frame and no ticks: the numbers stand in the bars."""
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    if not keep_x:
        ax.set_xticks([])
