"""`record` and `check`: what a notebook leaves behind for tests, reports and readers.

Both write a scrap, the MIME payload that scrapbook defined, by hand (scrapbook itself takes three seconds to import), and add to
the JSON file named by LLMKIT_RESULTS. Without IPython they print, and nothing else changes.
"""

from __future__ import annotations

import html
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmkit.errors import CheckFailed

SCRAP_MIME = "application/scrapbook.scrap.json+json"
RESULTS_VARIABLE = "LLMKIT_RESULTS"
_CHECK_PREFIX = "check:"  # a scrap of this name is a check, any other a record


def record(name: str, value: Any) -> None:
    """Leave `value` (anything JSON can hold; numpy and torch scalars are unwrapped) in the notebook under `name`."""
    value = plain(value)
    _publish(name, value, f"{name} = {json.dumps(value, ensure_ascii=False)}")
    _save("records", name, value)


def check(name: str, cond: Any, hint: str = "") -> None:
    """Print whether `cond` holds, record it, and raise CheckFailed when it does not. `hint` says what to look at then."""
    ok = bool(cond)
    mark, colour = ("✓", "#1a7f37") if ok else ("✗", "#cf222e")
    face = f'<span role="img" aria-label="{"passed" if ok else "failed"}" style="color:{colour};font-weight:bold">{mark}</span>'
    _publish(_CHECK_PREFIX + name, ok, f"{mark} {name}", f"{face} {html.escape(name)}")
    _save("checks", name, ok)
    if not ok:
        raise CheckFailed(f"check {name!r} does not hold", hint or None)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tuples, sets and mappings are copied, one-element arrays and tensors unwrapped."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    unwrap = getattr(value, "tolist", None)  # numpy and torch, without importing either
    if unwrap is None:
        raise TypeError(f"record() holds JSON values; got {type(value).__name__}: pass a number, text, list or dict made of it")
    return unwrap()


def read_scraps(outputs: Iterable[dict[str, Any]]) -> tuple[dict[str, bool], dict[str, Any]]:
    """(checks, records) found in the outputs of executed cells."""
    checks: dict[str, bool] = {}
    records: dict[str, Any] = {}
    for output in outputs:
        scrap = output.get("data", {}).get(SCRAP_MIME)
        if scrap is None:
            continue
        name = scrap["name"]
        if name.startswith(_CHECK_PREFIX):
            checks[name.removeprefix(_CHECK_PREFIX)] = scrap["data"]
        else:
            records[name] = scrap["data"]
    return checks, records


def _publish(name: str, value: Any, text: str, rich: str | None = None) -> None:
    """Show `text` (and `rich`, its HTML face) with the scrap attached; plain print outside IPython."""
    if not _in_kernel():
        print(text)
        return
    from IPython.display import display

    scrap = {"name": name, "data": value, "encoder": "json", "version": 1}
    data = {"text/plain": text, SCRAP_MIME: scrap} | ({"text/html": rich} if rich else {})
    display(data, raw=True, metadata={"scrapbook": {"name": name, "data": True, "display": False}})


def _in_kernel() -> bool:
    """True in a notebook kernel; False in plain Python and in IPython's terminal, which would print the MIME types' names."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def _save(kind: str, name: str, value: Any) -> None:
    target = os.environ.get(RESULTS_VARIABLE)
    if not target:
        return
    path = Path(target)
    results = json.loads(path.read_text("utf-8")) if path.exists() else {"checks": {}, "records": {}}
    results[kind][name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")  # a reader never meets half a file
    draft.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")
    draft.replace(path)
