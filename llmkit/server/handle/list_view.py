"""The servers on this machine as a table, in text and HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from llmkit.server.handle.card import BADGES, MARKS, age_text, owner_text
from llmkit.server.handle.server import Server, records

COLUMNS = ("state", "model", "address", "process", "age", "owner")


class Servers(list[Server]):
    """A list of servers that shows what each of them does now."""

    def rows(self) -> list[tuple[str, ...]]:
        """A text for each column."""
        known = [(s, s.record) for s in self]
        return [(f"{MARKS[r.state]} {r.state}", r.name, f"{r.url}/v1" if r.url else "", f"pid {r.pid}", age_text(r),
                 owner_text(r, s.started_here)) for s, r in known]  # fmt: skip

    def __repr__(self) -> str:
        if not self:
            return "no server is running"
        rows = [COLUMNS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        if not self:
            return "no server is running: <code>%llmkit serve</code> starts one"
        left = 'style="text-align:left"'
        head = "".join(f'<th scope="col" {left}>{name}</th>' for name in COLUMNS)
        rows = [_badge(row[0]) + "".join(f"<td {left}>{escape(text)}</td>" for text in row[1:]) for row in self.rows()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f'<table aria-label="servers on this machine"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _badge(state: str) -> str:
    colour = BADGES[state.split()[-1]]
    style = f"background:{colour};color:#fff;border-radius:4px;padding:1px 8px;font-weight:600"
    return f'<td style="text-align:left"><span style="{style}">{state}</span></td>'


def servers(gone: bool = False) -> Servers:
    """Those that run, the newest first; gone: also those that do not any more."""
    return Servers(Server(r.folder) for r in records.all_records() if gone or r.alive)


def status_json(found: Servers) -> list[dict[str, Any]]:
    """What `llmkit status --json` prints."""
    known = [s.record for s in found]
    return [{"model": r.name, "state": r.state, "url": r.url, "pid": r.pid, "owner": r.owner[0] if r.owner else None,
             "log": str(r.log) if r.log else None, "stages": r.stages, "error": r.error} for r in known]  # fmt: skip
