"""What the last `resolve` did: from where, how much, how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmkit.hub.cache import size_text


@dataclass(frozen=True)
class DownloadReport:
    """`bytes` came over the network in this call, `resumed_bytes` lay here from an earlier one that was interrupted.

    source: modelscope, hf, pypi or local; files: files of the model that this call fetched; seconds: the whole call.
    """

    id: str
    source: str
    folder: Path
    revision: str | None = None
    seconds: float = 0.0
    bytes: int = 0
    resumed_bytes: int = 0
    files: int = 0

    def __str__(self) -> str:
        if not self.files:
            return f"{self.id} from {self.source}: already here, 0 bytes fetched, {self.seconds:.2f} s, in {self.folder}"
        resumed = f" ({size_text(self.resumed_bytes)} were here)" if self.resumed_bytes else ""
        revision = f"@{self.revision}" if self.revision else ""
        amount = f"{self.files} file{'s' * (self.files > 1)}, {size_text(self.bytes)}{resumed}"
        return f"{self.id}{revision} from {self.source}: {amount} in {self.seconds:.1f} s, verified, in {self.folder}"


_last: DownloadReport | None = None


def download_report() -> DownloadReport | None:
    """What this process's last `download`, `resolve` or `LLM(...)` did to get its model; None before the first."""
    return _last


def remember(report: DownloadReport) -> None:
    """Make `report` the last one."""
    global _last
    _last = report
