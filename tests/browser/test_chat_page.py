"""The server's own page in a real browser: it streams, stops, keeps what was said, and lets a hostile answer do nothing."""

import json
import time

import pytest

from llmkit.server.handle.start import serve

HOSTILE = ('<img src=x onerror="document.title=1"> <script>document.title=2</script> [go](javascript:document.title=3) '
           '**bold** `<b>` ![p](https://a.example/x.png)\n\n| a | b |\n|---|---|\n| 1 | <i>2</i> |')  # fmt: skip


@pytest.fixture(scope="module")
def server(dummy_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_HOME", str(tmp_path_factory.mktemp("home")))
        with serve(dummy_folder, load_format="dummy", max_model_len=8192, served_model_name="small", reuse=False) as running:
            yield running


def wait(condition, seconds=20):
    """The page's policy forbids the browser to run a test's text as a program, so it is Python that looks."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ready(page):
    page.wait_for_selector("#model option", state="attached")


def answer_by(page, handler):
    """Answers are the test's own. Loaded again, the page cannot ask before the browser knows that: on a busy machine it could."""
    page.route("**/v1/chat/completions", handler)
    page.reload()
    ready(page)


def ask(page, text):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def answered(page, number):
    page.wait_for_selector("#send:not([hidden])")
    wait(lambda: page.locator("article.assistant .facts").count() == number)
    return page.locator("article.assistant").nth(number - 1)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_an_answer_streams_and_is_stopped_half_way(server, open_page, dark):
    opened = open_page(server.url, dark)
    page = opened.page
    ready(page)
    page.click("#open-settings")
    page.fill("#temperature", "0.5")
    page.fill("#max_tokens", "6")
    page.fill("#system", "Be brief.")
    ask(page, "你好")
    first = answered(page, 1)
    assert "6 tokens" in first.locator(".facts").inner_text()
    assert "cut off" in first.locator(".facts").inner_text()
    page.fill("#max_tokens", "8000")
    ask(page, "and on and on")
    second = page.locator("article.assistant .text").nth(1)
    wait(lambda: len(second.inner_text()) > 20)
    size = len(second.inner_text())
    wait(lambda: len(second.inner_text()) > size)  # it grows while it is read
    page.keyboard.press("Escape")
    assert "stopped" in answered(page, 2).locator(".facts").inner_text()
    wait(lambda: server.stats()["running"] == 0, 5)
    kept = second.inner_text()
    page.fill("#max_tokens", "2")
    page.get_by_text("Try again").click()
    wait(lambda: second.inner_text() != kept)
    answered(page, 2)
    opened.picture(f"page-{'dark' if dark else 'light'}")
    page.reload()
    ready(page)
    assert (page.input_value("#temperature"), page.locator("article").count()) == ("0.5", 0)
    assert opened.complaints == []


def stream(*pieces):
    """What a server sends."""
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    events += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}]
    return "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"


def test_a_hostile_answer_is_only_text(server, open_page):
    opened = open_page(server.url)
    page = opened.page
    pieces = [HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]
    answer_by(page, lambda r: r.fulfill(status=200, content_type="text/event-stream", body=stream(*pieces)))
    ask(page, "<b>hi</b>")
    answer = answered(page, 1)
    assert page.title() == "llmkit"
    assert page.locator("#log img, #log script, #log i, #log b").count() == 0
    assert [a.get_attribute("href") for a in answer.locator("a").all()] == ["https://a.example/x.png"]
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("td").nth(1).inner_text() == "<i>2</i>"
    assert page.locator("article.user .text").inner_text() == "<b>hi</b>"
    assert opened.complaints == []


def test_a_server_that_wants_a_key_gets_it(server, open_page):
    page = open_page(server.url).page
    keys = []

    def guard(route):
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer secret":
            return route.fulfill(status=200, content_type="text/event-stream", body=stream("welcome"))
        return route.fulfill(status=401, json={"error": {"message": "no key"}})

    answer_by(page, guard)
    ask(page, "hello")
    page.wait_for_selector("[role=alert]")
    assert "API key" in page.locator("[role=alert]").inner_text()
    assert page.locator("#key").evaluate("node => node === document.activeElement")
    page.keyboard.type("secret")
    ask(page, "hello")
    assert answered(page, 1).locator(".text").inner_text() == "welcome"
    assert keys == [None, "Bearer secret"]
    assert page.locator("[role=alert]").count() == 0
    assert page.locator("article.user").count() == 1  # what got no answer is not asked twice


def test_in_chinese_and_with_the_keys_alone(server, chromium):
    context = chromium.new_context(locale="zh-CN", viewport={"width": 400, "height": 700})
    page = context.new_page()
    page.goto(server.url)
    answer_by(page, lambda r: r.fulfill(status=200, content_type="text/event-stream", body=stream("好")))
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.inner_text("#send") == "发送"
    assert page.get_attribute("#input", "placeholder") == "消息"
    named = page.locator("button, select, input, textarea").all()
    assert all(n.evaluate("n => (n.ariaLabel || n.labels?.[0]?.textContent || n.textContent).trim()") for n in named)
    assert page.locator("#input").evaluate("node => node === document.activeElement")
    page.keyboard.type("第一行")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("第二行")
    page.keyboard.press("Enter")
    answered(page, 1)
    assert page.locator("article.user .text").inner_text() == "第一行\n第二行"
    page.keyboard.press("ArrowUp")
    assert page.input_value("#input") == "第一行\n第二行"
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    context.close()
