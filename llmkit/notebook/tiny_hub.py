"""A model hub on 127.0.0.1 that has one model and speaks ModelScope's language, for showing what happens when a line breaks.

    with TinyHub(folder, "tiny/model", cuts=[40_000_000]) as hub:
        os.environ["MODELSCOPE_ENDPOINT"] = hub.address
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PIECE = 1 << 18  # bytes between two looks at the clock


class TinyHub:
    """Serves the files of `folder` as the model `id`. It counts what it sends (`sent`, bytes of files) and is asked (`asked`).

    cuts: for each number, one answer that is longer breaks off after so many bytes. speed: bytes a second; 0: no limit.
    """

    def __init__(self, folder: Path, id: str, cuts: Iterable[int] = (), speed: float = 0) -> None:
        self.files = {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")}
        self.sha256 = {name: _digest(p) for name, p in self.files.items()}
        self.id, self.cuts, self.speed, self.sent, self.asked = id, list(cuts), speed, 0, 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> TinyHub:
        """Answer from now on, in a thread."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> TinyHub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def size(self) -> int:
        """Bytes of the whole model."""
        return sum(p.stat().st_size for p in self.files.values())

    def listing(self) -> dict[str, object]:
        """The model's files as ModelScope lists them."""
        rows = [{"Path": n, "Name": n, "Type": "blob", "Size": p.stat().st_size, "Sha256": self.sha256[n]}
                for n, p in self.files.items()]  # fmt: skip
        return {"Code": 200, "Success": True, "Data": {"Files": rows}}


class _Answers(BaseHTTPRequestHandler):
    hub: TinyHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.asked += 1
        url = urlsplit(self.path)
        name = parse_qs(url.query).get("FilePath", [""])[0]
        if url.path == f"/api/v1/models/{self.hub.id}/repo/files":
            self._json(200, self.hub.listing())
        elif url.path == f"/api/v1/models/{self.hub.id}/repo" and name in self.hub.files:
            self._file(self.hub.files[name])
        else:
            self._json(404, {"Code": 10010205001, "Success": False, "Message": "not here"})

    def _json(self, code: int, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(code, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _file(self, path: Path) -> None:
        """The file from the byte that `Range` names: that is all a client needs to go on after a cut."""
        size, asked = path.stat().st_size, re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        part = {"Content-Range": f"bytes {begin}-{size - 1}/{size}"} if asked else {}
        self._head(206 if asked else 200, part | {"Content-Length": str(size - begin)})
        cut = next((n for n in self.hub.cuts if n < size - begin), None)
        if cut is not None:
            self.hub.cuts.remove(cut)
        self._send(path, begin, size if cut is None else begin + cut)
        self.close_connection = self.close_connection or cut is not None

    def _send(self, path: Path, begin: int, end: int) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            while piece := file.read(min(PIECE, end - file.tell())):
                try:
                    self.wfile.write(piece)
                except ConnectionError:  # the client went away, which is what is being shown
                    self.close_connection = True
                    return
                self.hub.sent += len(piece)
                time.sleep(len(piece) / self.hub.speed if self.hub.speed else 0)

    def _head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet: the notebook shows what counts."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
