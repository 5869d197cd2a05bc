"""Test files of this folder share kernel_cases.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # at the end: other folders have a `conftest` that their tests import by name
