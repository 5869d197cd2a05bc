"""The map of a model's weights: what each tensor is, and areas that are bytes."""

import matplotlib.pyplot as plt
import pytest

from llmkit.notebook import plots, tensor_map

LAYER = {"self_attn.q_proj.weight": 40, "self_attn.k_proj.weight": 10, "mlp.gate_proj.weight": 60, "mlp.up_proj.weight": 60,
         "mlp.down_proj.weight": 60, "input_layernorm.weight": 2}  # fmt: skip
SIZES = {"model.embed_tokens.weight": 300, "model.norm.weight": 2} | {
    f"model.layers.{i}.{name}": size for i in range(3) for name, size in LAYER.items()}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [
    ("model.embed_tokens.weight", "embedding"),
    ("lm_head.weight", "embedding"),
    ("model.layers.3.self_attn.qkv_proj.weight", "attention: query, output"),
    ("model.layers.3.self_attn.q_norm.weight", "norm"),
    ("model.layers.3.mlp.gate_up_proj.weight", "feed-forward: gate, up"),
    ("something.else", "other"),
])  # fmt: skip
def test_kind(name, kind):
    assert tensor_map.kind_of(name) == kind


def test_layer():
    assert tensor_map.layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert tensor_map.layer_of("model.norm.weight") is None


def test_kinds_add_up():
    assert sum(tensor_map.bytes_by_kind(SIZES).values()) == sum(SIZES.values())
    assert tensor_map.bytes_by_kind({"model.norm.weight": 2}) == {"norm": 2}


def test_every_area_is_the_share_of_the_bytes():
    ax = plots.canvas()
    tensor_map.plot_tensor_map(ax, SIZES)
    kinds = tensor_map.bytes_by_kind(SIZES)
    for kind, collection in zip(kinds, ax.collections):
        boxes = [path.get_extents() for path in collection.get_paths()]
        assert sum(b.width * b.height for b in boxes) == pytest.approx(kinds[kind] / sum(SIZES.values()))
        assert collection.get_label().startswith(kind)
    plt.close("all")
