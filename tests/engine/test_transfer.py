"""What is sent arrives."""

from __future__ import annotations

import numpy as np
import torch

from llmkit.transfer import send_all


def test_arrays_of_any_shape_and_type_arrive_by_one_copy():
    arrays = [np.arange(3), np.arange(15, dtype=np.int32).reshape(3, 5), np.array([1.5], np.float32),
              np.arange(6).reshape(3, 2).T, np.empty((0, 4), np.int32), np.array([7], np.int32)]  # fmt: skip
    arrived = send_all(arrays, torch.device("cpu"))
    for array, there in zip(arrays, arrived, strict=True):
        assert there.numpy().dtype == array.dtype
        np.testing.assert_array_equal(there.numpy(), array)
    assert len({there.untyped_storage().data_ptr() for there in arrived}) == 1
    arrays[0][:] = -1
    assert arrived[0].tolist() == [0, 1, 2], "nothing is shared"
