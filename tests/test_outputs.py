"""What is printed and shown of an answer."""

import pickle

from llmkit.errors import InvalidRequestError
from llmkit.outputs import CompletionOutput, RequestMetrics, RequestOutput, RequestOutputs, StreamChunk


def output(text="an answer", prompt: str | None = "a <prompt>", ids=3000):
    answer = CompletionOutput(0, text, list(range(ids)), finish_reason="length")
    return RequestOutput("req-0", prompt, list(range(ids)), [answer], True)


def test_a_repr_says_what_matters_and_dumps_no_numbers():
    text = repr(output())
    assert len(text) < 400
    for part in ("req-0", "a <prompt>", "an answer", "3,000 in all", "finish_reason='length'"):
        assert part in text
    assert "token_ids=[0, 1, 2]" in repr(output(ids=3))
    assert len(repr(output(text="x" * 100_000, prompt="y" * 100_000))) < 1200
    assert "prompt=None" in repr(output(prompt=None))


def test_a_list_reads_line_by_line():
    both = RequestOutputs([output(), output()])
    assert isinstance(both, list)
    assert len(repr(both).splitlines()) == 2
    assert repr(RequestOutputs()) == "[]"


def test_a_notebook_shows_text_not_markup():
    html = RequestOutputs([output(text="<script>alert(1)</script>")])._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a &lt;prompt&gt;" in html
    assert "token ids [0, 1" in output(prompt=None)._repr_html_()
    long = RequestOutputs([output(ids=1)] * 1000)._repr_html_()
    assert "the first 100 of 1,000" in long
    assert len(long) < 100_000


def test_everything_survives_pickle_and_compares():
    one = RequestOutputs([output(), output(prompt=None)])
    assert pickle.loads(pickle.dumps(one)) == one
    assert one[0].text == "an answer"


def test_a_chunk_prints_its_text():
    chunk = StreamChunk("new ", [1], output=lambda: output())
    assert f"{chunk}" == "new "
    assert chunk.output is not None
    assert chunk.output().text == "an answer"
    assert "lambda" not in repr(chunk)


def test_time_to_first_token():
    assert RequestMetrics(arrival_time=1.0).ttft is None
    assert RequestMetrics(arrival_time=1.0, first_token_time=1.5).ttft == 0.5


def test_an_error_is_short_in_a_notebook():
    error = InvalidRequestError("the prompt is empty", "give one", param="prompt")
    assert error._render_traceback_() == ["\x1b[31mInvalidRequestError\x1b[0m: the prompt is empty", "  -> give one"]
