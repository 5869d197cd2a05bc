"""From the host to the device without a wait.

A plain copy to a GPU first waits for all that was launched there before (torch synchronises the stream for memory that is not
pinned), so the step that is to follow the running one would be launched only when that has ended. Through pinned memory the copy
takes its turn like a kernel. torch's allocator of pinned memory keeps a buffer until its copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_TYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device. On a CPU both are the same memory; on a GPU the host may change its own at once."""
    return _staged(values, device).to(device, non_blocking=True)


def send_all(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """As `send`, by one copy: each costs the host ten microseconds or more, for which a first token waits. Nothing is shared."""
    ends = np.cumsum([-(-values.nbytes // 8) for values in arrays]).tolist()
    staged = torch.empty(ends[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
    parts = list(zip(arrays, staged.split(np.diff(ends, prepend=0).tolist())))
    for values, part in parts:
        part.numpy().view(values.dtype)[: values.size] = values.ravel()
    there = staged.to(device, non_blocking=True).split([len(part) for _, part in parts])
    return [part.view(_TYPES[values.dtype.name])[: values.size].view(values.shape) for (values, _), part in zip(parts, there)]


def fill(target: Tensor, values: np.ndarray) -> None:
    """Write values over a tensor of the same shape."""
    target.copy_(_staged(values, target.device), non_blocking=True)


def _staged(values: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host
