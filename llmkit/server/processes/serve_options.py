"""What a server can be told about its place in the machine: address, certificates, processes, signals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmkit.config import EngineConfig
from llmkit.errors import ConfigError
from llmkit.server.options import ServerOptions, option

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True)
class ServeOptions:
    """Options of `llmkit serve` that neither the engine nor the endpoints need. Times are seconds."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen on; 0 takes a free one", at_least=0)
    uds: str | None = option(None, "Unix socket to listen on instead of a port")
    ssl_keyfile: str | None = option(None, "key of the certificate, a .pem file")
    ssl_certfile: str | None = option(None, "certificate, a .pem file; makes the server speak HTTPS")
    ssl_ca_certs: str | None = option(None, "certificates that clients' ones must be signed by")
    ssl_cert_reqs: int = option(0, "whether clients need certificates: 0 no, 1 optional, 2 required", at_least=0)
    ssl_keyfile_password: str | None = option(None, "password of the key")
    api_server_count: int = option(1, "processes that speak HTTP", at_least=1)
    shutdown_timeout: float = option(10.0, "seconds that open requests have after SIGTERM or Ctrl-C; a second one ends at once",
                                     at_least=0)
    engine_timeout: float = option(120.0, "seconds without a sign of life after which the engine counts as hung, is killed and "
                                   "replaced; 0: never", at_least=0)
    keep_alive_timeout: float = option(30.0, "seconds after which an idle connection is closed", at_least=1)
    log_level: str = option("warning", "what is logged to stderr; info adds a line for each request", LOG_LEVELS)
    run_file: str | None = option(None, "JSON file that tells how the server is, for whoever started it")
    watch_stdin: bool = option(False, "end when stdin is closed")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if meta["choices"] and value not in meta["choices"]:
                raise ConfigError(f"{f.name} must be one of {', '.join(meta['choices'])}; got {value!r}")
            if meta["at_least"] is not None and not value >= meta["at_least"]:
                raise ConfigError(f"{f.name} must be at least {meta['at_least']:g}; got {value!r}")
        if self.port > 65535:
            raise ConfigError(f"port must be at most 65535; got {self.port}")
        if bool(self.ssl_keyfile) > bool(self.ssl_certfile):
            raise ConfigError("ssl_keyfile needs ssl_certfile", "give the certificate, too")


@dataclass(frozen=True)
class Plan:
    """All that `llmkit serve` was told."""

    engine: EngineConfig
    server: ServerOptions
    serving: ServeOptions

    def to_plain(self) -> dict[str, Any]:
        """As plain data, for another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Plan:
        """Back from `to_plain`."""
        return cls(EngineConfig(**plain["engine"]), ServerOptions(**plain["server"]), ServeOptions(**plain["serving"]))

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model."""
        return self.server.served_model_names or (self.engine.model,)
