"""A weight as the products' kernels want it."""

from __future__ import annotations

from torch import Tensor

from llmkit_kernels.launch import descriptor, is_hopper


class PreparedWeight:
    """A weight [N, K] for these kernels; it keeps the TMA descriptors of the tiles that were used."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._descriptors: dict[tuple[int, int], object] = {}

    def descriptor(self, rows: int, columns: int) -> tuple[object, bool]:
        """For tiles [rows, columns]: (TMA descriptor or the weight itself, whether it is a descriptor)."""
        if not is_hopper() or self.weight.shape[1] * self.weight.element_size() % 16:  # TMA wants rows that begin at 16 bytes
            return self.weight, False
        key = rows, columns
        if key not in self._descriptors:
            self._descriptors[key] = descriptor(self.weight, rows, columns)
        return self._descriptors[key], True
