"""chat, batch and bench against our own server: what they get is what the server says to everyone."""

import io
import itertools
import json
import sys
import time

import pytest

from llmkit import cli
from llmkit.server.handle.start import serve


@pytest.fixture(scope="module")
def folder(dummy_folder):
    return dummy_folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_HOME", str(tmp_path_factory.mktemp("home")))
        options = {"load_format": "dummy", "dtype": "float32", "max_model_len": 256, "served_model_name": "small"}
        with serve(folder, reuse=False, **options) as running:
            yield running


def line(i, url, **body):
    return json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": {"model": "small", **body}})


def chat(text):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 9, "temperature": 0}


def answers(path):
    """custom_id -> (status, what does not differ from one asking to the next)."""
    return {a["custom_id"]: (a["response"]["status_code"], _lasting(a["response"]["body"])) for a in map(json.loads, open(path))}


def _lasting(value):
    """Without ids and what a cache had; numbers as far as a batch's size does not touch them."""
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in ("id", "created", "prompt_tokens_details")}
    if isinstance(value, list):
        return [_lasting(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value


def test_a_batch_here_says_what_the_server_says(server, folder, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([
        line(1, "/v1/chat/completions", **chat("你好")),
        line(2, "/v1/chat/completions", **chat("hello"), logprobs=True, top_logprobs=2),
        line(3, "/v1/completions", prompt=["a b", [5, 6, 7]], max_tokens=4, temperature=0, n=2, seed=1),
        line(4, "/v1/completions", prompt="a", stop=["x", 7]), line(5, "/v1/embeddings", input="你好"),
        line(6, "/v1/chat/completions", **chat("x " * 900)), line(7, "/v1/chat/completions", messages=[]),
    ]))  # fmt: skip
    there, here = tmp_path / "there.jsonl", tmp_path / "here.jsonl"
    assert cli.main(["batch", str(source), str(there), "--url", server.url]) == 1
    assert cli.main(["batch", str(source), str(here), "--model", str(folder), "--load-format", "dummy", "--dtype", "float32",
                     "--max-model-len", "256", "--served-model-name", "small"]) == 1  # fmt: skip
    by_server, by_engine = answers(there), answers(here)
    assert {name: status for name, (status, _) in by_server.items()} == {
        "1": 200, "2": 200, "3": 200, "4": 400, "5": 200, "6": 400, "7": 400}  # fmt: skip
    assert by_engine == by_server


def test_a_chat_says_what_the_server_says(server, monkeypatch, capsys):
    plain = server.client().chat.completions.create(model="small", **chat("你好"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n"))
    assert cli.main(["chat", "--url", server.url, "--temperature", "0", "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == plain.choices[0].message.content + "\n"


def test_a_load_counts_what_the_server_counts(server, tmp_path):
    answer = "one two three four five "
    data = [[{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": answer * (i + 1)}] for i in range(6)]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": turns} for turns in data]))
    before = server.stats()["generated_tokens"]
    assert cli.main(["bench", "serve", "--url", server.url, "--dataset", str(tmp_path / "s.json"), "--num-prompts", "6",
                     "--rate", "50", "--json", str(tmp_path / "r.json"), "--warmup", "0"]) == 0  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    lengths = sorted(sample["output_tokens"] for sample in report["loads"][0]["samples"])
    assert [b - a for a, b in itertools.pairwise(lengths)] == [5] * 5  # as long as the file's answers
    assert "cpu" in report["runs_on"]
    deadline = time.monotonic() + 5  # the counts are those of the last step that was told of
    while server.stats()["generated_tokens"] - before != sum(lengths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
