"""The lines of a batch file: what each asks, and what an answer looks like (OpenAI's API reference, "Batch")."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
ID_PREFIX = "batch_req_"


@dataclass(frozen=True)
class Task:
    """One line. id: made of the line itself, so that a second run knows it again wherever it stands. wrong: why it cannot be
    asked, None for a good line; then url and body are what to send."""

    id: str
    number: int
    custom_id: str | None = None
    url: str = ""
    body: dict[str, Any] | None = None
    wrong: str | None = None

    def answered(self, status: int, request_id: str, body: Any) -> dict[str, Any]:
        """The line of OUT for what a server said, errors included."""
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {"id": self.id, "custom_id": self.custom_id, "response": response, "error": None}

    def failed(self, code: str, message: str) -> dict[str, Any]:
        """The line of OUT for what no server could say anything about."""
        return {"id": self.id, "custom_id": self.custom_id, "response": None, "error": {"code": code, "message": message}}


def succeeded(line: dict[str, Any]) -> bool:
    """Whether a line of OUT holds an answer."""
    response = line.get("response")
    return isinstance(response, dict) and response.get("status_code") == 200


def read_tasks(path: Path) -> Iterator[Task]:
    """The tasks of a file, in order; blank lines are none. Raises ConfigError when it cannot be read."""
    times, seen = Counter[bytes](), dict[str, int]()
    for number, line in _lines(path):
        times[line] += 1
        digest = hashlib.sha256(line + b"\n%d" % times[line]).hexdigest()
        task = _task(ID_PREFIX + digest[:24], number, line)
        if task.custom_id is not None and (first := seen.setdefault(task.custom_id, number)) != number:
            task = Task(task.id, number, task.custom_id, wrong=f"custom_id {task.custom_id!r} is that of line {first} too")
        yield task


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line := line.strip(b" \t\r\n\xef\xbb\xbf" if number == 1 else None):  # a byte order mark is no JSON
                    yield number, line
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}", "give a file of JSON lines") from e


def _task(id: str, number: int, line: bytes) -> Task:
    try:
        fields = json.loads(line)
    except ValueError as e:
        return Task(id, number, wrong=f"it is not JSON: {e}")
    if not isinstance(fields, dict):
        return Task(id, number, wrong="it is not a JSON object")
    custom_id = fields.get("custom_id") if isinstance(fields.get("custom_id"), str) else None
    wrong = _fault(fields)
    return Task(id, number, custom_id, wrong=wrong) if wrong else Task(id, number, custom_id, fields["url"], fields["body"])


def _fault(fields: dict[str, Any]) -> str | None:
    """What is wrong with a line, in words; None when it can be asked."""
    body = fields.get("body")
    if not isinstance(fields.get("custom_id"), str) or not fields["custom_id"]:
        return "custom_id must be a text that is not empty"
    if fields.get("method", "POST") != "POST":
        return f"method must be POST; got {fields['method']!r}"
    if fields.get("url") not in ENDPOINTS:
        return f"url must be one of {', '.join(ENDPOINTS)}; got {fields.get('url')!r}"
    if not isinstance(body, dict):
        return "body must be an object: the request"
    return "stream must be false: a line is answered whole" if body.get("stream") else None
