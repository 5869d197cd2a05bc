"""Tool calls and thoughts in an answer's text: every format, broken ones, and any way in which the text may come in pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.server.message import CallIds, Message, MessageReader
from llmkit.server.reasoning import ThoughtSplitter, find_tags
from llmkit.server.tools import FirstCall, detect_parser
from llmkit.server.tools.parsers import PARSERS, OneCall, required
from llmkit.server.tools.pythonic import read_call

NAMES = ("get_weather", "add", "ns.tool-2")
PARIS = '{"city": "Paris"}'
THINK = ("<think>", "</think>")


def new_parser(name):
    if name == "required":
        return required(NAMES, CallIds())
    return OneCall("add", CallIds()) if name == "named" else PARSERS[name](NAMES, CallIds())


def read(pieces, parser="hermes", tags=None, opened=False):
    """(content, thoughts, [(name, arguments)]) of an answer that comes in these pieces."""
    reader = MessageReader(ThoughtSplitter(tags, opened) if tags else None, new_parser(parser) if parser else None)
    message = Message("assistant")
    for piece in pieces:
        message.take(reader.push(piece))
    message.take(reader.finish())
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.calls]
    return message.content, message.thoughts, calls


CASES = [  # parser, answer, content, calls
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', "", [("get_weather", PARIS)]),
    ("hermes", f'Hm.\n<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>\n', "Hm.", [("get_weather", PARIS)]),
    ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>', "", [("get_weather", PARIS)]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}</tool_call>\n<tool_call>{"name": "add"}</tool_call>', "",
     [("add", "{}"), ("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}} and more', "and more", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> done', "done", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "x\ny", "b": [1, -2.5e3, {"c": null}]}}', "",
     [("add", '{"a": "x\\ny", "b": [1, -2.5e3, {"c": null}]}')]),
    ("hermes", '<tool_call>{"name": "add", "id": 7, "arguments": {"a": "}</tool_call>"}}</tool_call>', "",
     [("add", '{"a": "}</tool_call>"}')]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "add", "arguments": {{}}}}]', "",
     [("get_weather", PARIS), ("add", "{}")]),
    ("mistral", f'Well.[TOOL_CALLS]get_weather{PARIS}', "Well.", [("get_weather", PARIS)]),
    ("mistral", f'[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add[CALL_ID]abc[ARGS]{{}}', "",
     [("get_weather", PARIS), ("add", "{}")]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [("get_weather", PARIS)]),
    ("llama3_json", f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}; {{"name": "add"}}', "",
     [("get_weather", PARIS), ("add", "{}")]),
    ("pythonic", '[get_weather(city="Paris"), add(a=1, b=[True, None], c={"k": -1.5})]', "",
     [("get_weather", PARIS), ("add", '{"a": 1, "b": [true, null], "c": {"k": -1.5}}')]),
    ("pythonic", "<|python_start|>[ns.tool-2(a='(]', b=true)]<|python_end|>", "", [("ns.tool-2", '{"a": "(]", "b": true}')]),
    ("required", f'[{{"name": "get_weather", "parameters": {PARIS}}}]', "", [("get_weather", PARIS)]),
    ("named", PARIS, "", [("add", PARIS)]),
]  # fmt: skip
PLAIN = [  # no calls: all of it is content
    ("hermes", "<tool_call>\nnot json</tool_call>"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add"'),
    ("hermes", "  a < b <tool_cal"),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", "<tool_call><tool_call>{'name': 'add'}</tool_call>"),
    ("hermes", '<tool_call>{"arguments": {"a": 01}, "name": "add"}</tool_call>'),
    ("hermes", ""),
    ("hermes", " \n"),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[TOOL_CALLS]unknown{}"),
    ("mistral", "[TOOL_CALLS] [{}]"),
    ("llama3_json", '{"name": "Bob", "parameters": {}}'),
    ("llama3_json", " {'a': 1}"),
    ("llama3_json", "Hello {"),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", '{"answer": 42}'),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[add(1)]"),
    ("pythonic", "[add(a=open('x'))]"),
    ("pythonic", "[add(a=1"),
    ("pythonic", "[add" + "(" * 300),
    ("required", '[{"name": "add"'),
]


@pytest.mark.parametrize(("parser", "answer", "content", "calls"), CASES)
def test_calls_are_found(parser, answer, content, calls):
    assert read([answer], parser) == (content, "", calls)


@pytest.mark.parametrize(("parser", "answer"), PLAIN)
def test_what_is_no_call_stays_content(parser, answer):
    assert read([answer], parser) == (answer, "", [])


@pytest.mark.parametrize(("parser", "answer"), [(p, a) for p, a, *_ in CASES] + PLAIN)
def test_character_by_character_says_the_same(parser, answer):
    assert read(list(answer), parser) == read([answer], parser)


PIECES = ["<tool_call>", "</tool_call>", "\n", " ", '{"name": "add", "arguments": {"a": 1}}', '{"name": "get_weather"', "<think>",
          "</think>", "[TOOL_CALLS]",
          '[{"name": "add", "parameters": {"b": "\\u00e9\n"}}', "]", "[", "{", "}", '"', ",", ";", ":", "add(",
          "a=1", ")", "x", "é漢😀", "<", "</", "<|python_tag|>", '"arguments": {', "12", "null", "\\", "[ARGS]", "'"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=14).map("".join),
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
    st.sampled_from([*PARSERS, "required", "named", None]),
    st.sampled_from([None, (THINK, False), (THINK, True)]),
)
def test_any_chunking_says_the_same(answer, sizes, parser, thinking):
    tags, opened = thinking or (None, False)
    pieces, at, turn = [], 0, 0
    while at < len(answer):
        pieces.append(answer[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    assert read(pieces, parser, tags, opened) == read([answer], parser, tags, opened)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "mistral", "required"])
def test_any_arguments_arrive_as_they_were_written(parser, arguments):
    call = json.dumps({"name": "add", "arguments": arguments}, ensure_ascii=False)
    form = {"hermes": "<tool_call>%s</tool_call>", "llama3_json": "%s", "mistral": "[TOOL_CALLS][%s]", "required": "[%s]"}[parser]
    content, _, calls = read(list(form.replace("%s", call)), parser)
    assert (content, len(calls), calls[0][0]) == ("", 1, "add")
    assert json.loads(calls[0][1]) == arguments


def test_arguments_stream_before_they_are_complete():
    parser = new_parser("hermes")
    assert parser.push('<tool_call>{"name": "add", "arg') == []
    head = parser.push('uments": {"a": 1, "b')
    assert [type(e).__name__ for e in head][:2] == ["Call", "Arguments"]
    assert "".join(e.text for e in head[1:]) == '{"a": 1, "b'


def test_content_is_not_held_back_without_cause():
    parser = new_parser("hermes")
    assert [e.text for e in parser.push("Hello <b")] == ["Hello <b"]
    assert [e.text for e in parser.push("and <")] == ["and"]
    assert [e.text for e in parser.push(" c")] == [" < c"]


def test_a_call_cut_short_keeps_what_there_is():
    assert read(['<tool_call>{"name": "add", "arguments": {"a": "x'])[2] == [("add", '{"a": "x')]


def test_one_call_only_when_calls_in_parallel_are_switched_off():
    both = '<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "add"}</tool_call>'
    parser = FirstCall(new_parser("hermes"))
    assert {getattr(e, "index", 0) for e in [*parser.push(both), *parser.finish()]} == {0}


@pytest.mark.parametrize(
    ("answer", "opened", "content", "thoughts"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, "Yes", "hm"),
        ("hm</think>Yes", True, "Yes", "hm"),
        ("\n<think></think>Yes", False, "Yes", ""),
        ("<think>cut short", False, "", "cut short"),
        ("no thoughts <think>x</think>", False, "no thoughts <think>x</think>", ""),
        ("<thin", False, "<thin", ""),
        ("a < b</think>c</think>d", True, "c</think>d", "a < b"),
        ("  plain", False, "  plain", ""),
    ],
)
def test_thoughts(answer, opened, content, thoughts):
    for pieces in ([answer], list(answer)):
        assert read(pieces, None, THINK, opened) == (content, thoughts, [])


def test_thoughts_then_a_call():
    answer = f'<think>I must look.</think>\n\nWait.\n<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>'
    assert read(list(answer), "hermes", THINK) == ("Wait.", "I must look.", [("get_weather", PARIS)])


def test_tags_come_from_the_template_or_the_operator():
    assert find_tags("{{ '</think>' }}", None) == THINK
    assert find_tags("{{ '</think>' }}", "none") is None
    assert find_tags("plain", None) is None
    assert find_tags("plain", "qwen3") == THINK


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("<tool_call>\\n{\"name\": <function-name>", "hermes"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}', "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("<tool_call><function=", None),
        ("{{ messages }}", None),
    ],
)
def test_the_parser_is_read_from_the_template(template, parser):
    assert detect_parser(template) == parser


@pytest.mark.filterwarnings("error")
def test_python_calls_are_literals_only():
    assert read_call(r"f(a='\d')") == ("f", r'{"a": "\\d"}')
    assert read_call("f(a=__import__('os'))") is None
    assert read_call("f(**{'a': 1})") is None
    assert read_call("f(a=" + "[" * 5000 + "]" * 5000 + ")") is None
