"""What a piece of work needs at least: bytes read and FLOPs, from the model's shape, and the time that takes at the ceilings.

No torch here: plain arithmetic. A step reads every weight once and each request's keys and values; it multiplies each token
with every matrix, and with the output matrix only where a token is sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llmkit.bench.workload import Workload
from llmkit.models.config import ModelConfig


@dataclass(frozen=True)
class ModelCost:
    """A decoder by what it costs.

    body, head: parameters of all layers and of the output matrix. itemsize, kv_itemsize: bytes of a weight's number, and of a
    key's. kv_size: keys and values that a layer stores a token, in numbers. attention_size: heads * head size. windows: sliding
    window (None = all) -> how many layers.
    """

    body: int
    head: int
    itemsize: int
    kv_size: int
    attention_size: int
    windows: tuple[tuple[int | None, int], ...]
    kv_itemsize: int

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int, kv_itemsize: int | None = None) -> ModelCost:
        """kv_itemsize: None: as the weights'."""
        table = config.vocab_size * config.hidden_size
        return cls(
            body=config.num_parameters - table * (1 if config.tie_embeddings else 2),
            head=table,
            itemsize=itemsize,
            kv_size=2 * config.num_kv_heads * config.head_dim,
            attention_size=config.num_heads * config.head_dim,
            windows=tuple(Counter(config.windows).items()),
            kv_itemsize=kv_itemsize or itemsize,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads. An embedding is looked up, not read, unless it is also the output matrix."""
        return (self.body + self.head) * self.itemsize

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values that one new token reads at this context."""
        return self.kv_size * self.kv_itemsize * self._keys(context)

    def decode_flops(self, context: int) -> int:
        """FLOPs of one new token: 2 a parameter, and 4 an attention channel and key."""
        return 2 * (self.body + self.head) + 4 * self.attention_size * self._keys(context)

    def prefill_flops(self, length: int) -> int:
        """FLOPs of a prompt and its first token, causal attention counted as the half it is."""
        keys = sum(layers * _causal_keys(length, window) for window, layers in self.windows)
        return 2 * self.body * length + 2 * self.head + 4 * self.attention_size * keys

    def _keys(self, context: int) -> int:
        """Keys that one token sees, summed over the layers."""
        return sum(layers * min(context, window or context) for window, layers in self.windows)


def _causal_keys(length: int, window: int | None) -> int:
    """min(1, w) + min(2, w) + ... + min(length, w)."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


@dataclass
class Need:
    """What some work needs: FLOPs, bytes read, and seconds at the ceilings."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __iadd__(self, other: Need) -> Need:
        self.flops, self.bytes, self.seconds = self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds
        return self


@dataclass(frozen=True)
class Limits:
    """A model on a machine that does `flops` a second and reads `bandwidth` bytes a second."""

    cost: ModelCost
    bandwidth: float
    flops: float

    def decode(self, contexts: Iterable[int]) -> Need:
        """One step that gives each request a token. Weights are read while they are multiplied: the slower of the two counts;
        keys and values come on top."""
        contexts = list(contexts)
        flops, kv = sum(map(self.cost.decode_flops, contexts)), sum(map(self.cost.kv_bytes, contexts))
        weights = self.cost.weight_bytes
        return Need(flops, weights + kv, max(weights / self.bandwidth, flops / self.flops) + kv / self.bandwidth)

    def prefill(self, lengths: Iterable[int]) -> Need:
        """These prompts and their first tokens, in one go."""
        flops, weights = sum(map(self.cost.prefill_flops, lengths)), self.cost.weight_bytes
        return Need(flops, weights, max(weights / self.bandwidth, flops / self.flops))

    def workload(self, work: Workload, max_num_seqs: int) -> Need:
        """All requests, at most `max_num_seqs` at once, each place taken again as soon as it is free.

        Prefill, weights, and keys and values are added up: a practical limit. The shares of bandwidth and matmul rate, which
        follow from bytes and FLOPs alone, are the hard ones.
        """
        need = self.prefill(work.input_lens)
        waiting = [(i + 1, o - 1) for i, o in zip(work.input_lens, work.output_lens) if o > 1][::-1]  # prefill gave one token
        running: list[tuple[int, int]] = []
        while waiting or running:
            while waiting and len(running) < max_num_seqs:
                running.append(waiting.pop())
            need += self.decode(context for context, _ in running)
            running = [(context + 1, left - 1) for context, left in running if left > 1]
        return need
