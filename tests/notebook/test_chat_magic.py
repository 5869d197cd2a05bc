"""%%llmkit chat: one display, many turns, values of the notebook, the stop button; with a server and with an LLM."""

import time

import pytest
from IPython.core.interactiveshell import InteractiveShell

from llmkit.errors import InvalidRequestError, LlmkitError
from llmkit.notebook.chat_magic import Answer
from llmkit.notebook.chat_targets import Piece
from llmkit.notebook.interpolate import InterpolationError, interpolate
from llmkit.notebook.markdown import markdown_html


@pytest.fixture(scope="module")
def kernel(start_kernel):
    """With a fake server, which answers `echo: ` and what was said, and how many messages it saw."""
    kernel = start_kernel()
    kernel.run("server = %llmkit serve m --wait")
    return kernel


def shown(outputs):
    """The one display of a chat, in its last state."""
    assert [o["type"] for o in outputs if o["type"] not in ("display_data", "update_display_data", "error")] == []
    displays = [o for o in outputs if o["type"] == "display_data"]
    assert len(displays) == 1
    return [*displays, *(o for o in outputs if o["type"] == "update_display_data")][-1]["data"]


# ---- against a server


def test_an_answer_streams_into_one_display_and_is_kept(kernel):
    outputs = kernel.run("%%llmkit chat --new --out answer\n**你好** slowly")
    assert len([o for o in outputs if o["type"] == "update_display_data"]) >= 3
    data = shown(outputs)
    assert data["text/plain"].startswith("echo: **你好** slowly (of 1)\n\n[fake-model · 7 + 5 tokens · first after ")
    assert "<p>echo: <strong>你好</strong> slowly (of 1)</p>" in data["text/html"]
    assert 'aria-busy="false"' in data["text/html"]
    assert kernel.value("answer.text, answer.usage, answer.finish_reason") == "('echo: **你好** slowly (of 1)', (7, 5), 'stop')"
    assert 0 < float(kernel.value("answer.ttft")) < float(kernel.value("answer.seconds"))
    assert 3 < float(kernel.value("answer.tokens_per_second")) < 20
    assert kernel.value("answer") == "echo: **你好** slowly (of 1)"


def test_turns_follow_each_other_until_a_new_one(kernel):
    assert "(of 1)" in shown(kernel.run("%%llmkit chat --new\none"))["text/plain"]
    assert "(of 3)" in shown(kernel.run("%%llmkit chat\ntwo"))["text/plain"]
    assert "(of 6)" in shown(kernel.run("%%llmkit chat --system short --out a\nthree"))["text/plain"]
    roles = kernel.value("[m['role'][0] for m in a.messages], a.messages[0]['content']")
    assert roles == "(['s', 'u', 'a', 'u', 'a', 'u', 'a'], 'short')"
    assert "(of 1)" in shown(kernel.run("%%llmkit chat --new\nfour"))["text/plain"]


def test_values_of_the_notebook_are_put_in(kernel):
    kernel.run("topic, numbers = 'the sea', [1, 2]")
    said = shown(kernel.run('%%llmkit chat --new\n{topic}: {sum(numbers)} {topik} {{topic}} {"a": 1}'))["text/plain"]
    assert 'echo: the sea: 3 {topik} {topic} {"a": 1} (of 1)' in said
    assert "{topik} stayed as it is: there is no 'topik'; did you mean 'topic'?" in said


def test_stop_keeps_what_was_said_and_ends_the_request_in_the_server(kernel):
    cell = kernel.begin("%%llmkit chat --new --out partial\n" + "word " * 100 + "slowly")
    time.sleep(1.5)
    kernel.interrupt()
    outputs = kernel.messages(cell)
    (error,) = [o for o in outputs if o["type"] == "error"]
    assert error["ename"] == "Stopped"
    assert len(error["traceback"]) == 1
    assert "stopped" in shown(outputs)["text/plain"]
    assert shown(outputs)["text/plain"].startswith("echo: word word")
    assert kernel.value("partial.finish_reason, 1 < len(partial.text.split()) < 50") == "('abort', True)"
    time.sleep(0.5)
    assert int(kernel.value("server.stats()['aborted']")) >= 1
    assert "(of 3)" in shown(kernel.run("%%llmkit chat\nand then?"))["text/plain"], "the conversation goes on with what was said"


def test_whom_to_ask(kernel):
    for name in ("server", "fake-model", "{server.port}", "{server.url}/v1"):
        assert "echo: x" in shown(kernel.run(f"%%llmkit chat --new --model {name}\nx"))["text/plain"]
    (error,) = [o for o in kernel.run("%%llmkit chat --model nobody\nx") if o["type"] == "error"]
    assert "--model nobody: neither a running server" in error["traceback"][0]
    assert "server" in error["traceback"][1]


@pytest.mark.parametrize(("cell", "what"), [
    ("%%llmkit chat\n\n", "the cell is empty"),
    ("%%llmkit chat --out 2x\nhello", "--out 2x: not a name of a variable"),
    ("%%llmkit chat --n 2\nhello", "one answer at a time"),
    ("%%llmkit chat --sytem x\nhello", "did you mean --system?"),
    ("%%llmkit chat\n{1/len([t for t in topic if not t])}", "ZeroDivisionError"),
])  # fmt: skip
def test_mistakes_are_named(kernel, cell, what):
    (error,) = [o for o in kernel.run(f"topic = 'x'\n{cell}" if cell[0] != "%" else cell) if o["type"] == "error"]
    assert what in "".join(error["traceback"])


def test_a_server_that_goes_away_in_the_middle_is_an_error_and_the_text_is_kept(kernel):
    kernel.run("doomed = %llmkit serve other --new --wait")
    kernel.run("import os, threading; threading.Timer(1.0, lambda: os.kill(doomed.pid, 9)).start()")
    outputs = kernel.run("%%llmkit chat --new --model doomed --out cut\n" + "word " * 50 + "slowly")
    (error,) = [o for o in outputs if o["type"] == "error"]
    assert error["ename"] == "ServerError"
    assert kernel.value("cut.finish_reason, cut.text[:10]") == "('error', 'echo: word')"


def test_with_nobody_to_ask_the_way_is_shown(start_kernel, tmp_path):
    alone = start_kernel(LLMKIT_RUN_DIR=str(tmp_path))
    (error,) = [o for o in alone.run("%%llmkit chat\nhello") if o["type"] == "error"]
    assert "there is nobody to talk to" in error["traceback"][0]
    assert "%llmkit serve" in error["traceback"][1]


# ---- against an LLM of the notebook


def test_an_llm_of_the_notebook_answers_and_is_stopped(start_kernel, dummy_folder, tmp_path):
    kernel = start_kernel(LLMKIT_RUN_DIR=str(tmp_path))
    options = f"{str(dummy_folder)!r}, load_format='dummy', max_model_len=4096, kv_cache_memory=0.05"
    kernel.run(f"from llmkit import LLM\nllm = LLM({options})")
    data = shown(kernel.run("%%llmkit chat --max-tokens 5 --ignore-eos --out answer\nhello"))
    assert "5 tokens" in data["text/plain"]
    assert kernel.value("answer.usage[1], answer.finish_reason") == "(5, 'length')"
    cell = kernel.begin("%%llmkit chat --model llm --ignore-eos --out partial\nhello")
    time.sleep(2)
    kernel.interrupt()
    outputs = kernel.messages(cell)
    assert [o["ename"] for o in outputs if o["type"] == "error"] == ["Stopped"]
    assert kernel.value("partial.finish_reason, partial.usage[1] > 5, llm.stats()['running']") == "('abort', True, 0)"


# ---- plain IPython


@pytest.mark.usefixtures("fake_servers")
def test_plain_ipython_prints(capsys):
    import llmkit

    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "llmkit")
    try:
        shell.user_ns["topic"] = "the sea"
        llmkit.serve("m")
        capsys.readouterr()
        shell.run_cell_magic("llmkit", "chat --out answer", "{topic}")
        assert capsys.readouterr().out.startswith("echo: the sea (of 1)\n[fake-model · 7 + 5 tokens")
        assert shell.user_ns["answer"].text == "echo: the sea (of 1)"
    finally:
        InteractiveShell.clear_instance()


# ---- pieces


NAMES = {"x": 3, "name": "Ada", "f": lambda n: n * 2}


@pytest.mark.parametrize(("text", "result"), [
    ("{x} and {name}", "3 and Ada"),
    ("{f(x)} {name.upper()} {[i for i in range(x)]}", "6 ADA [0, 1, 2]"),
    ("{{x}} {}", "{x} {}"),
    (r"\frac{1}{2} x^{2} {a, b; c}", r"\frac{1}{2} x^{2} {a, b; c}"),
    ('{"a": 1} {"x"} { return; }', '{"a": 1} {"x"} { return; }'),
    ("/users/{id} {len}", "/users/{id} {len}"),
])  # fmt: skip
def test_interpolation(text, result):
    assert interpolate(text, NAMES) == (result, [])


def test_an_unknown_name_is_noted_and_a_failure_is_an_error():
    assert interpolate("{nmae}", NAMES) == ("{nmae}", ["{nmae} stayed as it is: there is no 'nmae'; did you mean 'name'?"])
    assert interpolate("{zzz}", NAMES)[1] == ["{zzz} stayed as it is: there is no 'zzz'"]
    with pytest.raises(InterpolationError, match=r"\{x/0\} in the prompt: ZeroDivisionError"):
        interpolate("{x/0}", NAMES)


@pytest.mark.parametrize("hostile", [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))", "[a](JaVaScRiPt&#58;alert(1))",
    "![a](http://tracker/x.png)", "[a](data:text/html,x)", "`<b>`\n<svg/onload=alert(1)>", "$$\n```\n$$\n<script>x</script>",
    '[a](http://x "\\" onclick=alert(1))', "<http://x/\"onmouseover=alert(1)>",
])  # fmt: skip
def test_what_a_model_says_cannot_run_in_the_page(hostile):
    from html.parser import HTMLParser

    seen = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

    answer = Answer("m", hostile, hostile, notes=[hostile])
    Tags().feed(answer._repr_html_())
    assert {tag for tag, _ in seen} <= {"div", "p", "a", "code", "pre", "small", "details", "summary", "br"}
    for _, attributes in seen:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "http://").startswith("http")


def test_markdown_is_rendered():
    html = markdown_html("# T\n\n- a\n- `b`\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n```python\nprint(1 < 2)\n```")
    for tag in ("<h1>T</h1>", "<li>a</li>", "<code>b</code>", "<td>1</td>", "1 &lt; 2"):
        assert tag in html


def test_an_answer_counts():
    answer = Answer("m")
    assert answer.figures() == "m · waiting for the first token · …"
    answer.add(Piece(reasoning="hm"), 0.5)
    answer.add(Piece("Hi", usage=(10, 11), finish_reason="stop"), 1.5)
    assert (answer.ttft, answer.seconds, answer.tokens_per_second) == (0.5, 1.5, 10.0)
    assert answer.figures() == "m · 10 + 11 tokens · first after 0.50 s · 10.0 tokens/s · stop"
    assert "<summary>reasoning</summary>" in answer._repr_html_()
    assert str(answer) == "Hi"


def test_errors_are_ours():
    assert issubclass(InterpolationError, LlmkitError)
    assert issubclass(InvalidRequestError, ValueError)
