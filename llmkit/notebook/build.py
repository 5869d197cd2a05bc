"""Build the committed notebooks: run at tier=cpu, then wash off whatever differs between two runs or two machines.

`build` is the only way outputs get into git. `problems` is what the tests ask of every committed notebook, `zh_problems` what
they ask of a Chinese twin: same cell ids, same code, same outputs, prose written for the present English text.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import llmkit
from llmkit.errors import LlmkitError
from llmkit.notebook.run import notebook_parameters, read_notebook, run_notebook

MAX_NOTEBOOK, MAX_OUTPUT = 200_000, 60_000  # bytes
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
METADATA = {"kernelspec": _KERNEL, "language_info": {"name": "python"}}
MEASURED = "measured"  # a cell with this tag keeps its durations and rates: they are its point
_DROPPED_CELLS = {"injected-parameters", "papermill-error-cell-tag"}
_WIDGETS = "application/vnd.jupyter.widget"
_SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_RULES = [(re.compile(pattern), new) for pattern, new in (
    (r"\b0x[0-9a-f]{6,16}\b", "0x…"),
    (r"\b(pid[ =:]+)\d+", r"\1…"),
    (r"\b(127\.0\.0\.1|localhost|0\.0\.0\.0|\[::1\]):\d+", r"\1:…"),
    (r"\b(port[ =:]+)\d{4,5}\b", r"\1…"),
    (r"\b((?:chat)?cmpl-|call_)[0-9a-f]{16,32}\b", r"\1…"),
    (r'("created": ?)\d{10}\b', r"\1…"),
)]
_MEASUREMENTS = [(re.compile(pattern), new) for pattern, new in (
    (r"\b\d+(\.\d+)? ?(ms|µs|us|ns)\b", r"… \2"),
    (r"\b\d+\.\d+ ?(s|sec|seconds|min)\b", r"… \1"),
    (r"\b[\d,]+(\.\d+)? ?((tokens?|tok|requests?|req|it|GB|GiB|MB|MiB|[GT]FLOP)/s)", r"… \2"),
)]
_SVG_DATE = re.compile(r"<dc:date>.*?</dc:date>", re.S)
_SVG_ID = re.compile(r'\bid="((?:[a-zA-Z]+)?[0-9a-f]{8,})"')


class NotebookBuildError(LlmkitError, ValueError):
    """A notebook failed while it was built, or what came out may not be committed."""


def build(path: str | os.PathLike[str], run: bool = True, stamp: bool = False) -> list[Path]:
    """Rebuild the notebook at `path` in place, then its twin in `zh/` where there is one; the files written.

    run=False keeps the outputs as they are. stamp=True declares the Chinese prose up to date with the English text; without it,
    a cell whose English text changed stays marked as stale. Raises NotebookBuildError when a cell fails or a rule is broken.
    """
    source = Path(path).resolve()
    english = sanitise(_run(source) if run else read_notebook(source))
    _refuse(source, problems(english))
    written = [_write(source, english)]
    twin = source.parent / "zh" / source.name
    if twin.exists():
        written.append(_write(twin, translate(english, read_notebook(twin), stamp)))
    return written


def _run(source: Path) -> Any:
    parameters = {"tier": "cpu"} if "tier" in notebook_parameters(source) else {}
    with tempfile.TemporaryDirectory(prefix="llmkit-build-") as out:
        result = run_notebook(source, parameters, out)
        if result.error:
            raise NotebookBuildError(f"{source.name} failed at tier=cpu: {result.error}", f"llmkit run {source.name} --tier cpu")
        return read_notebook(result.path)


def _refuse(source: Path, found: list[str]) -> None:
    if found:
        raise NotebookBuildError(f"{source.name} may not be committed:\n  " + "\n  ".join(found))


def _write(path: Path, nb: Any) -> Path:
    path.write_text(serialise(nb), "utf-8")
    return path


def serialise(nb: Any) -> str:
    """The bytes of a committed notebook: sorted keys, one space of indentation, lines as lists, a final newline."""
    import nbformat

    return nbformat.v4.writes(nb).rstrip("\n") + "\n"  # unlike nbformat.writes it repairs nothing behind our back


# ---- the sanitiser


def sanitise(nb: Any) -> Any:
    """A copy of `nb` that is the same whoever built it, wherever and whenever."""
    nb = copy.deepcopy(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = type(nb.metadata)(copy.deepcopy(METADATA))
    nb.cells = [c for c in nb.cells if not _DROPPED_CELLS & set(c.metadata.get("tags", ()))]
    count = 0
    for cell in nb.cells:
        cell.metadata = type(nb.metadata)({k: v for k, v in cell.metadata.items() if k in ("tags", "llmkit") and v})
        if cell.cell_type == "code":
            count += 1
            _sanitise_outputs(cell, count)
    return nb


def _sanitise_outputs(cell: Any, count: int) -> None:
    measured = MEASURED in cell.metadata.get("tags", ())
    cell.execution_count = count if cell.execution_count or cell.outputs else None
    cell.outputs = _merge_streams(cell.outputs)
    for number, output in enumerate(cell.outputs):
        if "execution_count" in output:
            output.execution_count = count
        if "text" in output:
            output.text = steady(_last_lines(output.text), measured)
        if "data" in output:
            kept = {mime: value for mime, value in output.data.items() if not mime.startswith(_WIDGETS)}
            output.data = {mime: _sanitise_data(mime, value, measured, f"{cell.id}-{number}") for mime, value in kept.items()}
            output.metadata = {k: v for k, v in output.metadata.items() if k == "scrapbook"}


def _sanitise_data(mime: str, value: Any, measured: bool, place: str) -> Any:
    if mime == "image/svg+xml":
        return steady_svg(value, place)
    if mime.startswith("text/"):
        return steady(value, measured)
    return value


def _merge_streams(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of one stream become one output: where the kernel happened to flush is chance."""
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def _last_lines(text: str) -> str:
    """What a terminal shows in the end of text that returns to the line's start."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def steady(text: str, measured: bool = False) -> str:
    """`text` without addresses, ports, pids and places; without measurements too, unless they are wanted (`measured`)."""
    for place, name in _places():
        text = text.replace(place, name)
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[\w.+-]+", "/tmp/…", text)
    for pattern, new in _RULES + ([] if measured else _MEASUREMENTS):
        text = pattern.sub(new, text)
    return text


def _places() -> list[tuple[str, str]]:
    """Folders of this machine, innermost first, and what to call them."""
    checkout = str(Path(llmkit.__file__).resolve().parents[1])
    named = {sys.prefix: "<environment>", checkout: "<llmkit>", str(Path.home()): "~"}
    return sorted(((k, v) for k, v in named.items() if len(k) > 1), key=lambda kv: -len(kv[0]))


def steady_svg(svg: str, place: str) -> str:
    """An SVG with a fixed date and with ids numbered in order of appearance. place: begins them, for a page that holds several
    pictures knows each id once, and would clip one by the other's frame."""
    svg = _SVG_DATE.sub("<dc:date></dc:date>", svg)
    names = {old: f"{place}-{number}" for number, old in enumerate(dict.fromkeys(_SVG_ID.findall(svg)))}
    if not names:
        return svg
    pattern = re.compile(r'(\bid="|#)(' + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r')(?=["\')])')
    return pattern.sub(lambda m: m[1] + names[m[2]], svg)


# ---- the Chinese twin


def stamp_of(source: str) -> str:
    """The hash of an English text cell that its translation carries."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def translate(english: Any, chinese: Any, stamp: bool = False) -> Any:
    """The Chinese twin of `english`: its code, outputs and order, with the prose of `chinese`.

    A cell that `chinese` lacks comes in English and unstamped, which `zh_problems` reports as stale.
    """
    prose = {c.id: c for c in chinese.cells if c.cell_type == "markdown"}
    twin = copy.deepcopy(english)
    for cell in twin.cells:
        if cell.cell_type != "markdown":
            continue
        old = prose.get(cell.id)
        mark = stamp_of(cell.source) if stamp and old else old.metadata.get("llmkit", {}).get("source", "") if old else ""
        cell.metadata["llmkit"] = {"source": mark}
        cell.source = old.source if old else cell.source
    return twin


def zh_problems(english: Any, chinese: Any) -> list[str]:
    """What is wrong with a Chinese twin, cell by cell."""
    if (ids := [c.id for c in english.cells]) != (twins := [c.id for c in chinese.cells]):
        return [f"cells differ: missing {sorted(set(ids) - set(twins))}, extra {sorted(set(twins) - set(ids))}, or another order"]
    return [f"cell {en.id}: {what}" for en, zh in zip(english.cells, chinese.cells) if (what := _twin_problem(en, zh))]


def _twin_problem(en: Any, zh: Any) -> str:
    if en.cell_type != zh.cell_type:
        return f"is {zh.cell_type}, not {en.cell_type}"
    if en.cell_type == "code":
        return "code differs" if en.source != zh.source else "outputs differ" if en.outputs != zh.outputs else ""
    return "" if zh.metadata.get("llmkit", {}).get("source") == stamp_of(en.source) else "translation is stale"


# ---- what may be committed


def problems(nb: Any) -> list[str]:
    """Everything that forbids committing `nb`; an empty list when it may go in."""
    found = [] if (nb.nbformat, nb.nbformat_minor) == (4, 5) else [f"format is {nb.nbformat}.{nb.nbformat_minor}, not 4.5"]
    found += [] if nb.metadata == METADATA else [f"metadata holds more than the kernelspec: {', '.join(nb.metadata)}"]
    ids = [c.get("id", "") for c in nb.cells]
    found += [f"cell id {i!r} is not a slug such as kv-03-alloc" for i in ids if not _SLUG.fullmatch(i) or _UUID.fullmatch(i)]
    found += [f"cell id {i!r} is used twice" for i in sorted({i for i in ids if ids.count(i) > 1})]
    found += [f"cell {c.id}: {what}" for c in nb.cells for what in _cell_problems(c)]
    size = len(serialise(nb).encode())
    return found + ([f"the notebook has {size:,} bytes; at most {MAX_NOTEBOOK:,}"] if size > MAX_NOTEBOOK else [])


def _cell_problems(cell: Any) -> list[str]:
    found = [f"metadata {key!r}" for key in cell.metadata if key not in ("tags", "llmkit")]
    for output in cell.get("outputs", ()):
        size = len(str(output.get("data") or output.get("text") or "").encode())
        found += [f"an output has {size:,} bytes; at most {MAX_OUTPUT:,}"] if size > MAX_OUTPUT else []
        found += ["an error output"] if output.output_type == "error" else []
        found += [f"output {mime!r} needs a live kernel" for mime in output.get("data", ()) if mime.startswith(_WIDGETS)]
    return found
