"""A finding is one line of the doctor's card; a report is the card, as text, HTML and JSON."""

from __future__ import annotations

import html
import json
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum


class Status(StrEnum):
    """OK: nothing to do. WARN: something works less well, or not at all, but models run. FAIL: models will not run."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """fix: the command that mends it; present with WARN and FAIL, and with OK where something could be better."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def ok(name: str, detail: str, fix: str | None = None) -> Finding:
    return Finding(name, Status.OK, detail, fix)


def warn(name: str, detail: str, fix: str) -> Finding:
    return Finding(name, Status.WARN, detail, fix)


def fail(name: str, detail: str, fix: str) -> Finding:
    return Finding(name, Status.FAIL, detail, fix)


MARKS = {Status.OK: "✓", Status.WARN: "!", Status.FAIL: "✗"}
ANSI = {Status.OK: "32", Status.WARN: "33", Status.FAIL: "31"}
# Colours with a contrast of at least 4.5 on white and on Jupyter's dark grey.
BADGES = {Status.OK: "#1a7f37", Status.WARN: "#9a6700", Status.FAIL: "#cf222e"}
BADGE = "display:inline-block;width:4.5em;white-space:nowrap;text-align:center;border-radius:4px;color:white;font-weight:bold"
WIDTH = 118  # characters of a line of text


@dataclass(frozen=True)
class Report:
    """The findings in order. `report["torch"]` is one of them; `report.ok` says that nothing failed."""

    findings: tuple[Finding, ...]
    seconds: float
    version: str

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """Names of the findings that keep models from running."""
        return [f.name for f in self.findings if f.status is Status.FAIL]

    def __getitem__(self, name: str) -> Finding:
        return {f.name: f for f in self.findings}[name]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def summary(self) -> str:
        """`llmkit 0.1.0 · 17 OK · 1 WARN · 0 FAIL · 0.6 s`"""
        counts = Counter(f.status for f in self.findings)
        return " · ".join([f"llmkit {self.version}", *(f"{counts[s]} {s}" for s in Status), f"{self.seconds:.1f} s"])

    def text(self, colour: bool = False) -> str:
        """One block of lines a finding, the fix behind an arrow, and the summary."""
        width = max((len(f.name) for f in self.findings), default=0)
        return "\n".join([*(_lines(f, width, colour) for f in self.findings), self.summary()])

    __str__ = __repr__ = text

    def to_dict(self) -> dict[str, object]:
        """What `llmkit doctor --json` prints."""
        return {"llmkit": self.version, "ok": self.ok, "seconds": round(self.seconds, 3), "findings": [asdict(f) for f in self]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)

    def _repr_html_(self) -> str:
        rows = "".join(map(_row, self.findings))
        caption = f'<caption style="caption-side:bottom;text-align:left;padding:6px 0">{html.escape(self.summary())}</caption>'
        return f'<table aria-label="llmkit doctor" style="font-size:13px;border-collapse:collapse">{caption}{rows}</table>'


def _lines(finding: Finding, width: int, colour: bool) -> str:
    mark = f"{MARKS[finding.status]} {finding.status:<4}"
    head = f"{mark}  {finding.name:<{width}}  "
    lines = textwrap.wrap(finding.detail, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
    text = lines[0].replace(mark, f"\x1b[{ANSI[finding.status]}m{mark}\x1b[0m", 1) if colour else lines[0]
    fix = [f"{' ' * len(head)}-> {finding.fix}"] if finding.fix else []  # in one line, to be copied
    return "\n".join([text, *lines[1:], *fix])


def _row(finding: Finding) -> str:
    badge = f'<span style="{BADGE};background:{BADGES[finding.status]}">{MARKS[finding.status]} {finding.status}</span>'
    fix = ""
    if finding.fix:
        arrow, code = '<span aria-label="to mend it">→</span>', 'style="background:rgba(128,128,128,.15);padding:1px 4px"'
        fix = f"<br>{arrow} <code {code}>{html.escape(finding.fix)}</code>"
    cell = 'style="text-align:left;vertical-align:top;padding:4px 10px 4px 0"'
    name = f'<th scope="row" {cell}>{html.escape(finding.name)}</th>'
    return f"<tr><td {cell}>{badge}</td>{name}<td {cell}>{html.escape(finding.detail)}{fix}</td></tr>"
