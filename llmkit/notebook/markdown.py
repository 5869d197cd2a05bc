"""Markdown as a model writes it, to HTML that is safe in a trusted notebook.

JupyterLab runs scripts and handlers in the HTML and the Markdown of outputs that were just made. What a model says is not to be
trusted (it may repeat what a web page told it), so it is rendered here: HTML in it is shown as text, and links lead to web
pages only.
"""

from __future__ import annotations

import functools
from html import escape
from typing import Any


def markdown_html(text: str) -> str:
    """HTML of `text`; without the package markdown-it-py, the text as it is."""
    renderer = _renderer()
    return renderer.render(text) if renderer else f'<div style="white-space:pre-wrap">{escape(text)}</div>'


@functools.lru_cache(maxsize=1)
def _renderer() -> Any:
    try:
        from markdown_it import MarkdownIt
    except ModuleNotFoundError:
        return None
    renderer = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    renderer.disable("image")  # fetching one would tell its host what was said
    renderer.validateLink = lambda url: url.lower().startswith(("http://", "https://", "mailto:", "#"))
    return renderer
