"""`show_source`: a notebook shows the library's own code, so that nothing is hidden and nothing is written twice."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError


class Source:
    """The source of a function, class or module: highlighted in a notebook, plain text elsewhere."""

    def __init__(self, obj: Any) -> None:
        self.name, self.code, self.place = getattr(obj, "__qualname__", getattr(obj, "__name__", "")), *_read(obj)

    def __repr__(self) -> str:
        return f"# {self.place}\n{self.code}"

    def _repr_html_(self) -> str:
        from IPython.display import Code

        code = Code(self.code, language="python")._repr_html_().replace("<pre>", '<pre style="font-family: monospace">')
        return f"<small><code>{self.place}</code></small>{code}"


def show_source(obj: Any) -> Source:
    """Show where `obj` is defined and its code. As the last line of a cell it is displayed; `print` gives the text."""
    return Source(obj)


def _read(obj: Any) -> tuple[str, str]:
    """(code, "package/file.py:line")"""
    try:
        lines, start = inspect.getsourcelines(inspect.unwrap(obj) if callable(obj) else obj)
        file = Path(inspect.getfile(obj))
    except (TypeError, OSError) as e:
        raise ConfigError(f"there is no Python source for {obj!r}", "give a function, class or module written in Python") from e
    module = inspect.getmodule(obj)
    depth = len(module.__name__.split(".")) + (file.name == "__init__.py") if module else 1
    place = "/".join(file.parts[-depth:])  # the package's own path: where it is installed is nobody's business
    return textwrap.dedent("".join(lines)).rstrip() + "\n", f"{place}:{max(start, 1)}"
