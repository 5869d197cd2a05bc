"""A hub on 127.0.0.1 that speaks ModelScope's and Hugging Face's protocols to their real clients, well or badly."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40
LFS = 1000  # bytes from which Hugging Face keeps a file as LFS


def safetensors(data: bytes) -> bytes:
    """A sound file of one uint8 tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Manners:
    """How the hub behaves. cuts: bytes after which the next answers with more than that many break off."""

    cuts: list[int] = field(default_factory=list)
    busy: int = 0  # so many file requests are answered 503, Retry-After: 0
    busy_listing: int = 0
    ignores_range: bool = False
    redirect: str = ""  # files lie at this address
    stalls: list[int] = field(default_factory=list)  # like cuts, but the line stays open and silent
    pace: float = 0.0  # seconds per 64 KiB
    served: dict[str, bytes] = field(default_factory=dict)  # what is sent instead of a file's content
    sizes: dict[str, int] = field(default_factory=dict)  # lies in the listing
    extra: list[dict] = field(default_factory=list)  # further entries of the listing, as they are
    refuse: int = 0  # status for all but public listings
    refuse_listing: int = 0


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that die or lose patience are what is tested here
            super().handle_error(request, client_address)


class FakeHub:
    """models: id -> path -> content. Counts what it was asked for and how many bytes of files it sent."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.manners = Manners()
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.sent = 0
        self.lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), type("Mine", (Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def forget(self) -> None:
        self.requests, self.headers, self.sent = [], [], 0

    def file_requests(self) -> list[str]:
        return [path for method, path in self.requests if method == "GET" and ("FilePath=" in path or "/resolve/" in path)]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        with hub.lock:
            hub.requests.append((self.command, self.path))
            hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        modelscope = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", url.path)
        api = re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", url.path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url.path)
        if not (modelscope or api or file):
            return self.answer(404)
        model_id = (modelscope or api or file)[1]
        revision = query.get("Revision", "master") if modelscope else (api or file)[2 if file else 3]
        if model_id not in hub.models:
            return self.answer(404, {"Code": 10010205001, "Success": False}, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("master", "main", COMMIT):
            return self.answer(404, {"Code": 10010205001, "Success": False}, {"X-Error-Code": "RevisionNotFound"})
        if (modelscope and modelscope[2]) or api:
            return self.listing(model_id, api[2] if api else "modelscope")
        return self.file(model_id, query["FilePath"] if modelscope else unquote(file[3]))

    do_HEAD = do_GET

    def listing(self, model_id: str, dialect: str) -> None:
        manners, files = self.hub.manners, self.hub.models[model_id]
        if manners.refuse_listing:
            return self.answer(manners.refuse_listing, {}, {"X-Error-Code": "GatedRepo"} if manners.refuse_listing == 403 else {})
        if manners.busy_listing > 0:
            manners.busy_listing -= 1
            return self.answer(503, {}, {"Retry-After": "0"})
        sizes = {n: manners.sizes.get(n, len(c)) for n, c in files.items()}
        if dialect == "modelscope":
            rows = [{"Path": n, "Name": n, "Type": "blob", "Size": sizes[n], "Sha256": sha256(c)} for n, c in files.items()]
            return self.answer(200, {"Code": 200, "Success": True, "Data": {"Files": rows + manners.extra}})
        if dialect == "revision":
            return self.answer(200, {"id": model_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]})
        rows = [{"type": "file", "path": n, "size": sizes[n], "oid": git_sha1(c)} for n, c in files.items()]
        for row in rows:
            if len(files[row["path"]]) >= LFS:
                row["lfs"] = {"oid": sha256(files[row["path"]]), "size": row["size"], "pointerSize": 130}
        return self.answer(200, rows + manners.extra)

    def file(self, model_id: str, path: str) -> None:
        manners, content = self.hub.manners, self.hub.models[model_id].get(path)
        if content is None:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        if manners.refuse:
            return self.answer(manners.refuse, {}, {"X-Error-Code": "GatedRepo"} if manners.refuse == 403 else {})
        if manners.busy > 0 and self.command == "GET":
            manners.busy -= 1
            return self.answer(503, {}, {"Retry-After": "0"})
        large = len(content) >= LFS
        etag = {"ETag": f'"{sha256(content) if large else git_sha1(content)}"', "X-Repo-Commit": COMMIT}
        if manners.redirect:
            return self.answer(302, {}, etag | {"Location": manners.redirect + self.path, "X-Linked-Size": str(len(content))})
        self.send(manners.served.get(path, content), etag)

    def send(self, body: bytes, headers: dict[str, str]) -> None:
        begin, asked = 0, re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not self.hub.manners.ignores_range:
            begin = int(asked[1])
            if begin >= len(body):
                return self.answer(416, {}, {"Content-Range": f"bytes */{len(body)}"})
            headers |= {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
        self.head(206 if begin else 200, headers | {"Content-Length": str(len(body) - begin)})
        if self.command == "GET":
            self.body(body[begin:])

    def body(self, body: bytes) -> None:
        manners = self.hub.manners
        with self.hub.lock:
            stall = next((n for n in manners.stalls if n < len(body)), None)
            cut = next((n for n in manners.cuts if n < len(body)), None) if stall is None else None
            if stall is not None:
                manners.stalls.remove(stall)
            if cut is not None:
                manners.cuts.remove(cut)
        body = body[: stall if stall is not None else cut]
        for at in range(0, len(body), 1 << 16):
            with contextlib.suppress(OSError):
                self.wfile.write(body[at : at + (1 << 16)])
                self.wfile.flush()
                with self.hub.lock:
                    self.hub.sent += len(body[at : at + (1 << 16)])
            time.sleep(manners.pace)
        if stall is not None:
            time.sleep(3)
        self.close_connection = self.close_connection or cut is not None or stall is not None

    def answer(self, code: int, value: object = None, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value if value is not None else {}).encode()
        self.head(code, {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {}))
        if self.command == "GET":
            self.wfile.write(body)

    def head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""
