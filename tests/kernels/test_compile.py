"""Every kernel compiles for GPUs that are not here, and finds room in their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

import torch
from llmkit_kernels import band_gemm, gemm
from llmkit_kernels.prepared import PreparedWeight

KERNELS = {"_product", "_product_1", "_band_product", "_gate_up_silu_1", "_wide_product", "_silu_mul_pairs", "_decode",
           "_prefill", "_fixed_decode", "_fixed_prefill", "_rope_cache", "_add_rms_norm", "_embed_rms_norm", "_best_of_part",
           "_best_of_all", "_begin_counting", "_count_bins", "_settle", "_penalise", "_count_said"}  # fmt: skip


LIMITS = {89: 101_376, 90: 232_448, 100: 232_448}  # Ada, Hopper, Blackwell


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    """One process an architecture, side by side."""
    script, root = Path(__file__).with_name("compile_for.py"), Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    running = {}
    for architecture in LIMITS:
        own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": path}
        running[architecture] = subprocess.Popen([sys.executable, script, str(architecture)], env=os.environ | own, text=True,
                                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("architecture", LIMITS)
def test_compiles_and_fits(compilers, architecture):
    said, complaints = compilers[architecture].communicate(timeout=300)
    assert compilers[architecture].returncode == 0, complaints[-3000:]
    told = json.loads(said.splitlines()[-1])
    shared = told["shared"]
    assert shared.keys() == KERNELS
    assert {name: size for name, size in shared.items() if size > LIMITS[architecture]} == {}
    assert set(map(tuple, told["ahead"].values())) == {(False, True)}, "compiled ahead, and not launched: there is no GPU"


def test_on_a_hopper_every_planned_tile_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(gemm, "shared_memory", lambda: 232_448)
    monkeypatch.setattr("llmkit_kernels.launch.shared_memory", lambda: 232_448)
    for n, k in ((4608, 3584), (3584, 18944), (3584, 3584), (37888, 3584), (4096, 1024), (1024, 3072), (152064, 3584)):
        for m in range(1, 2 * gemm.MOST_TOKENS + 1):
            tile = gemm.plan(n, k, m)
            if m > gemm.MOST_TOKENS and not gemm.beats_cublas(PreparedWeight(torch.empty(n, k, device="meta")), m):
                continue  # nobody takes this one
            assert gemm.fitting.__wrapped__(tile, sum(gemm.token_tiles(m)), 2) == tile


@pytest.mark.parametrize(
    ("n", "k", "m", "band"),
    [(37888, 3584, 128, (288, 1)), (37888, 3584, 40, (288, 1)), (28672, 4096, 100, (256, 1)), (24576, 4096, 64, (192, 1)),
     (16384, 2048, 65, (192, 1)), (16384, 2048, 64, None), (37888, 3584, 32, None), (37888, 3584, 129, None),
     (3584, 3584, 128, None), (37888, 3580, 128, None)],
)  # fmt: skip
def test_on_a_hopper_multiprocessors_share_a_big_weight_out(monkeypatch, n, k, m, band):
    monkeypatch.setattr(band_gemm, "is_hopper", lambda: True)
    monkeypatch.setattr(band_gemm, "num_sms", lambda: 132)
    found = band_gemm.plan.__wrapped__(n, k, m)
    assert (found and (found.rows, found.splits)) == band


@pytest.mark.parametrize(
    ("n", "k", "m", "band"),
    [(4608, 3584, 17, (144, 4)), (4608, 3584, 16, None), (6144, 4096, 64, (192, 4)), (9216, 3072, 32, (144, 2)),
     (3584, 3584, 32, None), (4608, 3584, 65, None), (4096, 1024, 32, None), (3584, 18944, 32, None)],
)  # fmt: skip
def test_on_a_hopper_they_share_a_smaller_one_in_parts(monkeypatch, n, k, m, band):
    monkeypatch.setattr(band_gemm, "is_hopper", lambda: True)
    monkeypatch.setattr(band_gemm, "num_sms", lambda: 132)
    found = band_gemm.plan_parts.__wrapped__(n, k, m)
    assert (found and (found.rows, found.splits)) == band


@pytest.mark.parametrize(
    ("n", "sms", "tile"),
    [(3584, 132, (64, 2)), (4096, 132, (64, 2)), (5120, 132, (128, 3)), (2560, 132, (64, 3)), (2048, 132, (64, 4)),
     (8192, 132, (64, 1)), (3584, 82, (64, 4)), (5120, 78, (128, 5))],
)  # fmt: skip
def test_a_deep_weight_is_cut_so_that_programs_end_together(monkeypatch, n, sms, tile):
    monkeypatch.setattr(gemm, "num_sms", lambda: sms)
    for m in (33, 64, 65, 128):
        found = gemm.plan_deep.__wrapped__(n, m)
        assert (found.block_n, found.splits) == tile
