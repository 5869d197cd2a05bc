"""llmkit: download, run, serve and look inside large language models, at home in Jupyter.

`import llmkit` is cheap on purpose (no torch, no transformers, no network): every public name is loaded when first used.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

from llmkit.garbage import nothing_is_garbage

__version__ = "0.1.0"

_HOMES = {  # public name -> the module it lives in (PEP 562)
    "LLM": "llmkit.llm",
    "SamplingParams": "llmkit.sampling_params",
    "StructuredOutputs": "llmkit.sampling_params",
    "StructuredOutputsParams": "llmkit.sampling_params",  # vLLM's name of the same
    "GuidedDecodingParams": "llmkit.sampling_params",  # and its older one
    "RequestOutput": "llmkit.outputs",
    "CompletionOutput": "llmkit.outputs",
    "StreamChunk": "llmkit.outputs",
    "EmbeddingOutput": "llmkit.outputs",
    "EngineConfig": "llmkit.config",
    "Timeline": "llmkit.timeline",
    "LlmkitError": "llmkit.errors",
    "download": "llmkit.hub",
    "download_report": "llmkit.hub",
    "serve": "llmkit.server.handle.start",
    "Server": "llmkit.server.handle.server",
    "check": "llmkit.notebook.checks",
    "record": "llmkit.notebook.checks",
    "show_source": "llmkit.notebook.source",
}
import_seconds: dict[str, float] = {}  # module -> what its first import cost; `LLM.startup_report()` shows it
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from llmkit.config import EngineConfig as EngineConfig
    from llmkit.errors import LlmkitError as LlmkitError
    from llmkit.hub import download as download
    from llmkit.hub import download_report as download_report
    from llmkit.llm import LLM as LLM
    from llmkit.notebook.checks import check as check
    from llmkit.notebook.checks import record as record
    from llmkit.notebook.source import show_source as show_source
    from llmkit.outputs import CompletionOutput as CompletionOutput
    from llmkit.outputs import EmbeddingOutput as EmbeddingOutput
    from llmkit.outputs import RequestOutput as RequestOutput
    from llmkit.outputs import StreamChunk as StreamChunk
    from llmkit.sampling_params import GuidedDecodingParams as GuidedDecodingParams
    from llmkit.sampling_params import SamplingParams as SamplingParams
    from llmkit.sampling_params import StructuredOutputs as StructuredOutputs
    from llmkit.sampling_params import StructuredOutputsParams as StructuredOutputsParams
    from llmkit.server.handle.server import Server as Server
    from llmkit.server.handle.start import serve as serve
    from llmkit.timeline import Timeline as Timeline


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext llmkit`: the magic `%llmkit`."""
    from llmkit.notebook.magics import load

    load(shell)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmkit' has no attribute {name!r}")
    begin = time.perf_counter()
    with nothing_is_garbage():
        value = getattr(importlib.import_module(_HOMES[name]), name)
    import_seconds.setdefault(_HOMES[name], time.perf_counter() - begin)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
