"""An EngineClient whose engine is an `LLM` in this process: for batches, where no socket is worth its while, and for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from llmkit.outputs import RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams
from llmkit.server.engine_client import EngineFacts, TokenPrompt

if TYPE_CHECKING:
    from llmkit.job import Job
    from llmkit.llm import LLM


class InProcessEngine:
    """`llm` as the endpoints see an engine; closing it stays the caller's affair."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.tokenizer, self.facts = llm, llm.get_tokenizer(), facts_of(llm)

    async def stream(
        self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncGenerator[StreamChunk, None]:
        """See EngineClient."""
        async for chunk in self.llm._aread(self._job(prompt, params, priority, streaming=True)):
            yield chunk

    async def generate(self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0) -> RequestOutput:
        """See EngineClient."""
        job = self._job(prompt, params, priority, streaming=False)
        async for _ in self.llm._aread(job):
            """Each piece is a whole answer."""
        return dataclasses.replace(job.output(), request_id=request_id)

    async def embed(self, prompts: list[TokenPrompt], pooling: str = "last", normalize: bool = True) -> list[list[float]]:
        """See EngineClient."""
        outputs = await self.llm.aembed([p.ids for p in prompts], pooling, normalize)
        return [output.embedding.tolist() for output in outputs]

    def stats(self) -> dict[str, Any]:
        """See EngineClient."""
        return self.llm.stats()

    @property
    def healthy(self) -> bool:
        return not self.llm._driver.closed

    def _job(self, prompt: TokenPrompt, params: SamplingParams, priority: int, streaming: bool) -> Job:
        asked = {"prompt": prompt.text, "prompt_token_ids": prompt.ids}
        return self.llm._jobs([asked], params, priority, special=False, streaming=streaming)[0]


def facts_of(llm: LLM) -> EngineFacts:
    """What a started engine can say of itself."""
    from llmkit.engine.start import choose_device, choose_dtype

    started, plan = llm._started, llm.memory_plan()
    dtype = choose_dtype(started.config.dtype, started.model_config.dtype, choose_device(started.config.device))
    return EngineFacts(
        model=started.config.model, folder=str(started.folder), max_model_len=plan.max_model_len, max_num_seqs=plan.max_num_seqs,
        vocab_size=started.model_config.vocab_size, hidden_size=started.model_config.hidden_size,
        dtype=str(dtype).removeprefix("torch."), runs_on=str(started.report.facts["runs on"]),
        kv_cache_dtype=started.config.kv_cache_dtype, defaults=dict(started.generation_config),
    )  # fmt: skip
