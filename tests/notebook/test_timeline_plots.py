"""Figures of timelines show the time that passed: coloured where something ran, empty where nothing did."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from llmkit.errors import ConfigError
from llmkit.kernel_names import FAMILIES
from llmkit.notebook import plots
from llmkit.notebook.recordings import recording
from llmkit.notebook.timeline_plots import coverage, plot_padding, plot_payback, plot_timelines, timeline_svg
from llmkit.timeline import Span, Step, Timeline

TIMELINE = Timeline("m", "a GPU", "bfloat16", True, [Span(0, 10, "_product"), Span(5, 10, "_decode"), Span(30, 10, "_norm")],
                    [Step(0, 20, 1, 1), Step(20, 40, 1, 1)])  # fmt: skip


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_coverage_is_the_share_of_each_pixel():
    shares = dict(zip(FAMILIES, coverage(TIMELINE, 40, 8).round(3).tolist()))
    assert shares["products"] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert shares["attention"] == [0, 0, 1, 0, 0, 0, 0, 0], "only what the product before it leaves"
    assert shares["norm"] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert coverage(TIMELINE, 40, 3).sum() * 40 / 3 == pytest.approx(25)
    assert coverage(TIMELINE, 12, 5).sum() == pytest.approx(5), "what lies beyond the end is cut off"


def test_strips_share_a_clock_that_ends_with_the_shorter_one():
    ax = plots.canvas()
    plot_timelines(ax, {"one": TIMELINE, "two": TIMELINE.between(0, 20)}, title="Two")
    assert ax.get_xlim() == (0, pytest.approx(0.015))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "two"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["products", "attention"]
    image = ax.images[0].get_array()
    assert matplotlib.colors.to_hex(np.asarray(image)[0, 0, :3]) == plots.BLUE
    assert ax.get_title(loc="left") == "Two"


def test_a_timeline_draws_itself():
    ax = plots.canvas()
    TIMELINE.plot(ax, ms=0.04)
    assert ax.get_title(loc="left") == TIMELINE.title
    assert np.asarray(ax.images[0].get_array())[0, :, 3].mean() == pytest.approx(25 / 40, abs=0.01)
    plt.close("all")
    assert "products" in timeline_svg(TIMELINE)
    assert plt.get_fignums() == []


def test_padding_reaches_up_to_the_next_size():
    ax = plots.canvas()
    plot_padding(ax, [1, 2, 4, 8, 16], 6)
    steps = ax.patches[0].get_data()
    assert (list(steps.values), list(steps.edges)) == ([1, 2, 4, 8], [0, 1, 2, 4, 8])


@pytest.mark.parametrize(("capture", "eager", "said"), [(30, 4, ["paid back after 10 steps"]), (30, 1, [])])
def test_a_graph_has_paid_where_the_lines_meet(capture, eager, said):
    ax = plots.canvas()
    plot_payback(ax, capture, eager, 1)
    assert [t.get_text() for t in ax.texts] == said


def test_the_recording_of_an_h100_is_there_and_tells_the_story():
    kept = recording("cuda_graphs_h100")
    assert set(kept) == {f"{how}, batch {n}" for how in ("eager", "graphs") for n in (1, 8)}
    for n in (1, 8):
        eager, graphs = kept[f"eager, batch {n}"], kept[f"graphs, batch {n}"]
        assert "H100" in eager.device
        assert eager.device == graphs.device
        assert (eager.graphs, graphs.graphs) == (False, True)
        assert len(eager.steps) == len(graphs.steps) == 6
        assert eager.tokens == graphs.tokens
        assert graphs.busy > 10 * eager.busy


def test_a_recording_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match="no recording 'h200'") as error:
        recording("h200")
    assert "cuda_graphs_h100" in str(error.value)
