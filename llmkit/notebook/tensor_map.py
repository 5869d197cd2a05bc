"""A map of a model's weights: every tensor a patch as large as its bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmkit.notebook.plots import BLUE, CARD, GREEN, GREY, INK, ORANGE, PURPLE, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {  # kind -> (what its tensors' names contain, colour); the first that fits
    "embedding": (r"embed|wte|lm_head|output\.weight", PURPLE),
    "norm": (r"norm|ln_", INK),
    "attention: query, output": (r"q_proj|o_proj|qkv", BLUE),
    "attention: key, value": (r"k_proj|v_proj", SKY),
    "feed-forward: gate, up": (r"gate|up_proj", ORANGE),
    "feed-forward: down": (r"down_proj", GREEN),
    "other": (r"", GREY),
}


def kind_of(name: str) -> str:
    """What a tensor of this name does."""
    return next(kind for kind, (pattern, _) in KINDS.items() if re.search(pattern, name))


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to; None outside the layers."""
    number = re.search(r"\blayers\.(\d+)\.", name)
    return int(number[1]) if number else None


def bytes_by_kind(sizes: Mapping[str, int]) -> dict[str, int]:
    """Tensor name -> bytes, added up by kind; kinds in the order of the map."""
    totals = dict.fromkeys(KINDS, 0)
    for name, size in sizes.items():
        totals[kind_of(name)] += size
    return {kind: size for kind, size in totals.items() if size}


def plot_tensor_map(ax: Axes, sizes: Mapping[str, int]) -> None:
    """Tensor name -> bytes, drawn: one column a layer, as wide as its share of the model; patches within it by kind."""
    from matplotlib.collections import PolyCollection

    columns: dict[int | None, dict[str, int]] = {}
    for name in sorted(sizes, key=lambda n: (layer_of(n) is not None, layer_of(n) or 0)):
        column = columns.setdefault(layer_of(name), dict.fromkeys(KINDS, 0))
        column[kind_of(name)] += sizes[name]
    patches: dict[str, list[list[tuple[float, float]]]] = {kind: [] for kind in KINDS}
    left, total = 0.0, sum(sizes.values())
    for layer, column in columns.items():
        width, bottom = sum(column.values()) / total, 0.0
        for kind, size in column.items():
            top = bottom + size / sum(column.values())
            if size:
                patches[kind].append([(left, bottom), (left + width, bottom), (left + width, top), (left, top)])
            bottom = top
        if layer is None or layer % 5 == 0:
            label = "outside the layers" if layer is None else f"{layer}"
            ax.text(left + width / 2, -0.04, label, ha="center", va="top", color=INK, size=9)
        left += width
    for kind, size in bytes_by_kind(sizes).items():
        ax.add_collection(PolyCollection(patches[kind], facecolor=KINDS[kind][1], edgecolor=CARD, linewidth=0.6,
                                         label=f"{kind} {100 * size / total:.1f} %"))  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_xlabel("layer", labelpad=16)
    title = f"{total / 1e6:.0f} MB of weights in {len(sizes)} tensors: area is bytes"
    ax.set_title(title, loc="left", pad=10, color=INK, size=11, weight="bold")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, handlelength=1, labelcolor=INK, fontsize=9)
