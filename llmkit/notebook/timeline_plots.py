"""Figures of what a device did and when (`llmkit.Timeline`), and of what CUDA graphs cost and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from llmkit.kernel_names import FAMILIES, family, short_name
from llmkit.notebook.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, RED, SKY, canvas
from llmkit.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[str, str] = dict(zip(FAMILIES, (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)))
PIXELS = 640  # of a strip, fewer than on a screen, so that none is left out; what lies closer is mixed


def plot_timeline(ax: Axes, timeline: Timeline, ms: float | None = None, title: str | None = None) -> None:
    """The first `ms` milliseconds (default: all) as one strip."""
    plot_timelines(ax, {"": timeline}, ms, title or timeline.title)


def plot_timelines(ax: Axes, timelines: Mapping[str, Timeline], ms: float | None = None, title: str = "") -> None:
    """A strip each, on one clock: colour where a kernel runs, nothing where none does; a tick where a step ends. ms: default is
    the shortest of them."""
    until = 1e3 * ms if ms else min(t.wall for t in timelines.values())
    rows = [(name, t, coverage(t, until)) for name, t in timelines.items()]
    for y, (_, t, shares) in enumerate(rows):
        ax.imshow(_colours(shares), extent=(0, until / 1e3, y + 0.3, y - 0.3), aspect="auto", interpolation="none")
        ends = [s.end / 1e3 for s in t.steps if s.end <= until]
        ax.vlines(ends, y - 0.42, y - 0.33, color=INK, linewidth=1)
    ax.set(xlim=(0, until / 1e3), ylim=(len(rows) - 0.45, -0.5), xlabel="ms; a tick above a strip: a step ends there")
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    seen = [name for i, name in enumerate(FAMILIES) if any(shares[i].any() for *_, shares in rows)]
    ax.legend(handles=[Patch(color=COLOURS[name], label=name) for name in seen], **_legend(len(seen)))
    _title(ax, title, pad=30)


def coverage(timeline: Timeline, until: float, pixels: int = PIXELS) -> np.ndarray:
    """float64 [families, pixels]: the share of each pixel's time, of [0, until) µs, that each family of kernels takes."""
    shares = np.zeros((len(FAMILIES), pixels))
    for span, own, _ in timeline.without_overlap():
        start = (span.end - own) / until * pixels
        end = min(span.end / until * pixels, pixels)
        if start >= end:
            continue
        edges = np.arange(int(start), int(np.ceil(end)) + 1).clip(start, end)
        row = FAMILIES.index(family(short_name(span.name)))
        shares[row, int(start) : int(start) + len(edges) - 1] += np.diff(edges)
    return shares.clip(0, 1)


def _colours(shares: np.ndarray) -> np.ndarray:
    """One row of pixels, RGBA: the families' colours in their shares, and as opaque as the pixel is full."""
    full = shares.sum(0)
    colours = np.array([to_rgb(COLOURS[name]) for name in FAMILIES])
    mixed = shares.T @ colours / np.maximum(full, 1e-12)[:, None]
    return np.round(np.concatenate([mixed, full[:, None]], 1).clip(0, 1)[None], 3)


def timeline_svg(timeline: Timeline) -> str:
    """A picture of the first four steps, or of all if there are fewer, as SVG."""
    import io

    few = timeline.steps[:4]
    with plt.ioff():
        ax = canvas(height=1.5)
        plot_timeline(ax, timeline, (few[-1].end - few[0].start) / 1e3 if few else None)
        out = io.StringIO()
        ax.figure.savefig(out, format="svg", facecolor=ax.figure.get_facecolor())
        plt.close(ax.figure)
    return out.getvalue()


def plot_padding(ax: Axes, sizes: Sequence[int], most: int) -> None:
    """For each batch of up to `most` requests, the rows that are computed; above the diagonal they are padding."""
    rows = [*(s for s in sizes if s < most), next(s for s in sizes if s >= most)]
    ax.stairs(rows, [0, *rows], fill=True, color=ORANGE, label="padding")
    ax.fill_between([0, rows[-1]], 0, [0, rows[-1]], color=SKY, linewidth=0, label="requests")
    ax.set(xlim=(0, most), ylim=(0, rows[-1]), xlabel="requests in the batch", ylabel="rows computed")
    ax.legend(**_legend(2))
    _title(ax, "A batch is padded to the next size that has a graph", pad=30)


def plot_payback(ax: Axes, capture_ms: float, eager_ms: float, graph_ms: float) -> None:
    """What the first steps take in all, launched one by one and replayed; replaying begins with the capture."""
    meet = capture_ms / (eager_ms - graph_ms) if eager_ms > graph_ms else 100.0
    steps = max(8, 3 * int(np.ceil(meet)))
    ax.plot([0, steps], [0, steps * eager_ms], color=GREY, label="launched one by one")
    ax.plot([0, steps], [capture_ms, capture_ms + steps * graph_ms], color=BLUE, label="captured once, then replayed")
    if eager_ms > graph_ms:
        ax.plot([meet], [meet * eager_ms], color=INK, marker="o", markersize=5)
        ax.annotate(f"paid back after {int(np.ceil(meet))} steps", (meet, meet * eager_ms), (9, -11),
                    textcoords="offset points", color=INK, size=9)  # fmt: skip
    ax.set(xlim=(0, steps), ylim=(0, None), xlabel="decode steps", ylabel="ms in all")
    ax.grid(color=PALE)
    ax.set_axisbelow(True)
    ax.legend(**_legend(2))
    _title(ax, "What a graph costs, and when it has paid for itself", pad=30)


def _title(ax: Axes, text: str, pad: float) -> None:
    ax.set_title(text, loc="left", pad=pad, color=INK, size=11, weight="bold")


def _legend(columns: int) -> dict[str, Any]:
    """Between the title and the drawing."""
    return {"ncols": columns, "loc": "lower left", "bbox_to_anchor": (0, 0.98), "borderaxespad": 0, "borderpad": 0.3,
            "frameon": False, "handlelength": 1, "columnspacing": 1.4, "labelcolor": INK, "fontsize": 9}  # fmt: skip
