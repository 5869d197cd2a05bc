"""What is asked: how many requests, of which lengths, with which tokens. The same for every contender, on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from llmkit.errors import ConfigError

VOCAB = 150_000  # token ids are drawn below this; a model with a smaller vocabulary draws below its own size


@dataclass(frozen=True)
class Workload:
    """Requests by length: request i has input_lens[i] prompt tokens and gets exactly output_lens[i] tokens."""

    name: str
    input_lens: tuple[int, ...]
    output_lens: tuple[int, ...]

    @property
    def num_input(self) -> int:
        return sum(self.input_lens)

    @property
    def num_output(self) -> int:
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        """The context that the longest request needs, in tokens."""
        return max(i + o for i, o in zip(self.input_lens, self.output_lens))

    def shortened(self, outputs: int) -> Workload:
        """The same prompts' lengths with at most `outputs` tokens each: for warming up, and for timing the first token."""
        return Workload(self.name, self.input_lens, tuple(min(outputs, o) for o in self.output_lens))

    def first(self, count: int | None) -> Workload:
        """The first `count` requests; None keeps all."""
        if count is not None and count > len(self.input_lens):
            raise ConfigError(f"the workload {self.name} has {len(self.input_lens)} requests, not {count}",
                              f"--num-prompts {len(self.input_lens)} or less")  # fmt: skip
        return Workload(self.name, self.input_lens[:count], self.output_lens[:count])

    def prompts(self, seed: object, vocab: int) -> list[list[int]]:
        """Token ids. Another seed or another shape gives prompts that share no beginning with these."""
        return tokens(self.input_lens, seed, min(vocab, VOCAB))


def fixed(count: int, input_len: int, output_len: int) -> Workload:
    """`count` equal requests."""
    return Workload(f"{count} x {input_len} in, {output_len} out", (input_len,) * count, (output_len,) * count)


def nano() -> Workload:
    """256 requests, in and out uniform in 100..1024: 144,831 tokens in, 144,160 out (nano-vLLM's benchmark)."""
    r = random.Random(0)
    inputs = tuple(r.randint(100, 1024) for _ in range(256))
    return Workload("nano", inputs, tuple(r.randint(100, 1024) for _ in range(256)))


def sharegpt() -> Workload:
    """1000 requests, lognormal lengths like ShareGPT's, capped at 1024: 206,310 tokens in, 199,256 out."""
    import numpy as np

    g = np.random.default_rng(0)
    inputs, outputs = (np.clip(g.lognormal(np.log(median), sigma, 1000).round(), 4, 1024).astype(int).tolist()
                       for median, sigma in ((160, 0.80), (150, 0.76)))  # fmt: skip
    return Workload("sharegpt", tuple(inputs), tuple(outputs))


NAMED: dict[str, Callable[[], Workload]] = {"nano": nano, "sharegpt": sharegpt}


def tokens(lens: tuple[int, ...], seed: object, vocab: int = VOCAB) -> list[list[int]]:
    """Random prompts of these lengths. The seed takes in the shape, so that no prefix cache helps from one shape to the next."""
    r = random.Random(f"{seed}/{len(lens)}/{lens[0]}")
    return [[r.randrange(vocab) for _ in range(n)] for n in lens]
