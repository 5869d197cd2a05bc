"""Reading weights by threads: the same numbers as mapping them, whatever is merged, interleaved or converted on the way."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit import LLM, SamplingParams
from llmkit.errors import WeightsError
from llmkit.models import reader as module
from llmkit.models.config import ModelConfig
from llmkit.models.decoder import Decoder
from llmkit.models.reader import CudaLane, Reader, fast_reader
from llmkit.models.weights import DummySource, SafetensorsSource

CPU = torch.device("cpu")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class PlainLane:
    """Plain memory, copied at once: what a CPU needs to run the same code."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.buffers = torch.empty(2, size, dtype=torch.uint8)

    def copy(self, slot: int, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, slot: int) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


class CountingLane(PlainLane):
    """Counts who is open, and does what a GPU might: it copies late, when the buffer is asked for again."""

    open_lanes, lock = 0, threading.Lock()

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__(device, size)
        self.late: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with self.lock:
            CountingLane.open_lanes += 1

    def copy(self, slot: int, target: torch.Tensor, source: torch.Tensor) -> None:
        self.late[slot] = (target, source)

    def wait(self, slot: int) -> None:
        if slot in self.late:
            target, source = self.late.pop(slot)
            target.copy_(source)

    def close(self) -> None:
        for slot in range(2):
            self.wait(slot)
        with self.lock:
            CountingLane.open_lanes -= 1


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Buffers that no tensor of these tests fits, and nobody open before or after."""
    monkeypatch.setattr(module, "BUFFER", 1000)
    CountingLane.open_lanes = 0
    yield
    assert CountingLane.open_lanes == 0


def parameters(model: Decoder) -> list[torch.Tensor]:
    found = [model.embedding.weight, model.norm.weight, model.lm_head.project.weight]
    for layer in model.layers:
        for norm in (layer.input_norm, layer.post_norm, layer.attention.q_norm, layer.attention.k_norm):
            found += [norm.weight] if norm else []
        for linear in (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down):
            found += [linear.weight, *([] if linear.bias is None else [linear.bias])]
    return [t for t in found if t is not None]


def load(folder: Path, dtype: torch.dtype, streamed: bool) -> Decoder:
    source = SafetensorsSource(folder)
    reader = Reader(source, CPU, CountingLane) if streamed else None
    try:
        model = Decoder(ModelConfig.from_folder(folder), source, dtype, CPU, 64, reader)
        if reader:
            reader.run()
            assert reader.bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors")) - headers(folder)
            assert "GB/s" in str(reader)
        return model
    finally:
        source.close()


def headers(folder: Path) -> int:
    return sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in folder.glob("*.safetensors"))


@pytest.mark.parametrize("pairs", [False, True], ids=["stacked", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["as it is", "converted"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_model_is_the_same_as_from_mapped_files(family, dtype, pairs, tiny, monkeypatch):
    folder, _ = tiny(family)
    monkeypatch.setattr("llmkit.ops.has_kernels", lambda device, dtype: pairs)
    mapped, streamed = (load(folder, dtype, s) for s in (False, True))
    assert streamed.weight_bytes == mapped.weight_bytes
    for ours, expected in zip(parameters(streamed), parameters(mapped), strict=True):
        assert ours.dtype == expected.dtype == dtype
        assert torch.equal(ours, expected)


def test_biases_are_interleaved_too(tiny, monkeypatch):
    folder, _ = tiny("llama-bias-tied")
    monkeypatch.setattr("llmkit.ops.has_kernels", lambda device, dtype: True)
    mapped, streamed = (load(folder, torch.float32, s) for s in (False, True))
    assert torch.equal(streamed.layers[0].mlp.gate_up.bias, mapped.layers[0].mlp.gate_up.bias)  # type: ignore[arg-type]


def saved(folder: Path, **tensors: torch.Tensor) -> SafetensorsSource:
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsSource(folder)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 700), "plain"),  # a row is more than a buffer
        ((50, 7), "transposed"),  # no element beside the next
        ((6, 5, 4), "middle"),
        ((0, 4), "plain"),
        ((), "plain"),
    ],
)
def test_any_target(tmp_path, shape, layout):
    x = torch.randn(shape)
    source = saved(tmp_path, x=x)
    target = torch.full(shape, torch.nan)
    if layout == "transposed":
        target = torch.full(shape[::-1], torch.nan).T
    if layout == "middle":
        target = torch.full((6, 9, 4), torch.nan)[:, 2:7]
    reader = Reader(source, CPU, CountingLane)
    reader.read("x", shape, target)
    reader.run()
    assert torch.equal(target, x)


def test_eight_threads_work_at_once(tmp_path):
    together = threading.Barrier(module.THREADS, timeout=10)  # breaks when fewer arrive

    class Meeting(CountingLane):
        def __init__(self, device: torch.device, size: int) -> None:
            super().__init__(device, size)
            together.wait()

    x = torch.randn(10_000)
    reader, target = Reader(saved(tmp_path, x=x), CPU, Meeting), torch.empty(10_000)
    reader.read("x", (10_000,), target)
    reader.run()
    assert torch.equal(target, x)


def test_what_is_missing_or_of_another_shape_is_said_before_reading(tmp_path):
    reader = Reader(saved(tmp_path, x=torch.ones(4)), CPU, PlainLane)
    with pytest.raises(WeightsError, match=r"model\.safetensors: tensor 'x' has shape \[4\]"):
        reader.read("x", (5,), torch.empty(5))
    with pytest.raises(WeightsError, match="'y' is missing"):
        reader.read("y", (4,), torch.empty(4))


def test_a_file_that_is_cut_after_opening_names_file_and_tensor(tmp_path):
    source = saved(tmp_path, a=torch.ones(2000), b=torch.ones(2000))
    reader, targets = Reader(source, CPU, CountingLane), torch.zeros(2, 2000)
    for name, target in zip("ab", targets):
        reader.read(name, (2000,), target)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightsError, match=r"model\.safetensors: the file is truncated inside tensor 'b'"):
        reader.run()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_disk_that_fails_names_file_and_tensor(tmp_path, monkeypatch):
    reader = Reader(saved(tmp_path, x=torch.ones(2000)), CPU, CountingLane)
    reader.read("x", (2000,), torch.empty(2000))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(WeightsError, match=r"tensor 'x' cannot be read: Input/output error") as caught:
        reader.run()
    assert isinstance(caught.value.__cause__, OSError)


def test_short_reads_go_on(tmp_path, monkeypatch):
    x, preadv = torch.randn(2000), os.preadv
    reader, target = Reader(saved(tmp_path, x=x), CPU, PlainLane), torch.empty(2000)
    reader.read("x", (2000,), target)
    monkeypatch.setattr(os, "preadv", lambda fd, rooms, start: preadv(fd, [rooms[0][:77]], start))
    reader.run()
    assert torch.equal(target, x)


def test_an_interrupt_ends_the_threads(tmp_path, monkeypatch):
    reader = Reader(saved(tmp_path, x=torch.ones(100_000)), CPU, CountingLane)
    reader.read("x", (100_000,), torch.empty(100_000))
    read = []

    def interrupted(*args):
        read.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.run()
    assert [t for t in threading.enumerate() if t.name.startswith("llmkit-weights")] == []


class FakeCuda:
    """What `CudaLane` calls of torch.cuda, on plain memory; knows which memory is locked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.locked: dict[int, int] = {}
        self.most = 0
        for name in ("Stream", "Event", "stream", "cudart", "check_error"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            """Copies are made at once."""

    class Event(Stream):
        def __init__(self) -> None:
            self.recorded = 0

        def record(self) -> None:
            self.recorded += 1

    @staticmethod
    def stream(stream: object) -> nullcontext:
        return nullcontext(stream)

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        pages = {p for start, n in self.locked.items() for p in range(start // 4096, (start + n) // 4096)}
        assert pages.isdisjoint(range(pointer // 4096, (pointer + size) // 4096))
        assert pointer % 4096 == size % 4096 == flags == 0
        self.locked[pointer] = size
        self.most = max(self.most, sum(self.locked.values()))
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0

    @staticmethod
    def check_error(code: int) -> None:
        assert code == 0


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_locked_memory_is_always_unlocked(tmp_path, monkeypatch, cut):
    cuda, x = FakeCuda(monkeypatch), torch.randn(20_000)
    reader, target = Reader(saved(tmp_path, x=x), CPU, CudaLane), torch.empty(20_000, dtype=torch.float16)
    reader.read("x", (20_000,), target)
    if cut:
        os.truncate(tmp_path / "model.safetensors", 50_000)
        with pytest.raises(WeightsError, match="truncated"):
            reader.run()
    else:
        reader.run()
        assert torch.equal(target, x.half())
    assert cuda.locked == {}
    assert 0 < cuda.most <= module.THREADS * 2 * 4096


def test_only_files_on_their_way_to_a_gpu(tmp_path):
    assert fast_reader(saved(tmp_path, x=torch.ones(1)), CPU) is None
    assert fast_reader(DummySource(), torch.device("cuda")) is None


class TestOnAGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_every_element_arrives(self, tmp_path, monkeypatch, dtype):
        monkeypatch.undo()
        tensors = {f"t{i}": torch.randn(257 + i, 8191).to(torch.bfloat16) for i in range(40)}
        source, targets = saved(tmp_path, **tensors), {}
        reader = Reader(source, torch.device("cuda"))
        for name, x in tensors.items():
            rows, columns = x.shape
            targets[name] = torch.empty(rows, 2, columns, dtype=dtype, device="cuda")[:, 1]
            reader.read(name, (rows, columns), targets[name])
        reader.run()
        for name, x in tensors.items():
            assert torch.equal(targets[name].cpu(), x.to(dtype))

    def test_no_memory_stays(self, tmp_path, monkeypatch):
        monkeypatch.undo()
        source = saved(tmp_path, x=torch.randn(40_000_000).to(torch.bfloat16))
        target = torch.empty(40_000_000, dtype=torch.float16, device="cuda")

        def once() -> tuple[int, int]:
            reader = Reader(source, torch.device("cuda"))
            reader.read("x", (40_000_000,), target)
            reader.run()
            torch.cuda.synchronize()
            locked = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
            return torch.cuda.mem_get_info()[0], locked

        once()
        free, rss = once()
        for _ in range(4):
            now_free, now_rss = once()
        assert now_free >= free
        assert now_rss <= rss + 64 * 1024

    def test_a_model_from_files_answers_as_one_that_is_mapped(self, tiny, smollm2_folder, monkeypatch):
        monkeypatch.undo()
        folder, _ = tiny("qwen2")
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        answers = []
        for reader in (fast_reader, lambda source, device: None):
            monkeypatch.setattr("llmkit.engine.start.fast_reader", reader)
            with LLM(folder, tokenizer=smollm2_folder, dtype="float32", max_model_len=128, gpu_memory_utilization=0.2) as llm:
                answers.append(llm.generate([[5, 6, 7]], greedy, use_tqdm=False)[0].outputs[0].token_ids)
                assert ("GB/s" in str(llm.startup_report())) == (reader is fast_reader)
        assert answers[0] == answers[1]


def test_the_files_themselves_are_what_is_compared(tiny):
    """The fixture's weights are random: a tensor left out would show."""
    folder, _ = tiny("qwen2")
    assert all(x.std() > 0 for x in load_file(folder / "model.safetensors").values() if x.numel() > 1)
