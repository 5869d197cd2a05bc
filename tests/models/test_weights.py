"""Reading safetensors: values, laziness, and an error that names file and tensor for everything that can be wrong."""

import json
import mmap
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from llmkit.errors import ConfigError, WeightsError
from llmkit.models.weights import DummySource, SafetensorsSource, open_weights

TENSORS = {
    "model.embed_tokens.weight": torch.randn(7, 4).bfloat16(),
    "model.norm.weight": torch.randn(4),
    "lm_head.weight": torch.randn(7, 4).half(),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def sharded(folder: Path) -> dict[str, str]:
    names = {"model.safetensors-a": list(TENSORS)[:2], "model.safetensors-b": list(TENSORS)[2:]}
    weight_map = {}
    for number, members in enumerate(names.values(), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: TENSORS[n] for n in members}, folder / file)
        weight_map.update(dict.fromkeys(members, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def check_all(source) -> None:
    assert set(source.names()) == set(TENSORS)
    for name, expected in TENSORS.items():
        got = source.get(name, tuple(expected.shape))
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_reads_every_tensor_of_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    check_all(open_weights(tmp_path))


@pytest.mark.parametrize("keep_index", [True, False])
def test_reads_shards_with_and_without_index(tmp_path, keep_index):
    sharded(tmp_path)
    if not keep_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    check_all(SafetensorsSource(tmp_path))


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system cannot be told")
def test_what_was_read_leaves_memory_and_is_read_again(tmp_path):
    large, process = torch.arange(8 * 2**20, dtype=torch.float32), psutil.Process()  # 32 MiB
    save_file({"large": large}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    before = process.memory_info().rss
    tensor = source.get("large")
    assert torch.equal(tensor, large)
    read = process.memory_info().rss
    assert read - before > 24 * 2**20
    source.release()
    assert read - process.memory_info().rss > 24 * 2**20
    source.close()
    assert torch.equal(tensor, large)


def test_tensors_are_mapped_outlive_close_and_never_write_to_the_file(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    before = file.read_bytes()
    source = SafetensorsSource(tmp_path)
    first, again = source.get("model.norm.weight"), source.get("model.norm.weight")
    assert first.data_ptr() == again.data_ptr()  # the same pages, no copy
    source.close()
    first.zero_()
    assert file.read_bytes() == before
    with pytest.raises(WeightsError, match="closed"):
        source.get("model.norm.weight")


def test_unaligned_header_still_reads(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((3 - len(header)) % 8)
    raw_file(tmp_path / "model.safetensors", header, torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert SafetensorsSource(tmp_path).get("x").tolist() == [1.5, -2.0]


def test_truncated_last_shard_is_found_at_opening(tmp_path):
    sharded(tmp_path)
    last = tmp_path / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.safetensors.*truncated.*'\w") as caught:
        open_weights(tmp_path)
    assert any(name in str(caught.value) for name in TENSORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated inside its header"),
        (b"\xff" * 8, "corrupt header"),
        ((200).to_bytes(8, "little") + b"{}", "truncated inside its header"),
        ((2).to_bytes(8, "little") + b"{]", "corrupt header"),
        ((2).to_bytes(8, "little") + b"[]", "not a table"),
        ((2).to_bytes(8, "little") + b"{}x", "1 bytes follow"),
    ],
)
def test_corrupt_files_are_named(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        open_weights(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2]},
        7,
    ],
)
def test_an_impossible_header_entry_names_its_tensor(tmp_path, entry):
    raw_file(tmp_path / "model.safetensors", {"layer.x": entry}, b"\0" * 8)
    with pytest.raises(WeightsError, match=r"corrupt header.*'layer\.x'"):
        open_weights(tmp_path)


def test_duplicate_tensor_in_one_header_and_in_two_files(tmp_path):
    one = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    raw_file(tmp_path / "model.safetensors", one, b"\0" * 4)
    with pytest.raises(WeightsError, match="'x' is 2 times"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"'x' is in two files: .*a\.safetensors and .*b\.safetensors"):
        open_weights(tmp_path)


def test_missing_shard_is_named_with_and_without_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors is missing.*'model\.embed_tokens\.weight'"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors is missing"):
        open_weights(tmp_path)


def test_index_that_promises_too_much_or_leads_outside(tmp_path):
    weight_map = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, "extra": weight_map["scalar"]}}))
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors: tensor 'extra' is missing"):
        open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(WeightsError, match="no usable weight_map"):
        open_weights(tmp_path)


def test_missing_tensor_names_the_nearest_and_wrong_shape_both_shapes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    assert source.has("lm_head.weight")
    assert not source.has("lm_head.bias")
    with pytest.raises(
        WeightsError, match=r"(?s)model\.safetensors: tensor 'model\.norms\.weight' is missing.*'model\.norm\.weight'"
    ):
        source.get("model.norms.weight")
    with pytest.raises(
        WeightsError, match=r"model\.safetensors: tensor 'lm_head\.weight' has shape \[7, 4\], config\.json asks for \[8, 4\]"
    ):
        source.get("lm_head.weight", (8, 4))


def test_quantised_formats_are_refused_by_name(tmp_path):
    save_file(
        {"a.weight": torch.ones(2, dtype=torch.int8), "b.qweight": torch.ones(2, dtype=torch.int32)},
        tmp_path / "model.safetensors",
    )
    source = open_weights(tmp_path)
    with pytest.raises(WeightsError, match=r"'a\.weight' has dtype I8.*not supported"):
        source.get("a.weight")
    with pytest.raises(WeightsError, match=r"'b\.weight' is packed in a quantised format"):
        source.get("b.weight")


def test_folder_without_weights_and_with_pickles_only(tmp_path):
    with pytest.raises(WeightsError, match=r"no \*\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"(?s)pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        open_weights(tmp_path)


def test_dummy_weights_depend_on_name_and_seed_only(tmp_path):
    source = open_weights(tmp_path, "dummy", torch.bfloat16, seed=3)
    first = source.get("a.weight", (64, 32))
    source.get("b.weight", (5,))
    assert torch.equal(first, source.get("a.weight", (64, 32)))
    assert torch.equal(first, DummySource(3, torch.bfloat16).get("a.weight", (64, 32)))
    assert not torch.equal(first, source.get("b.weight", (64, 32)))
    assert not torch.equal(first, DummySource(4, torch.bfloat16).get("a.weight", (64, 32)))
    assert first.dtype == torch.bfloat16
    assert first.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert source.get("x.norm.weight", (3,)).tolist() == [1, 1, 1]
    assert source.get("x.bias", (2,)).tolist() == [0, 0]
    assert (list(source.names()), source.has("x"), DummySource(assume=True).has("x")) == ([], False, True)


def test_large_dummy_tensors_fill_their_shape_with_differing_rows():
    big = DummySource().get("w", (1100, 1000))
    assert big.shape == (1100, 1000)
    assert not torch.equal(big[0], big[-50])


def test_unknown_load_format(tmp_path):
    with pytest.raises(ConfigError, match="load_format"):
        open_weights(tmp_path, "pickle")
