"""What concerns the whole of a GPU, and would spoil a graph that another thread captures: it waits for that."""

from __future__ import annotations

import threading

import torch

capturing = threading.RLock()  # held while a graph is captured; the end of a closed engine may come in the same thread


def synchronize(device: torch.device) -> None:
    """Wait until everything that was launched on the device has ended."""
    with capturing:
        torch.cuda.synchronize(device)


def empty_cache() -> None:
    """Give the memory back that torch keeps for later."""
    with capturing:
        torch.cuda.empty_cache()
