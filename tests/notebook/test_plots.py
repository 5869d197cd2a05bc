"""Figures show the numbers they were given: bars as long as the values, parts that sum up, a name on everything."""

import types

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from llmkit.engine.memory import MemoryPlan
from llmkit.notebook import plots
from llmkit.outputs import CompletionOutput, Logprob

PLAN = MemoryPlan(device="cpu", total=16 * plots.GiB, others=2 * plots.GiB, weights=plots.GiB, activations=plots.GiB // 2,
                  block_bytes=1 << 20, block_size=16, num_blocks=1025, max_model_len=4096, max_num_seqs=64)  # fmt: skip


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def texts(ax):
    return [t.get_text() for t in ax.texts]


def test_canvas_gives_one_axes_or_several_on_a_card_that_reads_on_any_page():
    assert plots.canvas().figure.get_facecolor() == matplotlib.colors.to_rgba(plots.CARD)
    assert len(plots.canvas(3)) == 3


def test_rates_are_as_long_as_they_are_fast_and_the_best_is_dark():
    ax = plots.canvas()
    plots.plot_rates(ax, {"one": 10, "many": 90}, "speed")
    assert [bar.get_width() for bar in ax.patches] == [10, 90]
    assert [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in ax.patches] == [plots.SKY, plots.BLUE]
    assert texts(ax) == ["10 tokens/s", "90 tokens/s"]


def test_rates_of_one_engine_can_be_dark():
    ax = plots.canvas()
    plots.plot_rates(ax, {"a 1": 1, "b 1": 2, "a 2": 3}, "speed", strong="a")
    assert [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in ax.patches] == [plots.BLUE, plots.SKY, plots.BLUE]


def test_memory_parts_stand_end_to_end_and_fill_the_device():
    ax = plots.canvas()
    plots.plot_memory_plan(ax, PLAN)
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert [bar.get_x() for bar in ax.patches] == [0, *ends[:-1]]
    assert ends[-1] == 16
    assert [t.get_text() for t in ax.get_legend().get_texts()][1] == "weights 1.0"


@pytest.mark.parametrize(("length", "fits"), [(1, 1024), (16, 1024), (17, 512), (4096, 4), (4097, 3)])
def test_a_started_block_counts_whole(length, fits):
    assert plots.requests_that_fit(PLAN, length) == fits


def test_capacity_ends_at_the_longest_request():
    ax = plots.canvas()
    plots.plot_capacity(ax, PLAN)
    lengths, fits = ax.lines[0].get_data()
    assert (lengths[-1], fits[-1]) == (4096, 4)
    assert any("64 at most" in t for t in texts(ax))


def test_alternatives_are_ranked_and_the_taken_token_is_dark():
    candidates = {7: Logprob(-2.0, 2, " b"), 5: Logprob(-0.5, 1, " a")}
    answer = CompletionOutput(0, " b", [7], logprobs=[candidates])
    (ax,) = [plots.canvas()]
    plots.plot_alternatives([ax], answer)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["' a'", "' b'"]
    assert texts(ax) == ["61 %", "14 %"]
    assert [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in ax.patches] == [plots.PALE, plots.BLUE]


def test_arrivals_name_the_first_token():
    ax = plots.canvas()
    plots.plot_arrivals(ax, [0.1, 0.2, 0.4], [" Hi", "", "!"])
    assert texts(ax) == ["first token: 'Hi'"]
    assert ax.get_xlim()[1] == pytest.approx(408)


def test_steps_show_each_request_in_its_row():
    def view(*sequences):
        return types.SimpleNamespace(sequences=[types.SimpleNamespace(request_id=i, phase=p, new=n) for i, p, n in sequences])

    ax = plots.canvas()
    plots.plot_steps(ax, [view(("r1", "prefill", 2), ("r2", "prefill", 16)), view(("r2", "prefill", 16), ("r1", "decode", 1))])
    assert texts(ax) == ["prefill\n2 tokens", "prefill\n16 tokens", "prefill\n16 tokens", "decode\n1 token"]
    assert [round(bar.get_y() + bar.get_height() / 2) for bar in ax.patches] == [0, 1, 1, 0]
