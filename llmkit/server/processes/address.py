"""Where a server listens: bound before anything else, so that a wrong port costs no start."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from llmkit.errors import ConfigError
from llmkit.server.processes.serve_options import ServeOptions

BACKLOG, MOST_FILES = 2048, 65536


def allow_many_connections() -> None:
    """Each is an open file, of which a shell often allows 1,024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(options: ServeOptions) -> socket.socket:
    """The listening socket. ConfigError when the address cannot be had."""
    return _listen_unix(options.uds) if options.uds else _listen_tcp(options.host, options.port)


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = min(found, key=lambda a: a[0] != socket.AF_INET)  # localhost is 127.0.0.1 first
    except socket.gaierror as e:
        raise ConfigError(f"--host {host} is no address: {e.strerror}", "use 127.0.0.1 (this machine) or 0.0.0.0 (all)") from e
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        raise ConfigError(f"port {port} on {host} cannot be listened on: {os.strerror(e.errno or 0)}{_who(port)}",
                          "--port 0 takes a free one") from e  # fmt: skip
    return sock


def _who(port: int) -> str:
    """The process that has the port, where the system tells."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                return f" (process {c.pid}, {psutil.Process(c.pid).name()}, has it)"
    return ""


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        _remove_dead_socket(path)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        raise ConfigError(f"--uds {path} cannot be listened on: {os.strerror(e.errno or 0)}", "name a new file") from e
    return sock


def _remove_dead_socket(path: str) -> None:
    """A socket that nobody listens on is left over from a server that was killed."""
    if not Path(path).exists() or not stat.S_ISSOCK(os.stat(path).st_mode):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) != 0:
            os.unlink(path)


def url_of(sock: socket.socket, options: ServeOptions) -> str:
    """What to type on this machine."""
    if options.uds:
        return f"unix:{options.uds}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{port}"
