"""What the processes of a server say to each other: msgpack messages, each behind its length, over pairs of Unix sockets.

The end of a socket is the end of a process: the kernel closes it however a process dies, and a pair of sockets has no name that
could be taken or left behind. Only of a process that hangs it tells nothing; for that there are signs of life (`pulse`).
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 18  # bytes read at a time


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages: an array whose first item is the class's name."""


# ---- supervisor and engine


class Start(Message):
    """To a new engine process: begin. config: fields of EngineConfig, `model` being a folder; name: what was asked for;
    alive_every: seconds between two signs of life, 0 for none."""

    config: dict[str, Any]
    name: str
    alive_every: float = 0.0


class Stage(Message):
    """A stage of the start begins; done: seconds of those before it."""

    name: str
    done: dict[str, float]


class Ready(Message):
    """The engine answers from now on. facts: of EngineFacts; rules: of prompts.Rules; info, for people: stages, memory plan."""

    facts: dict[str, Any]
    rules: dict[str, Any]
    info: dict[str, Any]


class Alive(Message):
    """The engine does not hang."""


class Failed(Message):
    """The start failed. kind: the error's class in llmkit.errors."""

    kind: str
    message: str
    hint: str | None


class NewFront(Message):
    """A socket to a front comes with this."""


# ---- supervisor and a front in a process of its own


class BeFront(Message):
    """To a new front: the listening socket and the file of the metrics come with this. It is number `number` of `count`.
    early: answer while it gets ready. plan: of `Plan.to_plain`."""

    plan: dict[str, Any]
    folder: str
    number: int
    count: int
    early: bool


class NewEngine(Message):
    """A socket to a ready engine comes with this."""

    ready: Ready


class EngineGone(Message):
    """The engine has died or not yet started; why, for the clients."""

    why: str


class FrontUp(Message):
    """From a front: it answers from now on."""


class Stop(Message):
    """End; open requests have this many seconds."""

    seconds: float


# ---- what all fronts share (`far_shelf`)


class OnShelf(Message):
    """From a front: do `act` ("keep", "settle", "fetch", "end", "drop"). otherwise: given with "keep" of what is still being
    made."""

    number: int
    act: str
    key: str
    data: bytes | None = None
    otherwise: bytes | None = None


class Told(Message):
    """To that front: act `number` is done."""

    number: int
    data: bytes | None = None


class EndRunning(Message):
    """To the front that makes it: stop that."""

    key: str


# ---- front and engine


class Add(Message):
    """A prompt with its `count` requests, whose handles are handle, handle + 1, ... prompt: int32 ids. params: what differs from
    SamplingParams(). pooling: "last" or "mean" when a vector is wanted and no tokens. read_along: as `Request`'s."""

    handle: int
    count: int
    id: str
    prompt: bytes
    params: dict[str, Any]
    stop_ids: tuple[int, ...] = ()
    bad_words: list[list[int]] = []
    seed: int = 0
    max_total: int = 0
    priority: int = 0
    arrival: float = 0.0
    pooling: str | None = None
    read_along: bool = True


class End(Message):
    """End these requests now: a stop string was found, or nobody waits any more."""

    handles: list[int]


class Begun(Message):
    """A request has its first token. prompt_logprobs: [token, logprob, rank] of the candidates at each position, first None."""

    handle: int
    num_cached: int
    scheduled: float | None
    first_token: float | None
    prompt_logprobs: list[list[tuple[int, float, int | None]] | None] | None = None


class Ended(Message):
    """A request has ended by itself. vector: float32, of one that wanted it."""

    handle: int
    reason: str | None
    stop_reason: int | None
    finished: float | None
    num_preemptions: int
    vector: bytes | None = None


class Step(Message):
    """All that one step gave the requests of one front. handles, tokens: int32 arrays of one length. logprobs: candidates of
    those among them that wanted some, as (position in handles, candidates)."""

    handles: bytes
    tokens: bytes
    logprobs: list[tuple[int, list[tuple[int, float, int | None]]]]
    begun: list[Begun]
    ended: list[Ended]
    stats: dict[str, Any]


class Refused(Message):
    """These requests have ended with an error. kind: the error's class in llmkit.errors."""

    handles: list[int]
    kind: str
    message: str
    hint: str | None = None
    param: str | None = None


AnyMessage = (
    Start | Stage | Ready | Alive | Failed | NewFront  # supervisor and engine
    | BeFront | NewEngine | EngineGone | FrontUp | Stop  # supervisor and front
    | OnShelf | Told | EndRunning
    | Add | End | Step | Refused  # front and engine
)  # fmt: skip
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AnyMessage)


class Gone(EOFError):
    """The process at the other end is gone."""


class Channel:
    """One end of a socket pair. Never blocks: what does not fit waits for `flush`, to be called when the socket is writable."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.files: deque[int] = deque()  # descriptors that came with messages, in order
        self._incoming = bytearray()
        self._outgoing: deque[tuple[memoryview, list[int]]] = deque()

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def full(self) -> bool:
        """Whether something waits for `flush`."""
        return bool(self._outgoing)

    def send(self, message: Message, files: tuple[int, ...] = ()) -> None:
        """Send, or remember. files: descriptors that go along; the caller closes its own. Raises Gone."""
        body = _encoder.encode(message)
        own = [os.dup(f) for f in files]  # kept until they are really sent
        self._outgoing.append((memoryview(_LENGTH.pack(len(body)) + body), own))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as it goes. Raises Gone."""
        while self._outgoing:
            data, files = self._outgoing[0]
            try:
                sent = socket.send_fds(self.socket, [data], files) if files else self.socket.send(data)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as e:
                raise Gone(str(e)) from e
            for f in files:
                os.close(f)
            self._outgoing.popleft()
            if sent < len(data):
                self._outgoing.appendleft((data[sent:], []))

    def receive(self) -> list[Any]:
        """The messages that are here by now. Raises Gone when there will be no more."""
        try:
            data, files, *_ = socket.recv_fds(self.socket, _CHUNK, 8)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as e:
            raise Gone(str(e)) from e
        if not data:
            raise Gone("the other end is closed")
        self.files.extend(files)
        self._incoming += data
        return self._messages()

    def _messages(self) -> list[Any]:
        found, at, buffer = [], 0, self._incoming
        while len(buffer) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer, at)
            if len(buffer) - at - _LENGTH.size < size:
                break
            at += _LENGTH.size
            found.append(_decoder.decode(bytes(buffer[at : at + size])))
            at += size
        del buffer[:at]
        return found

    def take_socket(self) -> socket.socket:
        """The socket that came with the message just read."""
        return socket.socket(fileno=self.files.popleft())

    def close(self) -> None:
        """Close this end and what was still to be sent."""
        for _, files in self._outgoing:
            for f in files:
                os.close(f)
        self._outgoing.clear()
        self.socket.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, one for each process."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
