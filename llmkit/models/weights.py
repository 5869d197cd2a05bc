"""Where the weights of a model come from: ask for a tensor by name, get a CPU tensor in the file's own dtype.

Safetensors are mapped, not read: a tensor costs nothing until it is copied or computed with. All headers and file lengths
are checked at opening, so a truncated last shard is found before minutes of loading. Every error names file and tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llmkit.errors import ConfigError, WeightsError, did_you_mean

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
}
MAX_HEADER = 100_000_000  # bytes; the same bound as the safetensors library's
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PACKED = ("qweight", "weight_packed", "weight_scale_inv")  # what GPTQ/AWQ, compressed-tensors and FP8 files hold for a `weight`


class WeightSource(Protocol):
    """What a model's loader needs to know about weights."""

    def names(self) -> Collection[str]:
        """Every tensor name there is."""
        ...

    def has(self, name: str) -> bool:
        """True when `get(name)` would find the tensor."""
        ...

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """CPU tensor in the file's dtype. WeightsError when it is missing, unusable, or not of `shape` (from config.json)."""
        ...

    def release(self) -> None:
        """What was read need not stay in memory: it was copied, or may be read again. Nothing was written to the tensors."""
        ...

    def close(self) -> None:
        """Let go of the files; tensors already handed out stay valid."""
        ...


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as safetensors names it, and its bytes [start, end) counted from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsSource:
    """A folder's model.safetensors, or the shards that its index (or, without one, the folder) names."""

    def __init__(self, folder: Path) -> None:
        self._mapped: dict[Path, tuple[mmap.mmap, torch.Tensor]] = {}
        self._closed = False
        files, wanted = _files_of(Path(folder))
        self._where: dict[str, tuple[Path, Entry]] = {}
        for file in files:
            for name, entry in read_header(file).items():
                self._add(name, file, entry, wanted)
        for name, file in (wanted or {}).items():
            if name not in self._where:
                raise WeightsError(
                    f"{file}: tensor {name!r} is missing, although the index says it is in this file", "download the model again"
                )

    def _add(self, name: str, file: Path, entry: Entry, wanted: dict[str, Path] | None) -> None:
        if wanted is not None and wanted.get(name) != file:
            return  # the index decides: a shard may hold what belongs to another
        if name in self._where:
            raise WeightsError(
                f"tensor {name!r} is in two files: {self._where[name][0]} and {file}",
                "keep the files of one model in the folder, or add model.safetensors.index.json",
            )
        self._where[name] = (file, entry)

    def names(self) -> Collection[str]:
        return self._where.keys()

    def has(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        file, entry = self._checked(name, shape)
        return self._view(file, entry, self._dtype(name, file, entry))

    def locate(self, name: str, shape: tuple[int, ...] | None = None) -> tuple[Path, int, torch.dtype]:
        """Where the tensor lies: its file, its first byte there, its dtype. Errors as of `get`."""
        file, entry = self._checked(name, shape)
        return file, entry.start, self._dtype(name, file, entry)

    def _checked(self, name: str, shape: tuple[int, ...] | None) -> tuple[Path, Entry]:
        file, entry = self._find(name)
        if shape is not None and entry.shape != tuple(shape):
            raise WeightsError(
                f"{file}: tensor {name!r} has shape {list(entry.shape)}, config.json asks for {list(shape)}",
                "config.json and the weights are of two different models; download both again",
            )
        return file, entry

    def release(self) -> None:
        """Pages of a mapped file count as this process's memory, although the system could take them back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for pages, _ in self._mapped.values():
                pages.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._mapped.clear()
        self._closed = True

    def _find(self, name: str) -> tuple[Path, Entry]:
        if self._closed:
            raise WeightsError(f"tensor {name!r} was asked for after the weights were closed", "open the weights again")
        if name in self._where:
            return self._where[name]
        place = _place([file for file, _ in self._where.values()])
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight" and any(f"{stem}.{p}" in self._where for p in PACKED):
            raise WeightsError(
                f"{place}: tensor {name!r} is packed in a quantised format that is not supported",
                "use the model's unquantised safetensors, or a GGUF of it",
            )
        near = did_you_mean(name, self._where)
        raise WeightsError(f"{place}: tensor {name!r} is missing", f"the nearest name is {near!r}" if near else None)

    def _dtype(self, name: str, file: Path, entry: Entry) -> torch.dtype:
        if entry.dtype in DTYPES:
            return DTYPES[entry.dtype]
        raise WeightsError(
            f"{file}: tensor {name!r} has dtype {entry.dtype}: weights in this (quantised) format are not supported",
            f"usable dtypes: {', '.join(DTYPES)}; use the model's unquantised safetensors, or a GGUF of it",
        )

    def _view(self, file: Path, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
        data = self._map(file)[entry.start : entry.end]
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()  # the file did not align its header: a view of this dtype cannot start here
        return data.view(dtype).view(entry.shape)

    def _map(self, file: Path) -> torch.Tensor:
        """The whole file as uint8, copy-on-write: nothing written to a tensor can reach the file."""
        if file not in self._mapped:
            with file.open("rb") as stream:
                pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mapped[file] = pages, torch.frombuffer(pages, dtype=torch.uint8)
        return self._mapped[file][1]


class DummySource:
    """Random weights for tests and speed measurements: the same for the same seed and name, whatever the order of asking.

    Matrices are normal with std 0.02, norm weights ones, biases zeros. `assume` is what `has` answers for every name.
    """

    BLOCK = 2**20 + 7  # values drawn per tensor; larger tensors repeat them (odd, so that rows do not line up)

    def __init__(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, assume: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.seed, self.dtype, self.assume, self.device = seed, dtype, assume, device

    def names(self) -> Collection[str]:
        return ()

    def has(self, name: str) -> bool:
        return self.assume

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        if shape is None:
            raise WeightsError(
                f"dummy weights: tensor {name!r} was asked for without a shape", "give the shape config.json implies"
            )
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        if "norm" in name:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        size = math.prod(shape)
        noise = torch.empty(min(size, self.BLOCK)).normal_(0, 0.02, generator=self._generator(name)).to(self.device, self.dtype)
        return noise.repeat(-(-size // max(1, len(noise))))[:size].view(shape)

    def release(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def open_weights(
    folder: Path, load_format: str = "auto", dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> WeightSource:
    """Weights of a local model folder. `dtype`, `seed` and `device` matter only for load_format="dummy".

    A GGUF model arrives here as the folder it was converted into, so "gguf" and "safetensors" read the same files.
    """
    if load_format == "dummy":
        return DummySource(seed, dtype, device=device)
    if load_format not in ("auto", "safetensors", "gguf"):
        raise ConfigError(f"load_format must be auto, safetensors, gguf or dummy; got {load_format!r}")
    return SafetensorsSource(Path(folder))


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one .safetensors file, after checking that its header is sound and its length fits."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or (length <= MAX_HEADER and size < 8 + length):
            raise WeightsError(f"{file}: the file is truncated inside its header ({size} bytes)", "download it again")
        if length > MAX_HEADER:
            raise WeightsError(f"{file}: corrupt header: it claims to be {length} bytes long", "download it again")
        header = _parse_json(file, stream.read(length))
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    _check_length(file, size, entries, 8 + length)
    return entries


def _parse_json(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise WeightsError(f"{file}: tensor {name!r} is {count} times in the header", "download the file again")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{file}: corrupt header: {error}", "download it again") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{file}: corrupt header: it is not a table of tensors", "download it again")
    return header


def _entry(file: Path, name: str, value: Any, data_start: int) -> Entry:
    try:
        dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        start, end = (int(n) for n in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file}: corrupt header at tensor {name!r}: {value!r}", "download the file again") from error
    known = dtype in ITEM_BITS
    if (
        start < 0
        or end < start
        or min(shape, default=0) < 0
        or (known and (end - start) * 8 != math.prod(shape) * ITEM_BITS[dtype])
    ):
        raise WeightsError(
            f"{file}: corrupt header: tensor {name!r}, {dtype} {list(shape)}, cannot fill bytes {start} to {end}",
            "download the file again",
        )
    return Entry(dtype, shape, data_start + start, data_start + end)


def _check_length(file: Path, size: int, entries: dict[str, Entry], data_start: int) -> None:
    last = max(entries, key=lambda name: entries[name].end, default=None)
    end = entries[last].end if last else data_start
    if size < end:
        cut = min((n for n in entries if entries[n].end > size), key=lambda n: entries[n].start)
        raise WeightsError(
            f"{file}: the file is truncated: its header describes {end} bytes, it has {size}; "
            f"tensor {cut!r} is the first one cut off",
            "download the file again",
        )
    if size > end:
        raise WeightsError(
            f"{file}: {size - end} bytes follow tensor {last!r}, the last one of the header", "download the file again"
        )


def _files_of(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files to read, and for an indexed model which tensor is in which."""
    if (single := folder / "model.safetensors").is_file():
        return [single], None
    if (index := folder / "model.safetensors.index.json").is_file():
        return _indexed(index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _no_weights(folder)
    _check_all_shards(files)
    return files, None


def _indexed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    weight_map = _parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == Path(f).name for f in weight_map.values()):
        raise WeightsError(f"{index}: no usable weight_map (tensor name -> file name)", "download the file again")
    wanted = {name: index.parent / file for name, file in weight_map.items()}
    for name, file in wanted.items():
        if not file.is_file():
            raise WeightsError(
                f"{file} is missing: {index.name} says that tensor {name!r} is in it",
                "download the model again; what is complete is not fetched twice",
            )
    return sorted(set(wanted.values())), wanted


def _check_all_shards(files: Iterable[Path]) -> None:
    """Without an index the names still say how many shards there are: model-00001-of-00003.safetensors."""
    present = {file.name: re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", file.name) for file in files}
    for found in filter(None, present.values()):
        for number in range(1, int(found[3]) + 1):
            if (shard := f"{found[1]}{number:05d}-of-{found[3]}.safetensors") not in present:
                raise WeightsError(f"{shard} is missing beside {found[0]}", "download the model again")


def _no_weights(folder: Path) -> WeightsError:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        return WeightsError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}): unpickling runs code from the file",
            "convert once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER, safe_serialization=True)",
        )
    return WeightsError(
        f"{folder} has no *.safetensors file", "download the model again, or use load_format='dummy' for random weights"
    )


def _place(files: Iterable[Path]) -> str:
    """How to call the place where a tensor was looked for: the one file, or the folder of several."""
    unique = sorted(set(files))
    return str(unique[0]) if len(unique) == 1 else f"{unique[0].parent} ({len(unique)} files)" if unique else "no tensors at all"
