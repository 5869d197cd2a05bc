"""pip's settings (index mirror, certificates, folders of wheels) as environment variables of uv, which does not read them."""

from __future__ import annotations

import configparser
import os
import sys
from pathlib import Path

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
UV_OWN = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")


def uv_environment() -> dict[str, str]:
    """What uv has to be told of pip's settings; nothing where uv has an index of its own."""
    if any(os.environ.get(name) for name in UV_OWN):
        return {}
    settings = pip_settings()
    return {uv: settings[name] for name, uv in UV_NAMES.items() if settings.get(name) and uv not in os.environ}


def pip_settings() -> dict[str, str]:
    """pip's settings as pip would see them: its files, the later over the earlier, then PIP_* variables."""
    found: dict[str, str] = {}
    for path in _files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, "utf-8")
        except configparser.Error:  # pip itself will not run with such a file; uv may do without it
            continue
        for section in ("global", "download"):
            if parser.has_section(section):
                found |= {name.replace("_", "-"): " ".join(value.split()) for name, value in parser.items(section)}
    variables = {n: v for n, v in os.environ.items() if n.startswith("PIP_")}
    return found | {n.removeprefix("PIP_").lower().replace("_", "-"): v for n, v in variables.items()}


def _files() -> list[Path]:
    config = os.environ.get("PIP_CONFIG_FILE", "")
    if config == os.devnull:
        return []
    home = Path.home()
    user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    windows = Path(os.environ.get("APPDATA") or home) / "pip" / "pip.ini"
    own = Path(sys.prefix) / ("pip.ini" if os.name == "nt" else "pip.conf")
    named = [Path(config)] if config else []
    return [Path("/etc/pip.conf"), home / ".pip" / "pip.conf", user, windows, own, *named]
