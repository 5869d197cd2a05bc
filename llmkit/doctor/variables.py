"""Environment variables that llmkit reads: which are set, and which are set but misspelt."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from llmkit.doctor.report import Finding, ok, warn
from llmkit.doctor.software import short
from llmkit.hub import hub_order

KNOWN = {
    "LLMKIT_HOME": "folder of llmkit's own cache",
    "LLMKIT_HUBS": "hubs that a plain id is looked up in, in order",
    "LLMKIT_OFFLINE": "true: nobody is contacted, models come from the disk",
    "LLMKIT_RESULTS": "file that notebook checks and records are added to",
    "LLMKIT_RUN_DIR": "folder of the records and logs of servers",
    "LLMKIT_USE_MODELSCOPE": "true: ModelScope alone; false: Hugging Face alone",
    "LLMKIT_WIDGETS": "0: pictures instead of live views",
    "VLLM_USE_MODELSCOPE": "as LLMKIT_USE_MODELSCOPE",
}


def variables() -> list[Finding]:
    """LLMKIT_* and VLLM_* as they are set. Of vLLM's own only the names are told: some hold keys."""
    hub_order()  # raises a typed error for a value that cannot be
    given = sorted(name for name in os.environ if name.startswith(("LLMKIT_", "VLLM_")))
    guesses = {n: nearest(n) for n in given if n not in KNOWN}
    guesses = {n: guess for n, guess in guesses.items() if n.startswith("LLMKIT_") or guess}
    if guesses:
        detail = "; ".join(f"llmkit does not know {n}" + (f", did you mean {g}?" if g else "") for n, g in guesses.items())
        fix = "   ".join(f"unset {n}" if g is None else f'export {g}="${n}"; unset {n}' for n, g in guesses.items())
        return [warn("variables", detail, fix)]
    seen = [f"{n}={short(Path(os.environ[n]))}" for n in given if n in KNOWN]
    others = [n for n in given if n not in KNOWN]
    return [ok("variables", "; ".join(seen + ([f"of vLLM, not read here: {', '.join(others)}"] if others else [])) or "none set")]


def nearest(name: str) -> str | None:
    """The variable that was meant, or None; prefixes alone make no two names alike."""
    words = {known.partition("_")[2]: known for known in sorted(KNOWN, reverse=True)}  # LLMKIT_'s where both are the same
    found = difflib.get_close_matches(name.partition("_")[2], words, n=1, cutoff=0.7)
    return words[found[0]] if found else None
