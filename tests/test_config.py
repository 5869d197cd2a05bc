"""The option table: what is accepted, and how the rest is refused."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit import vllm_options
from llmkit.config import EngineConfig, add_engine_arguments, engine_options
from llmkit.errors import ConfigError, UnknownOptionError


def config(**options):
    return EngineConfig.from_options(**options)


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"dtype": torch.bfloat16}, "dtype", "bfloat16"),
        ({"dtype": "half"}, "dtype", "float16"),
        ({"dtype": None}, "dtype", "auto"),
        ({"model": Path("a/b")}, "model", "a/b"),
        ({"num_gpu_blocks_override": 7}, "num_kv_blocks", 7),
        ({"cache_dir": "x"}, "download_dir", "x"),
        ({"max_model_len": np.int64(64)}, "max_model_len", 64),
        ({"gpu_memory_utilization": 1}, "gpu_memory_utilization", 1),
        ({"generation_config": "vllm"}, "generation_config", "none"),
        ({"seed": None}, "seed", 0),
        ({"enable_prefix_caching": None}, "enable_prefix_caching", True),
    ],
)
def test_spellings(given, field, value):
    assert getattr(config(**given), field) == value
    assert type(getattr(config(**given), field)) is type(value)


@pytest.mark.parametrize(
    "bad",
    [{"dtype": "int8"}, {"max_model_len": 0}, {"max_model_len": "2048"}, {"seed": 1.5}, {"gpu_memory_utilization": 1.2},
     {"gpu_memory_utilization": float("nan")}, {"tensor_parallel_size": 2}, {"num_kv_blocks": 1}, {"enforce_eager": "yes"},
     {"model": None}, {"quantization": "awq"}, {"max_num_seqs": True}],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(bad):
    with pytest.raises(ConfigError) as error:
        config(**bad)
    assert next(iter(bad)) in str(error.value)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(UnknownOptionError, match="did you mean 'max_model_len'") as error:
        config(max_modellen=3)
    assert isinstance(error.value, (TypeError, ValueError))


@pytest.mark.parametrize("name", vllm_options.ENGINE)
def test_each_of_vllms_options_is_accepted_when_it_asks_for_nothing_and_refused_with_a_hint(name):
    harmless, hint = vllm_options.ENGINE[name]
    assert name not in {f.name for f in dataclasses.fields(EngineConfig)}
    for value in harmless:
        assert config(**{name: value}) == EngineConfig()
    with pytest.raises(UnknownOptionError) as error:
        config(**{name: "something else"})
    assert name in str(error.value)
    assert error.value.hint == hint


def test_true_is_not_one_and_arrays_are_no_defaults():
    for value in (True, np.ones(3), torch.ones(2)):
        with pytest.raises(UnknownOptionError):
            config(swap_space=value)


def test_a_transformers_tokenizer_is_its_name():
    class Loaded:
        name_or_path = "some/where"

    assert config(tokenizer=Loaded()).tokenizer == "some/where"


def test_flags_are_the_same_table():
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    args = parser.parse_args(["--max-model-len", "64", "--no-enable_prefix_caching", "--dtype", "float32"])
    assert engine_options(args) == {"max_model_len": 64, "enable_prefix_caching": False, "dtype": "float32"}
