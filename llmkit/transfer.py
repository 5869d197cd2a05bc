"""From the host to the device without a wait.

A plain copy to a GPU first waits for all that was launched there before (torch synchronises the stream for memory that is not
pinned), so the step that is to follow the running one would be launched only when that has ended. Through pinned memory the copy
takes its turn like a kernel. torch's allocator of pinned memory keeps a buffer until its copy is done.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device. On a CPU both are the same memory; on a GPU the host may change its own at once."""
    return _staged(values, device).to(device, non_blocking=True)


def fill(target: Tensor, values: np.ndarray) -> None:
    """Write values over a tensor of the same shape."""
    target.copy_(_staged(values, target.device), non_blocking=True)


def _staged(values: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host
