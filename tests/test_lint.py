"""ruff and pyright, so that the one test command covers them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# node comes as a wheel with pyright[nodejs]; whatever node the machine has is left alone
ENVIRONMENT = os.environ | {"PYRIGHT_PYTHON_GLOBAL_NODE": "0", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("command", [["ruff", "check", "."], ["pyright", "--pythonpath", sys.executable]], ids=lambda c: c[0])
def test_clean(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
