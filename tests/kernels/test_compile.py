"""Every kernel compiles for GPUs that are not here, and finds room in their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from llmkit_kernels import gemm

KERNELS = {"_product", "_product_1", "_gate_up_silu_1", "_decode", "_prefill", "_rope_cache", "_add_rms_norm", "_embed_rms_norm",
           "_silu_mul_pairs", "_best_of_part", "_best_of_all",
           "_begin_counting", "_count_bins", "_settle", "_penalise", "_count_said"}  # fmt: skip


@pytest.mark.parametrize(("architecture", "limit"), [(89, 101_376), (90, 232_448)], ids=["Ada", "Hopper"])
def test_compiles_and_fits(architecture, limit, tmp_path):
    script, root = Path(__file__).with_name("compile_for.py"), Path(__file__).parents[2]
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    env = os.environ | own | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    run = subprocess.run([sys.executable, script, str(architecture)], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    shared = json.loads(run.stdout.splitlines()[-1])
    assert shared.keys() == KERNELS
    assert {name: size for name, size in shared.items() if size > limit} == {}


def test_on_a_hopper_every_planned_tile_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(gemm, "shared_memory", lambda: 232_448)
    monkeypatch.setattr("llmkit_kernels.launch.shared_memory", lambda: 232_448)
    for n, k in ((4608, 3584), (3584, 18944), (3584, 3584), (37888, 3584), (4096, 1024), (1024, 3072), (152064, 3584)):
        for m in range(1, gemm.MOST_TOKENS + 1):
            tile = gemm.plan(n, k, m)
            assert gemm.fitting(tile, sum(gemm.token_tiles(m)), 2) == tile
