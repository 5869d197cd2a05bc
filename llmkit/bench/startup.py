"""Cold start: from the start of the interpreter to the first token, in fresh processes, with everything cached on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import llmkit
from llmkit.bench.measure import median, say, spread
from llmkit.bench.report import Row
from llmkit.errors import LlmkitError


@dataclass(frozen=True)
class Start:
    """One start. times: seconds from the spawn to each of python, import, ready, token. facts: what the child said."""

    times: dict[str, float]
    facts: dict[str, Any]

    @property
    def stages(self) -> dict[str, float]:
        """Stage -> seconds, in order; llmkit's own report says what lies between import and ready."""
        t, own = self.times, {k: s for k, s in self.facts.get("stages", {}).items() if k != "import"}
        between = own or {"load": t["ready"] - t["import"]}
        return {"python": t["python"], "import": t["import"] - t["python"], **between, "first token": t["token"] - t["ready"]}


def measure_startup(options: dict[str, Any], against: Sequence[str], repeat: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and the facts of this machine as the child saw them (threads, gpu, folder, dtype, device).

    One start of each fetches, converts and warms the disk cache, untimed; then `repeat` rounds, in turn.
    """
    say("startup: llmkit, first start (not counted)")
    facts = first_token("llmkit", options).facts
    asked = {"llmkit": options} | {name: {k: facts[k] for k in ("folder", "dtype", "device")} for name in against}
    for name in against:
        say(f"startup: {name}, first start (not counted)")
        first_token(name, asked[name])
    starts: dict[str, list[Start]] = {name: [] for name in asked}
    for i in range(repeat):
        for name in asked:
            say(f"startup: {name}, run {i + 1} of {repeat}")
            starts[name].append(first_token(name, asked[name]))
    return [_row(name, starts[name]) for name in asked], facts


def _row(name: str, starts: list[Start]) -> Row:
    seconds = [s.times["token"] for s in starts]
    figures = {
        "seconds": median(seconds),
        "ready_s": median([s.times["ready"] for s in starts]),
        "peak_rss_mb": median([s.facts["peak_rss"] for s in starts]) / 1e6,
        "spread": spread(seconds),
    }
    stages = {stage: median([s.stages[stage] for s in starts]) for stage in starts[0].stages}
    library = llmkit.__version__ if name == "llmkit" else version(name)
    return Row("cold start to first token", name, library, figures, {"seconds": seconds}, stages)


def first_token(engine: str, options: dict[str, Any]) -> Start:
    """Start one process and read its stages. LlmkitError with the child's last words when it fails."""
    command = [sys.executable, "-m", "llmkit.bench.first_token", engine, json.dumps(options)]
    times: dict[str, float] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment()) as child:
            for line in child.stdout or ():
                now = time.perf_counter() - begin
                if line.startswith('{"at"'):  # anything else is somebody's chatter
                    said = json.loads(line)
                    times[said.pop("at")] = now
                    facts |= said
        if child.returncode:
            errors.seek(0)
            last_words = errors.read()[-2000:].strip()
            raise LlmkitError(f"{engine} ended with code {child.returncode} before its first token:\n{last_words}")
    return Start(times, facts)


def _environment() -> dict[str, str]:
    """The child finds its modules where this process does, however that was arranged."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
