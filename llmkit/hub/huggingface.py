"""`hf:OWNER/NAME`: the Hugging Face hub, through huggingface_hub's own client and in its own cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub.progress import Bar, progress


def fetch(model_id: str, *, revision: str | None, cache_dir: Path | None, patterns: list[str], local_files_only: bool) -> Path:
    """The snapshot folder of `model_id`. ModelNotFoundError when the hub lacks it, refuses it, or cannot be reached and the
    cache has none; DownloadError when the transfer failed. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are the client's own."""
    from huggingface_hub import snapshot_download

    address = os.environ.get("HF_ENDPOINT") or None  # the client reads it once, at import: too early in a notebook
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": patterns, "endpoint": address}
    with _translated(model_id):
        if local_files_only:
            return Path(snapshot_download(model_id, local_files_only=True, **options))
        with progress(None, f"hf:{model_id}") as bar:
            return Path(snapshot_download(model_id, tqdm_class=_forwarding(bar), **options))


@contextlib.contextmanager
def _translated(model_id: str) -> Iterator[None]:
    """The client's errors as llmkit's."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{model_id!r} is not a Hugging Face id: {error}", "an id is OWNER/NAME") from error
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(f"hf:{model_id} is gated", "accept its licence on its page, then set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"hf:{model_id} has no such revision: {_first_line(error)}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"Hugging Face has no model {model_id} (or it is private)", "check the id; set HF_TOKEN if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelNotFoundError(
            f"Hugging Face cannot be reached and its cache has no {model_id}: {_first_line(error)}",
            "check the network and HF_ENDPOINT",
        ) from error
    except (httpx.HTTPError, errors.HfHubHTTPError) as error:
        raise DownloadError(
            f"downloading hf:{model_id} failed: {_first_line(error)}", "call again: complete files are kept"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _forwarding(bar: Bar) -> type:
    """A tqdm class that draws nothing and hands the byte counts to `bar`: the client knows no other progress interface."""
    from tqdm import tqdm

    class Forward(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = options.get("unit") == "B" and "econstruct" in str(options.get("desc"))
            super().__init__(*args, **options)

        def display(self, *_: Any, **__: Any) -> bool:  # called for every redraw
            return self._report()

        def close(self) -> None:
            self._report()

        def _report(self) -> bool:
            if self._counts:
                bar.total = int(self.total) if self.total else None
                bar.update(max(0, int(self.n) - bar.done))
            return True

    return Forward
