"""Reading an HTTP/1.1 response as it comes in, whatever the network cut it into (RFC 9112)."""

from __future__ import annotations

from collections.abc import Callable

from llmkit.errors import ServerError

LONGEST_HEAD = 64 * 1024  # bytes of the status line and headers together
Reader = Callable[[], bytes | None]  # takes from the buffer what it can: a piece of the body, b"" for progress, None to wait


class Response:
    """One response. status: 0 until the head is there. headers: lower-case names. done: the body is whole."""

    def __init__(self) -> None:
        self.status, self.headers, self.done = 0, dict[str, str](), False
        self._buffer = bytearray()
        self._left = 0  # bytes that are still to come, of the body or of the chunk
        self._read: Reader = self._head

    def feed(self, data: bytes) -> list[bytes]:
        """Take what came in; the new pieces of the body. Raises ServerError for what is not HTTP."""
        self._buffer += data
        pieces: list[bytes] = []
        while not self.done and (piece := self._read()) is not None:
            if piece:
                pieces.append(piece)
        return pieces

    def end(self) -> bool:
        """The connection was closed; whether that leaves a whole response (one without a length ends so)."""
        self.done = self.done or (self.status != 0 and self._read == self._until_close)
        return self.done

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection may carry another request."""
        return self.done and self._read != self._until_close and self.headers.get("connection", "").lower() != "close"

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _head(self) -> bytes | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > LONGEST_HEAD:
                raise ServerError("the answer is not HTTP: its head does not end")
            return None
        first, *fields = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        status = _status(first)
        if status >= 200:  # 100 Continue and its like only announce the answer
            self.status = status
            self.headers = {name.strip().lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
            self._choose_body()
        return b""

    def _choose_body(self) -> None:
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self.done = True
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._read = self._chunk_size
        elif length is not None:
            self._left, self._read = _number(length, 10), self._counted
            self.done = self._left == 0
        else:
            self._read = self._until_close

    def _take(self) -> bytes:
        piece = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        self._left -= len(piece)
        return piece

    def _counted(self) -> bytes | None:
        piece = self._take()
        self.done = self._left == 0
        return piece or None

    def _until_close(self) -> bytes | None:
        self._left = len(self._buffer)
        return self._take() or None

    def _chunk_size(self) -> bytes | None:
        line = self._line()
        if line is None:
            return None
        self._left = _number(line.partition(b";")[0].decode("latin-1"), 16)
        self._read = self._chunk if self._left else self._trailer
        return b""

    def _chunk(self) -> bytes | None:
        piece = self._take()
        if not self._left:
            self._read = self._chunk_end
        return piece or None

    def _chunk_end(self) -> bytes | None:
        line = self._line()
        if line is None:
            return None
        self._read = self._chunk_size
        return b""

    def _trailer(self) -> bytes | None:
        line = self._line()
        if line is None:
            return None
        self.done = not line
        return b""


def _status(line: str) -> int:
    """"HTTP/1.1 200 OK" -> 200"""
    words = line.split(" ", 2)
    if not words[0].startswith("HTTP/1.") or len(words) < 2 or not words[1].isdecimal():
        raise ServerError(f"the answer is not HTTP/1.1: it begins with {line[:60]!r}", "is it https, or another kind of server?")
    return int(words[1])


def _number(text: str, base: int) -> int:
    try:
        return int(text.strip(), base)
    except ValueError:
        raise ServerError(f"the answer is not HTTP/1.1: {text[:40]!r} is no length") from None
