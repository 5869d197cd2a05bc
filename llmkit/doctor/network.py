"""Do the hubs and the package index answer? Asked side by side, for two seconds in all, and never when switched off."""

from __future__ import annotations

import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmkit.config import DEFAULT_MODEL
from llmkit.doctor.report import Finding, ok, warn
from llmkit.hub import CLIENTS, hub_order
from llmkit.hub.names import YES
from llmkit.hub.pip_settings import UV_OWN, pip_settings

PATIENCE = 1.8  # seconds until a place counts as silent
SWITCHES = ("LLMKIT_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TITLES = {"modelscope": "modelscope", "hf": "hugging face", "index": "package index"}
FIXES = {
    "modelscope": "export LLMKIT_HUBS=hf   # or check HTTPS_PROXY and MODELSCOPE_ENDPOINT",
    "hf": "export LLMKIT_HUBS=modelscope   # or check HTTPS_PROXY; HF_ENDPOINT can name a mirror",
    "index": "pip config list   # shows which index is asked; check HTTPS_PROXY, or set index-url to a mirror",
}
NO_HUB = f"llmkit pull {DEFAULT_MODEL}   # or check the network and HTTPS_PROXY"  # what to do where neither hub answers


def hubs() -> list[Finding]:
    """One finding a place. Silence is never a FAIL: what is on the disk works."""
    if switch := next((v for v in SWITCHES if os.environ.get(v, "").lower() in YES), None):
        return [ok("network", f"not asked: {switch} is set; models in the cache and in folders work", f"unset {switch}")]
    order = hub_order()
    endpoints = {name: CLIENTS[name].endpoint() for name in order}
    index = package_index()
    silent = reasons(endpoints | ({"index": index} if index else {}))
    found = [_finding(name, silent) if name in order else _not_chosen(name, order) for name in CLIENTS]
    return [*found, _finding("index", silent) if index else ok(TITLES["index"], "none: pip's own settings say so")]


def _finding(name: str, silent: dict[str, str | None]) -> Finding:
    """`silent`: place -> why it does not answer."""
    if silent[name] is None:
        return ok(TITLES[name], "answers")
    answering = [TITLES[n] for n, reason in silent.items() if reason is None]
    works = ", ".join(["models on the disk", *(f"the {n}" if n == TITLES["index"] else n for n in answering)])
    alone = name in CLIENTS and all(silent[n] for n in CLIENTS if n in silent)
    return warn(TITLES[name], f"does not answer ({silent[name]}); what still works: {works}", NO_HUB if alone else FIXES[name])


def _not_chosen(name: str, order: list[str]) -> Finding:
    return ok(TITLES[name], f"not asked: only {', '.join(order)} is chosen (LLMKIT_HUBS, LLMKIT_USE_MODELSCOPE)")


def package_index() -> str | None:
    """The index pip (or uv) asks; None when its settings name none, or neither tool is here."""
    if own := next((os.environ[v] for v in UV_OWN[:2] if os.environ.get(v)), None):
        return own
    settings = pip_settings()
    if settings.get("no-index", "").lower() in YES:
        return None
    return settings.get("index-url") or _default_index()


def _default_index() -> str | None:
    """As pip itself spells it."""
    try:
        from pip._internal.models.index import PyPI
    except ImportError:  # uv without pip: its own default is not ours to know
        return None
    return str(PyPI.simple_url)


def reasons(endpoints: dict[str, str]) -> dict[str, str | None]:
    """For each place why it does not answer, or None when it does. Takes PATIENCE at most."""
    found: dict[str, str | None] = dict.fromkeys(endpoints, f"silent for {PATIENCE:g} s")
    ends = time.monotonic() + PATIENCE

    def ask(name: str) -> None:
        found[name] = _reason(endpoints[name])

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in endpoints]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    return dict(found)


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer; where it leads is not asked."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _reason(url: str) -> str | None:
    """Ask for the head of a page, through the proxy and with the certificates that are configured."""
    if urlsplit(url).scheme == "file":
        return None if Path(urllib.request.url2pathname(urlsplit(url).path)).exists() else "its folder does not exist"
    try:
        context = ssl.create_default_context(cafile=_certificates())
        opener = urllib.request.build_opener(_Stay, urllib.request.HTTPSHandler(context=context))
        opener.open(urllib.request.Request(_without_password(url), method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError as answer:
        return f"error {answer.code}" if answer.code >= 500 or answer.code == 407 else None
    except (OSError, ValueError) as error:  # ValueError: an address that is none
        cause = getattr(error, "reason", error)
        return getattr(cause, "strerror", None) or str(cause)
    return None


def _certificates() -> str | None:
    named = (os.environ.get(v) for v in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
    return next((p for p in (*named, pip_settings().get("cert")) if p and Path(p).is_file()), None)


def _without_password(url: str) -> str:
    """urllib takes user:password@host for a host's name; 401 is an answer too."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
