"""Keeps the contract of `llmkit serve` (run file, stdin watch, SSE) without any model: for what does not depend on one.

Answers every chat by `echo: ` and the last message, a word an event, slowly when the message contains "slowly". LLMKIT_FAKE in
the environment makes it fail ("fail"), die without a word ("die"), or start slowly ("slow").
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

STATE: dict = {"state": "starting", "stages": {}, "stage": "import", "error": None}
ABORTED: list[str] = []  # texts of streams whose reader went away


def tell(path: str, **changes: object) -> None:
    STATE.update(changes)
    new = Path(f"{path}.tmp")
    new.write_text(json.dumps(STATE))
    new.rename(path)


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        stats = {"requests": 1, "aborted": len(ABORTED)}
        self._json({"/v1/models": {"data": [{"id": "fake-model"}]}, "/server_info": {"stats": stats}}.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        words = f"echo: {said} (of {len(body['messages'])})".split(" ")
        try:
            for i, word in enumerate(words):
                self._event({"choices": [{"index": 0, "delta": {"content": word + " " * (i < len(words) - 1)}}]})
                time.sleep(0.2 if "slowly" in said else 0.001)
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(words)}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            ABORTED.append(said)
        self.close_connection = True

    def _event(self, event: dict) -> None:
        self.wfile.write(b"data: " + json.dumps({"id": "x", "model": "fake-model"} | event).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        print(format % args, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("model", nargs="?", default="fake")
    parser.add_argument("--run-file", required=True)
    parser.add_argument("--watch-stdin", action="store_true")
    args, _ = parser.parse_known_args()
    mode, me = os.environ.get("LLMKIT_FAKE", ""), psutil.Process()
    print(f"fake server for {args.model}", flush=True)
    if mode == "die":
        sys.exit("something broke before anything could be said")
    tell(args.run_file, pid=me.pid, create_time=me.create_time(), argv=sys.argv, model=args.model)
    if mode == "fail":
        error = {"type": "ModelNotFoundError", "message": f"there is no model {args.model!r}", "hint": "llmkit list"}
        tell(args.run_file, state="failed", error=error)
        sys.exit(1)
    for stage in ("find the model", "weights"):
        tell(args.run_file, stage=stage)
        time.sleep(1.5 if mode == "slow" else 0.05)
        STATE["stages"][stage] = 0.1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True

    def leave(*_: object) -> None:
        tell(args.run_file, state="stopping")
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    if args.watch_stdin:
        threading.Thread(target=lambda: (sys.stdin.read(), leave()), daemon=True).start()
    port = server.server_port
    tell(args.run_file, state="ready", stage="", url=f"http://127.0.0.1:{port}", host="127.0.0.1", port=port,
         served_model_names=["fake-model"])  # fmt: skip
    server.serve_forever()


main()
