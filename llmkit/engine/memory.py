"""How much fits, and why: a plan that can be printed before anything goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llmkit import ops
from llmkit.config import EngineConfig
from llmkit.errors import OutOfMemoryError
from llmkit.machine import cgroup_bytes
from llmkit.models.config import ModelConfig

GiB = 1 << 30
_USABLE = 0.97  # of the memory that is free: the driver and fragments take the rest
LITTLE = 4 * GiB  # of weights and keys: some 1.4 ms of an H100
GRAPH_TOKENS = 2048  # of the largest captured step with prompts, which keeps its intermediates, of a small model
_CPU_KV_LIMIT = 4 * GiB  # a CPU decodes too slowly to fill more; kv_cache_memory= asks for more


@dataclass
class MemoryPlan:
    """Where the device's memory goes. All sizes in bytes.

    total: the device's, or the machine's. others: held by other processes and by what this one held before. weights,
    activations (one step's intermediates), kv_cache. block_bytes: one KV block, all layers. num_blocks includes the one that
    padding uses. notes: what was shrunk, and why.
    """

    device: str
    total: int
    others: int
    weights: int
    activations: int
    block_bytes: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    notes: list[str] = field(default_factory=list)

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return max(0, self.num_blocks - 1) * self.block_size

    @property
    def free(self) -> int:
        return max(0, self.total - self.others - self.weights - self.activations - self.kv_cache)

    def parts(self) -> dict[str, int]:
        """Label -> bytes, in the order of a stacked bar; they sum to `total` when the plan fits."""
        return {"other processes": self.others, "weights": self.weights, "activations": self.activations,
                "KV cache": self.kv_cache, "free": self.free}  # fmt: skip

    def note_once(self, text: str) -> None:
        """Add a note that is not there yet."""
        if text not in self.notes:
            self.notes.append(text)

    def fixes(self) -> list[str]:
        """Three ways to make more room."""
        shorter = max(256, self.max_model_len // 2)
        need = shorter * self.block_bytes / self.block_size / GiB
        return [
            f"a shorter context: max_model_len={shorter} needs {need:.2f} GiB a request",
            f"fewer at once: max_num_seqs={max(1, self.max_num_seqs // 2)}",
            "a smaller or quantised model, or dtype='bfloat16'",
        ]

    def __str__(self) -> str:
        lines = [f"memory on {self.device} ({self.total / GiB:.1f} GiB)"]
        for name, size in self.parts().items():
            lines.append(f"  {name:<16}{size / GiB:8.2f} GiB  {'█' * round(30 * size / self.total)}")
        lines.append(
            f"  {self.kv_tokens // self.block_size} blocks of {self.block_size} tokens = {self.kv_tokens:,} tokens: "
            f"{self.kv_tokens / self.max_model_len:.1f} requests of {self.max_model_len:,} tokens"
        )
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def kv_block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """2 (keys, values) · layers · kv heads · head size · block size · bytes of a number."""
    return model.kv_bytes_per_token * block_size * dtype.itemsize


def check_room(model: ModelConfig, dtype: torch.dtype, device: torch.device, before: int) -> None:
    """OutOfMemoryError when the weights alone are more than a GPU has free: now rather than after reading half of them."""
    need = model.num_parameters * dtype.itemsize
    free = device_total(device) - before
    if device.type == "cuda" and need > free:
        raise OutOfMemoryError(
            f"the weights need {need / GiB:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {free / GiB:.1f} GiB of {device} "
            f"are free: {before / GiB:.1f} GiB are held by others, or by this process",
            "close what is not used (llm.close(), other notebooks; nvidia-smi names the processes), or take a smaller model",
        )


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    weights: int,
    max_num_seqs: int,
    max_tokens: int,
    before: int,
    kv_dtype: torch.dtype | None = None,
) -> MemoryPlan:
    """Divide the memory. `before`: bytes in use on the device before this engine began. kv_dtype: of the KV cache, None: `dtype`.
    OutOfMemoryError carries the plan."""
    total, kernels = device_total(device), ops.has_kernels(device, dtype)
    block_size = config.block_size or (64 if kernels else 16)
    wanted_len = config.max_model_len or model.max_position
    kept = min(max_tokens, graph_tokens(weights)) if kernels else 0
    plan = MemoryPlan(
        device=str(device), total=total, others=before, weights=weights,
        activations=_activations(model, dtype, max_num_seqs, max_tokens + kept),
        block_bytes=kv_block_bytes(model, block_size, kv_dtype or dtype), block_size=block_size,
        num_blocks=0, max_model_len=wanted_len, max_num_seqs=max_num_seqs,
    )  # fmt: skip
    if kernels and config.deterministic:
        from llmkit_kernels.fixed_attention import scratch_bytes

        plan.activations += scratch_bytes(max_num_seqs, model.num_heads, model.num_kv_heads, model.head_dim, wanted_len)
    blocks_per_request = -(-wanted_len // block_size)
    fits = max(0, int(_kv_budget(config, plan, device) // plan.block_bytes))
    plan.num_blocks = config.num_kv_blocks or min(fits, blocks_per_request * max_num_seqs + 1)
    if plan.num_blocks < 2:
        raise OutOfMemoryError(f"no room for a KV cache\n{plan}", "; or ".join(plan.fixes()))
    if plan.kv_tokens < wanted_len:
        plan.max_model_len = plan.kv_tokens
        plan.notes.append(f"max_model_len was shrunk from {wanted_len:,} to {plan.kv_tokens:,} tokens, which is what fits")
    return plan


def graph_tokens(weights: int) -> int:
    """Of the largest captured step with prompts. weights: bytes; a big model computes longer than the host launches, and padding
    a long step to the next size would cost more."""
    return GRAPH_TOKENS if weights <= LITTLE else GRAPH_TOKENS // 2


def _activations(model: ModelConfig, dtype: torch.dtype, max_num_seqs: int, max_tokens: int) -> int:
    """The widest moments of steps of so many tokens in all: their feed-forward, and float32 logits of all that sample (a few
    copies)."""
    widest = 2 * model.intermediate_size + 4 * model.hidden_size + model.head_dim * (model.num_heads + 2 * model.num_kv_heads)
    return max_tokens * widest * dtype.itemsize + 3 * max_num_seqs * model.vocab_size * 4


def _kv_budget(config: EngineConfig, plan: MemoryPlan, device: torch.device) -> float:
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory * GiB
    free, own = plan.total - plan.others, plan.weights + plan.activations
    if device.type == "cpu":
        return min((free - own) * 0.5, _CPU_KV_LIMIT)
    asked = plan.total * config.gpu_memory_utilization
    if asked > free * _USABLE:
        plan.notes.append(f"gpu_memory_utilization={config.gpu_memory_utilization:g} is {asked / GiB:.1f} GiB, of which "
                          f"{free / GiB:.1f} GiB are free: others hold {plan.others / GiB:.1f} GiB")  # fmt: skip
    return min(asked, free * _USABLE) - own


def device_total(device: torch.device) -> int:
    """Bytes of the device, or of the machine; a container's limit counts as the machine's size."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import psutil

    return min([psutil.virtual_memory().total, *cgroup_bytes("memory.max")])


def device_used(device: torch.device) -> int:
    """Bytes in use on the device by anybody; on a CPU what the system could not give to a new process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    import psutil

    memory = psutil.virtual_memory()
    return memory.total - memory.available
