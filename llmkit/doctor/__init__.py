"""`llmkit doctor`: is this machine ready, and which command mends what is not?

    report = diagnose()      # in a notebook: %llmkit doctor
    report.ok, report["torch"].detail, report.to_json()

Each check is a function without arguments that gives findings. They run side by side, import no torch, and a check that finds
nothing wrong costs milliseconds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import llmkit
from llmkit.doctor import gpu, hardware, jupyter, network, places, software, variables
from llmkit.doctor.report import Finding, Report, Status, fail, warn
from llmkit.errors import LlmkitError

__all__ = ["CHECKS", "Finding", "Report", "Status", "diagnose"]
Check = Callable[[], list[Finding]]
CHECKS: tuple[Check, ...] = (
    software.python,
    software.torch,
    software.transformers,
    software.packages,
    gpu.gpu,
    hardware.cpu,
    hardware.memory,
    places.disk,
    places.caches,
    places.models,
    network.hubs,
    jupyter.jupyter,
    jupyter.widgets,
    jupyter.fonts,
    variables.variables,
)


def diagnose(checks: tuple[Check, ...] = CHECKS) -> Report:
    """Run the checks; the report keeps their order. Bounded: the slowest part is the network, which is given two seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(checks) or 1) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hub's client, when it is imported here, complains about missing widgets
        findings = [finding for part in pool.map(_run, checks) for finding in part]
    return Report(tuple(findings), time.perf_counter() - start, llmkit.__version__)


def _run(check: Check) -> list[Finding]:
    """A check that breaks is a finding too: the others must still be seen."""
    try:
        return check()
    except LlmkitError as error:
        return [fail(check.__name__, error.message, error.hint or "llmkit doctor --json")]
    except Exception as error:
        what = f"this check itself broke: {type(error).__name__}: {error}"
        return [warn(check.__name__, what, f"python -c 'from {check.__module__} import *; {check.__name__}()'")]
