"""Reading a GGUF file: its metadata, and where each tensor's bytes are.

The `gguf` library's reader needs 3 s for a 50,000-token vocabulary, because every string becomes a numpy view. This one
takes 0.1 s, checks every length, and leaves what a quantised block means to the library.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import WeightsError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF type -> struct code
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: shape as torch counts it (rows first), the number of its quantisation type, its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    start: int


class GGUFFile:
    """A mapped GGUF file: `.metadata` (key -> Python value) and `.tensors` (name -> GGUFTensor). WeightsError if unsound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            if path.stat().st_size < 24 or stream.read(4) != b"GGUF":
                raise WeightsError(f"{path} is not a GGUF file (it does not begin with 'GGUF')")
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, KeyError, RecursionError) as error:
            raise WeightsError(
                f"{path}: the GGUF header is truncated or corrupt at byte {self._at} of {len(self.data)}",
                "download the file again",
            ) from error

    def __repr__(self) -> str:
        return f"GGUFFile({self.path.name!r}, {len(self.tensors)} tensors, {len(self.metadata)} keys)"

    def _read(self) -> None:
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise WeightsError(
                f"{self.path}: GGUF version {version} cannot be read; versions 2 and 3 can",
                "convert the model again with a current llama.cpp",
            )
        tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {self._string(): self._value(self._scalar("I")) for _ in range(key_count)}
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = int(self.metadata.get("general.alignment", 32)) or 32
        base = -(-self._at // alignment) * alignment
        self.tensors = {name: GGUFTensor(name, shape, kind, base + offset) for name, shape, kind, offset in found}
        if len(self.tensors) < tensor_count:
            raise WeightsError(f"{self.path}: a tensor name is twice in the header", "download the file again")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._scalar("Q")
        if self._at + size > len(self.data):
            raise struct.error("string runs past the end of the file")
        self._at += size
        return self.data[self._at - size : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        return self._array() if kind == ARRAY else self._scalar(SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in (STRING, ARRAY):
            return [self._value(kind) for _ in range(count)]
        size = count * struct.calcsize("<" + SCALARS[kind])
        if self._at + size > len(self.data):  # before unpack_from would try to allocate `count` values
            raise struct.error("array runs past the end of the file")
        values = struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, self._at)
        self._at += size
        return list(values)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def type_name(self, tensor: GGUFTensor) -> str:
        """`Q4_K`, or `type 99` for one the gguf library does not know."""
        from gguf.constants import GGMLQuantizationType

        try:
            return GGMLQuantizationType(tensor.type_id).name
        except ValueError:
            return f"type {tensor.type_id}"

    def rows(self, tensor: GGUFTensor) -> Any:
        """The tensor's raw bytes as a numpy uint8 array [rows, bytes per row], mapped. WeightsError when cut off or unknown."""
        import numpy as np
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.type_name(tensor).startswith("type "):
            raise self.unusable(tensor)
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
        columns = tensor.shape[-1] if tensor.shape else 1
        if columns % block:
            raise WeightsError(
                f"{self.path}: tensor {tensor.name!r}: rows of {columns} values do not divide into {block}-value blocks"
            )
        count, width = math.prod(tensor.shape[:-1]), columns // block * block_bytes
        if tensor.start + count * width > len(self.data):
            raise WeightsError(
                f"{self.path}: the file is truncated: tensor {tensor.name!r} ({self.type_name(tensor)}) ends at byte "
                f"{tensor.start + count * width}, the file has {len(self.data)}",
                "download the file again",
            )
        return np.frombuffer(self.data, np.uint8, count * width, tensor.start).reshape(count, width)

    def unusable(self, tensor: GGUFTensor) -> WeightsError:
        return WeightsError(
            f"{self.path}: tensor {tensor.name!r} has the type {self.type_name(tensor)}, which cannot be dequantised",
            "use another quantisation of the model, such as Q8_0, Q4_K_M or BF16",
        )
