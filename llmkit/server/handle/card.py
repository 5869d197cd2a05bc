"""How a `Server` looks: text for a prompt, a saved notebook and a log; HTML in Jupyter's own colours, light and dark."""

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING

from llmkit.hub.progress import duration_text

if TYPE_CHECKING:
    from llmkit.server.handle.records import Record
    from llmkit.server.handle.server import Server

TOTAL = "until ready"  # a stage that holds all the others
MARKS = {"starting": "…", "ready": "●", "failed": "✗", "stopping": "…", "stopped": "○", "died": "✗"}
# White on these has a contrast of at least 4.5, on a light page and on a dark one.
BADGES = {"starting": "#0969da", "ready": "#1a7f37", "failed": "#cf222e", "stopping": "#9a6700", "stopped": "#57606a",
          "died": "#cf222e"}  # fmt: skip
_CARD = ("border:1px solid var(--jp-border-color2,#8a8f98);border-radius:6px;padding:10px 14px;max-width:48em;line-height:1.6;"
         "color:var(--jp-ui-font-color1,inherit);background:var(--jp-layout-color1,transparent);"
         "font-family:var(--jp-ui-font-family,sans-serif);font-size:var(--jp-ui-font-size1,13px)")  # fmt: skip
_QUIET = "color:var(--jp-ui-font-color2,inherit)"
_CODE = "font-family:var(--jp-code-font-family,monospace);color:inherit"


def card_text(server: Server) -> str:
    """State, model, address and what the start took, in two to four lines."""
    r = server.record
    head = f"{MARKS[r.state]} llmkit server {r.state}: {r.name}"
    where = f"  {r.url}/v1 · pid {r.pid} · {owner_text(r, server.started_here)}" if r.alive and r.url else ""
    return "\n".join(filter(None, [head, where, _text_line(stages_text(r)), _text_line(_what_next(server, r))]))


def _text_line(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def stages_text(r: Record) -> str:
    """`ready in 3.2 s: weights 2.1 s, KV cache 0.1 s` (what took no time is left out), or the stage that runs now."""
    stages = dict(r.stages)
    total = stages.pop(TOTAL, sum(stages.values()))
    done = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items() if seconds >= 0.05)
    if r.state == "starting":
        now = f"now: {r.stage or 'starting the process'} ({max(0.0, time.time() - r.started):.1f} s so far)"
        return f"{done}; {now}" if done else now
    return f"{'was ' * (r.state == 'stopped')}ready in {total:.1f} s: {done}" if done and TOTAL in r.stages else ""


def owner_text(r: Record, started_here: bool) -> str:
    """With whom it ends."""
    if r.owner is None:
        return "on its own"
    return "ends with this process" if started_here else f"ends with process {r.owner[0]}"


def age_text(r: Record) -> str:
    return duration_text(max(0.0, time.time() - r.started))


def _what_next(server: Server, r: Record) -> str:
    if r.state in ("failed", "died"):
        e = server.error()
        return f"{type(e).__name__}: {e.message}" + (f"\n-> {e.hint}" if e.hint else "")
    return "" if r.alive else "start it again: llmkit.serve(...), %llmkit serve"


def card_html(server: Server) -> str:
    """The same as a card. Nothing in it runs, so it looks alike live, saved and exported."""
    r = server.record
    badge = (f'<span style="background:{BADGES[r.state]};color:#fff;border-radius:4px;padding:1px 8px;font-weight:600">'
             f"{MARKS[r.state]} {r.state}</span>")  # fmt: skip
    head = f'<div>{badge} <b style="margin-left:6px">{escape(r.name)}</b>{_link(r)}</div>'
    rows = [head, _progress(r), _quiet(stages_text(r)), _quiet(_process(server, r)), _failure(server, r)]
    label = f"llmkit server {r.state}: {r.name}"
    return f'<div role="group" aria-label="{escape(label)}" style="{_CARD}">{"".join(rows)}</div>'


def _link(r: Record) -> str:
    if r.state != "ready":
        return ""
    link = f'<a href="{escape(r.url)}/" target="_blank" rel="noopener" style="margin-left:10px">chat page</a>'
    return f'{link} <code style="{_CODE};margin-left:10px;background:transparent">{escape(r.url)}/v1</code>'


def _progress(r: Record) -> str:
    if r.state != "starting":
        return ""
    return f'<progress aria-label="{escape(r.stage or "starting")}" style="width:100%;height:6px"></progress>'


def _quiet(text: str) -> str:
    return f'<div style="{_QUIET}">{escape(text)}</div>' if text else ""


def _process(server: Server, r: Record) -> str:
    return f"pid {r.pid} · {owner_text(r, server.started_here)}" if r.alive else ""


def _failure(server: Server, r: Record) -> str:
    if r.alive:
        return ""
    said = escape(_what_next(server, r))
    log = server.logs(30) if r.state in ("failed", "died") else ""
    more = (f'<details><summary>log</summary><pre style="max-height:20em;overflow:auto;{_CODE}">{escape(log)}</pre></details>'
            if log else "")  # fmt: skip
    return f'<div role="alert" style="white-space:pre-wrap">{said}</div>{more}'
