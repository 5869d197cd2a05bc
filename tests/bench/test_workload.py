"""What is asked must be the same everywhere: the named workloads, their totals, and tokens that no prefix cache knows."""

import random

import pytest

from llmkit.bench.workload import NAMED, Workload, fixed, tokens
from llmkit.errors import ConfigError


@pytest.mark.parametrize(("name", "count", "inputs", "outputs"), [
    ("nano", 256, 144_831, 144_160),
    ("sharegpt", 1000, 206_310, 199_256),
])
def test_named_workloads_have_the_totals_that_other_engines_were_measured_with(name, count, inputs, outputs):
    work = NAMED[name]()
    assert (len(work.input_lens), len(work.output_lens), work.num_input, work.num_output) == (count, count, inputs, outputs)
    assert min(work.input_lens + work.output_lens) >= 4
    assert max(work.input_lens + work.output_lens) <= 1024
    assert all(type(n) is int for n in work.input_lens + work.output_lens)


def test_tokens_are_those_of_the_formula():
    r = random.Random("7/2/3")
    assert tokens((3, 5), 7) == [[r.randrange(150_000) for _ in range(n)] for n in (3, 5)]


def test_prompts_stay_inside_the_vocabulary_and_share_no_beginning():
    work = fixed(8, 16, 4)
    prompts = [*work.prompts(0, 100), *work.prompts(1, 100), *work.shortened(1).first(7).prompts(0, 100)]
    assert max(max(p) for p in prompts) < 100
    assert len({tuple(p[:8]) for p in prompts}) == len(prompts)
    assert work.prompts(0, 100) == work.prompts(0, 100)


def test_shapes():
    work = Workload("mixed", (3, 9, 2), (5, 1, 8))
    assert (work.longest, work.num_input, work.num_output) == (10, 14, 14)
    assert work.shortened(4).output_lens == (4, 1, 4)
    assert work.first(2) == Workload("mixed", (3, 9), (5, 1))
    assert work.first(None) == work
    with pytest.raises(ConfigError, match="the workload mixed has 3 requests, not 4"):
        work.first(4)
