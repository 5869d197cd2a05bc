"""In JupyterLab, light and dark: %llmkit serve shows a card that comes to life, %%llmkit chat streams and is stopped half-way."""

import json
import re
import shutil
import time
import warnings

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ASK = "Write a long story about a lighthouse keeper and the sea."
CELLS = [
    "%load_ext llmkit",
    "%llmkit serve --max-model-len 2048",
    "%%llmkit chat --temperature 0 --max-tokens 40 --out answer\nHello! Say **one** sentence about {topic}.",
    f"%%llmkit chat --new --temperature 0 --max-tokens 1500 --ignore-eos --out story\n{ASK}",
    "print(answer.finish_reason, story.finish_reason, len(story.text) > 20)",
    "%llmkit status",
]


@pytest.fixture
def notebook(tmp_path, smollm2_folder):
    cells = [new_code_cell(c) for c in CELLS]
    cells[0].source += '\ntopic = "the sea"\nprint("loaded")'
    nb = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    nbformat.write(nb, tmp_path / "nb.ipynb")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


class Notebook:
    """The notebook in the page, cell by cell."""

    def __init__(self, page):
        self.page = page
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        self.wait_until_idle()

    def wait_until_idle(self, seconds=60):
        """Of a connected kernel: Lab also says idle while it has none yet, and a cell run then starts a second one."""
        end = time.monotonic() + seconds
        while not self.page.evaluate("""() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'
                && !/^(No Kernel)?$/.test(document.querySelector('.jp-Toolbar-kernelName')?.innerText ?? '')"""):
            assert time.monotonic() < end, "the kernel is not idle"
            self.answer_dialogs()
            self.page.wait_for_timeout(50)

    def answer_dialogs(self):
        """Lab's own questions (which kernel? it died, shall it start again?) get the answer it proposes, and are told."""
        for dialog in self.page.locator(".jp-Dialog").all():
            warnings.warn(f"JupyterLab asked: {dialog.inner_text()!r}", stacklevel=2)
            dialog.locator(".jp-mod-accept").click()

    def run(self, number):
        """Start the cell; does not wait."""
        self.answer_dialogs()
        self.page.locator(".jp-CodeCell .jp-InputArea-editor .cm-content").nth(number).click()
        self.page.keyboard.press("Control+Enter")

    def output(self, number):
        return self.page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea").first

    def wait_for(self, number, pattern, seconds=60):
        """The text of the cell's output, once it matches."""
        end, text = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            text = self.output(number).inner_text()
            if re.search(pattern, text):
                return text
            self.page.wait_for_timeout(50)
        raise AssertionError(f"cell {number} does not show {pattern!r} but:\n{text}")

    def stop(self):
        self.page.locator('.jp-NotebookPanel-toolbar [data-jp-item-name="interrupt"] button, '
                          '.jp-NotebookPanel-toolbar [data-command="notebook:interrupt-kernel"]').first.click()  # fmt: skip

    def save(self):
        """And wait until Lab says that nothing is unsaved."""
        self.page.keyboard.press("Control+s")
        self.page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')", timeout=20_000)


def contrast(page, selector):
    """Of the text of the first element that matches, on what is behind it: the ratio that WCAG defines."""
    return page.evaluate("""selector => {
      const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
      const lum = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 })
                         return .2126 * r + .7152 * g + .0722 * b }
      const node = document.querySelector(selector)
      let back = node
      const solid = n => { const c = parse(getComputedStyle(n).backgroundColor); return c.length < 4 || c[3] > .9 }
      while (back.parentElement && !solid(back)) back = back.parentElement
      const colours = [getComputedStyle(node).color, getComputedStyle(back).backgroundColor]
      const [[...text], ground] = colours.map(parse)
      const alpha = text.length > 3 ? text[3] : 1
      const [a, b] = [lum(text.slice(0, 3).map((v, i) => alpha * v + (1 - alpha) * ground[i])), lum(ground.slice(0, 3))]
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
    }""", selector)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_serve_and_chat(notebook, lab, open_page, dark):
    name = "dark" if dark else "light"
    with lab(notebook, dark) as address:
        page = open_page(address.format("nb.ipynb"), dark)
        nb = Notebook(page.page)
        assert page.page.evaluate("document.body.dataset.jpThemeLight") == str(not dark).lower()
        nb.run(0)
        nb.wait_for(0, "loaded")

        nb.run(1)  # the card is there at once, the cell has ended, and then the card comes to life
        nb.wait_for(1, "starting")
        nb.wait_until_idle(5)
        page.picture(f"{name}-1-starting")
        nb.wait_for(1, r"ready[\s\S]*http://127\.0\.0\.1:\d+/v1", 60)
        group = page.page.locator('[role="group"][aria-label^="llmkit server ready"]')
        assert group.count() == 1, "one card, not two"
        assert page.page.locator('[role="group"] a').get_attribute("href").startswith("http://127.0.0.1:")
        assert contrast(page.page, '[role="group"] b') > 4.5
        assert contrast(page.page, '[role="group"] span') > 4.5
        page.picture(f"{name}-2-ready")

        nb.run(2)
        nb.wait_for(2, r"tokens/s · (stop|length)")
        assert page.page.locator('[role="article"]').count() == 1
        assert contrast(page.page, '[role="article"] p') > 4.5
        assert contrast(page.page, '[role="article"] small') > 4.5

        nb.run(3)
        early = nb.wait_for(3, r"(\w+ ){8}")
        page.page.wait_for_timeout(700)
        later = nb.output(3).inner_text()
        assert len(later) > len(early), "it streams"
        assert page.page.locator('[role="article"][aria-busy="true"]').count() == 1
        page.picture(f"{name}-3-streaming")
        nb.stop()
        nb.wait_for(3, r"stopped: the answer above is kept")
        assert page.page.locator('[role="article"][aria-busy="true"]').count() == 0
        nb.run(4)
        assert nb.wait_for(4, r"\w+ \w+ \w+\n?").split() in (["stop", "abort", "True"], ["length", "abort", "True"])
        nb.run(5)
        nb.wait_for(5, "ready")
        page.page.wait_for_timeout(300)
        page.picture(f"{name}-4-stopped")
        nb.save()
        assert page.complaints == []
    saved = json.loads((notebook / "nb.ipynb").read_text("utf-8"))
    card, chat, story = (saved["cells"][i]["outputs"] for i in (1, 2, 3))
    assert "".join(card[0]["data"]["text/plain"]).startswith("● llmkit server ready")
    assert len(chat) == 1
    assert "tokens/s" in "".join(chat[0]["data"]["text/plain"])
    assert [o["output_type"] for o in story] == ["display_data", "error"]
    assert "stopped]" in "".join(story[0]["data"]["text/plain"])
    assert "widgets" not in saved["metadata"]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_servers_own_page(open_page, smollm2_folder, tmp_path, monkeypatch, dark):
    import llmkit

    monkeypatch.setenv("LLMKIT_RUN_DIR", str(tmp_path))
    with llmkit.serve(str(smollm2_folder), max_model_len=2048, served_model_name="smol") as server:
        page = open_page(f"{server.url}/", dark)
        page.page.wait_for_load_state("networkidle")
        page.picture(f"page-{'dark' if dark else 'light'}-1")
        box = page.page.locator("textarea:visible").last
        box.fill("Tell me a very long story about the sea. 你好")
        box.press("Enter")
        end = time.monotonic() + 60
        while server.stats()["generated_tokens"] < 20:
            assert time.monotonic() < end
            page.page.wait_for_timeout(100)
        page.page.wait_for_timeout(300)
        page.picture(f"page-{'dark' if dark else 'light'}-2")
        assert len(page.page.locator("main, body").first.inner_text()) > 100
        assert page.complaints == []
