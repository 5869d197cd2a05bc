"""Prompts must be, letter for letter, those of transformers' apply_chat_template."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import models

from llmkit.chat import is_batch_of_conversations, is_conversation, render_chat
from llmkit.errors import InvalidRequestError, TokenizerError
from llmkit.tokenizer import RustBackend, Tokenizer

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is defined %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
    {%- if message.content %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function %}{%- set call = call.function %}{%- endif %}
        {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is false %}{{- '<think></think>' }}
{%- endif %}{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role == 'ipython' or message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role == 'user' and loop.first and tools is not none %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n\\n' }}
        {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% endif %}{% endfor %}"""

PHI3 = """\
{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}
{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

PARTS = """\
{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{% endfor %}"""
TEXT_OR_PARTS = """\
{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content %}[{{ part['text'] }}]{% endfor %}{% endif %}{% endfor %}"""
JOINS_ARGUMENTS = """\
{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"""

TALK = [
    {"role": "user", "content": "  你好 <b>&\"'</b>\n"},
    {"role": "assistant", "content": " Hello! 👨‍👩‍👧 "},
    {"role": "user", "content": "again"},
]
SYSTEM = [{"role": "system", "content": " Be short. "}, *TALK]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}}}
TOOL_TALK = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"t": 21}'},
]
FUNCTION = {"name": "weather", "description": "Weather <now> 天气", "parameters": {"type": "object"}}
SCHEMA = {"type": "function", "function": FUNCTION}


def weather(city: str, days: int = 1) -> str:
    """Weather of a city.

    Args:
        city: Name of the city
        days: How many days
    """
    return city * days


def tokenizer(template=None) -> Tokenizer:
    return Tokenizer(RustBackend(Rust(models.BPE({"a": 0}, []))), dict(SPECIALS), template)


@functools.cache
def auto(template: str):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Rust(models.BPE({"a": 0}, [])), chat_template=template, **SPECIALS)


def theirs(template: str, messages, **kwargs) -> str:
    kwargs.setdefault("add_generation_prompt", not kwargs.get("continue_final_message", False))
    return auto(template).apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize("messages", [TALK, SYSTEM, TALK[:1], TALK[:2]])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("template", [CHATML, QWEN_TOOLS, LLAMA3, PHI3, TEXT_OR_PARTS])
def test_equals_transformers(template, messages, generate):
    ours = render_chat(tokenizer(template), messages, add_generation_prompt=generate)
    assert ours == theirs(template, messages, add_generation_prompt=generate)


def test_equals_transformers_mistral():
    assert render_chat(tokenizer(MISTRAL), TALK) == theirs(MISTRAL, TALK)


@pytest.mark.parametrize("tools", [[SCHEMA], [weather], [SCHEMA, weather], None])
@pytest.mark.parametrize("messages", [TALK, TOOL_TALK])
@pytest.mark.parametrize("template", [QWEN_TOOLS, LLAMA3])
def test_tools_equal_transformers(template, messages, tools):
    assert render_chat(tokenizer(template), messages, tools=tools) == theirs(template, messages, tools=tools)


@pytest.mark.parametrize("template", [CHATML, QWEN_TOOLS, LLAMA3, PHI3])
@pytest.mark.parametrize("last", ["Once upon", "Once upon ", "Once\n"])
def test_continuing_equals_transformers(template, last):
    messages = [*TALK, {"role": "assistant", "content": last}]
    ours = render_chat(tokenizer(template), messages, continue_final_message=True)
    assert ours == theirs(template, messages, continue_final_message=True)
    assert ours.rstrip().endswith(last.rstrip())


def test_variables_reach_the_template():
    for kwargs in ({"enable_thinking": False}, {"enable_thinking": True}, {}):
        assert render_chat(tokenizer(QWEN_TOOLS), TALK, **kwargs) == theirs(QWEN_TOOLS, TALK, **kwargs)
    assert "Today Date: 1 May" in render_chat(tokenizer(LLAMA3), TALK, date_string="1 May")
    assert render_chat(tokenizer("{{ documents[0].text }}"), TALK, documents=[{"text": "d"}]) == "d"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_by_any_name(name):
    messages = [TALK[0], {"role": "assistant", "content": "4", name: "2+2"}, TALK[2]]
    assert "<think>2+2</think>4" in render_chat(tokenizer(QWEN_TOOLS), messages)


def test_arguments_as_json_text_are_parsed():
    call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "北京", "days": 2}'}}
    written = [TOOL_TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, TOOL_TALK[2]]
    assert render_chat(tokenizer(QWEN_TOOLS), written) == theirs(QWEN_TOOLS, TOOL_TALK)
    assert written[1]["tool_calls"][0] is call  # the caller's messages are left alone
    assert call["function"]["arguments"] == '{"city": "北京", "days": 2}'


def test_templates_that_join_arguments_get_text():
    assert render_chat(tokenizer(JOINS_ARGUMENTS), TOOL_TALK) == 'weather{"city": "北京", "days": 2}'


def test_content_in_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    flat = [{"role": "user", "content": "one\ntwo"}]
    for template in (CHATML, QWEN_TOOLS, LLAMA3, MISTRAL, PHI3):
        assert render_chat(tokenizer(template), parts) == render_chat(tokenizer(template), flat)
    for template in (PARTS, TEXT_OR_PARTS):
        assert render_chat(tokenizer(template), parts) == theirs(template, parts)
    assert "<user>text" in render_chat(tokenizer(PARTS), [{"role": "user", "content": "text"}])
    assert render_chat(tokenizer(PARTS), parts, continue_final_message=True) == "<user>onetwo"


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video"])
def test_what_is_not_text_is_refused_by_name(kind):
    messages = [TALK[0], {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "x"}}]}]
    with pytest.raises(InvalidRequestError, match=rf"messages\[1\]\.content\[1\].*{kind}"):
        render_chat(tokenizer(CHATML), messages)


BAD = {
    "messages must be a list": "hello",
    "messages must not be empty": [],
    r"messages\[1\] must be a dict": [TALK[0], "hi"],
    r"messages\[0\]\.role must be text": [{"content": "x"}],
    r"messages\[1\]\.role 'wizard' is unknown": [TALK[0], {"role": "wizard", "content": "x"}],
    r"messages\[0\]\.content must be text or a list": [{"role": "user", "content": 3}],
    r"messages\[0\]\.content\[0\] has no 'text'": [{"role": "user", "content": [{"type": "text"}]}],
    r"messages\[0\] has no content": [{"role": "user", "content": None}],
    r"messages\[0\]\.tool_calls must be a list": [{"role": "assistant", "tool_calls": "x"}],
    r"messages\[0\]\.tool_calls\[0\] must look like": [{"role": "assistant", "tool_calls": [{"id": 1}]}],
    r"messages\[0\]\.tool_calls\[0\]\.function\.arguments is not valid JSON": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    ],
}


@pytest.mark.parametrize("match", BAD)
def test_bad_messages_are_named(match):
    with pytest.raises(InvalidRequestError, match=match) as error:
        render_chat(tokenizer(CHATML), BAD[match])
    assert error.value.param
    assert error.value.param.startswith("messages")


def test_what_the_template_refuses_is_named():
    talk = [TALK[0], TALK[1], TALK[1], TALK[0]]
    with pytest.raises(InvalidRequestError, match=r"messages\[2\] .*must alternate"):
        render_chat(tokenizer(MISTRAL), talk)
    two = [TALK[0], {"role": "assistant", "tool_calls": [CALL, CALL]}]
    with pytest.raises(InvalidRequestError, match=r"messages\[1\] .*single tool-calls"):
        render_chat(tokenizer(LLAMA3), two)
    with pytest.raises(InvalidRequestError, match=r"messages\[1\].*content"):
        render_chat(tokenizer(CHATML), [TALK[0], {"role": "assistant", "tool_calls": [CALL]}])


def test_a_template_may_know_roles_of_its_own():
    template = "{% for m in messages %}{% if m.role == 'observation' %}O:{{ m.content }}{% endif %}{% endfor %}"
    assert render_chat(tokenizer(template), [{"role": "observation", "content": "x"}]) == "O:x"


def test_continue_and_generate_exclude_each_other():
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        render_chat(tokenizer(CHATML), TALK, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InvalidRequestError, match=r"messages\[1\] has no content to continue"):
        render_chat(tokenizer(QWEN_TOOLS), TOOL_TALK[:2], continue_final_message=True)
    with pytest.raises(InvalidRequestError, match=r"messages\[0\] is left out"):
        render_chat(tokenizer("nothing"), TALK[:1], continue_final_message=True)


def test_which_template_is_used(tmp_path):
    several = tokenizer({"default": "D", "tool_use": "T", "rag": "R"})
    assert [render_chat(several, TALK), render_chat(several, TALK, tools=[SCHEMA])] == ["D", "T"]
    assert render_chat(several, TALK, chat_template="rag") == "R"
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].role }}", encoding="utf-8")
    for given in (path, str(path), "{{ messages[0].role }}"):
        assert render_chat(tokenizer(CHATML), TALK, chat_template=given) == "user"


def test_missing_and_broken_templates():
    with pytest.raises(TokenizerError, match=r"no chat template.*\n.*chat_template="):
        render_chat(tokenizer(), TALK)
    with pytest.raises(TokenizerError, match=r"several chat templates \(a, b\) and no default"):
        render_chat(tokenizer({"a": "A", "b": "B"}), TALK)
    with pytest.raises(TokenizerError, match="is no file"):
        render_chat(tokenizer(CHATML), TALK, chat_template="/no/such/file.jinja")
    with pytest.raises(TokenizerError, match="broken in line 2"):
        render_chat(tokenizer("\n{% for %}"), TALK)


@pytest.mark.parametrize("tools", ["x", [3], [lambda x: x], [len]])
def test_bad_tools(tools):
    with pytest.raises(InvalidRequestError, match="tools") as error:
        render_chat(tokenizer(QWEN_TOOLS), TALK, tools=tools)
    assert error.value.param == "tools"


@pytest.mark.parametrize("template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ ''.__class__.mro() }}"])
def test_templates_are_sandboxed(template):
    with pytest.raises(InvalidRequestError, match="does not fit the chat template"):
        render_chat(tokenizer(template), TALK)


def test_kinds_of_input():
    assert is_conversation(TALK)
    assert is_batch_of_conversations([TALK, SYSTEM])
    for other in ("text", [], ["text"], [1, 2], None, [TALK]):
        assert not is_conversation(other)
    for other in (TALK, [], [[]], "text", [TALK, "x"]):
        assert not is_batch_of_conversations(other)


def test_rendering_needs_no_transformers():
    code = (
        "import sys; from tests_chat import tokenizer, CHATML, TALK; from llmkit.chat import render_chat; "
        "render_chat(tokenizer(CHATML), TALK); assert not {'torch', 'transformers'} & set(sys.modules)"
    ).replace("from tests_chat import", f"sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_chat import")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)
