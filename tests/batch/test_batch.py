"""`llmkit batch`, whole: against a server that repeats what it is told, killed and gone on, and in process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llmkit import cli
from llmkit.batch.answerers import Remote
from llmkit.client.openai import OpenAIClient

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def chat(i, text, **body):
    body = {"messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": f"c{i}", "method": "POST", "url": CHAT, "body": body}


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines))
    return path


def read(path):
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_every_kind_of_line_gets_its_answer(files, fake_openai, capsys):
    source, target = files
    write(source, [
        chat(1, "从前 有 座山"), {"custom_id": "t", "method": "POST", "url": TEXT, "body": {"prompt": "once upon"}},
        {"custom_id": "e", "method": "POST", "url": VECTORS, "body": {"input": "x"}},
        chat(2, "please refuse"), "", "nonsense", chat(3, "x", stream=True),
    ])  # fmt: skip
    assert cli.main(["batch", str(source), str(target), "--url", fake_openai.url]) == 1
    got = read(target)
    assert got["c1"]["response"]["body"]["choices"][0]["message"]["content"] == "从前 有 座山"
    assert (got["c1"]["response"]["status_code"], got["c1"]["error"]) == (200, None)
    assert got["c1"]["response"]["request_id"].startswith("fake-")
    assert got["t"]["response"]["body"]["choices"][0]["text"] == "once upon"
    assert got["e"]["response"]["body"]["data"][0]["embedding"] == [1.0, 2.0]
    assert (got["c2"]["response"]["status_code"], got["c2"]["error"]) == (400, None)
    assert got["c2"]["response"]["body"]["error"]["message"] == "trouble: please refuse"
    assert "line 6: it is not JSON" in got[None]["error"]["message"]
    assert "stream" in got["c3"]["error"]["message"]
    assert got["c3"]["response"] is None
    assert "6 of 6 lines answered, 3 of them with an error" in capsys.readouterr().err


def test_what_is_answered_is_not_asked_again(files, fake_openai, capsys):
    source, target = files
    write(source, [chat(i, "hello") for i in range(5)])
    argv = ["batch", str(source), str(target), "--url", fake_openai.url]
    assert cli.main(argv) == 0
    write(source, [chat(i, "hello") for i in range(7)])
    assert cli.main(argv) == 0
    assert cli.main([*argv[:-1], "http://127.0.0.1:9"]) == 0  # nothing is left to ask anybody
    assert len(fake_openai.requests) == 7
    assert "7 lines answered, 5 of them before" in capsys.readouterr().err


def test_no_more_at_once_than_allowed(files, fake_openai):
    fake_openai.delay = 0.005
    source, target = files
    write(source, [chat(i, "hello you") for i in range(40)])
    assert cli.main(["batch", str(source), str(target), "--url", fake_openai.url, "--concurrency", "4"]) == 0
    assert fake_openai.most <= 4
    assert len(read(target)) == 40


def test_killed_again_and_again_it_loses_and_repeats_nothing(files, fake_openai):
    fake_openai.delay = 0.01
    source, target = files
    write(source, [*(chat(i, f"one two {i}") for i in range(300)), "nonsense"])
    argv = [sys.executable, "-m", "llmkit", "batch", str(source), str(target), "--url", fake_openai.url, "--concurrency", "8"]
    kills = 0
    for seconds in (0.0, 0.05, 0.1):
        child = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        before = target.stat().st_size if target.exists() else 0
        while not target.exists() or target.stat().st_size == before:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    with target.open("ab") as file:
        file.write(b'{"id": "batch_req_0123", "custom_id": "c1", "resp')
    assert subprocess.run(argv, capture_output=True).returncode == 1
    lines = [json.loads(text) for text in target.read_text().splitlines()]
    assert kills == 3
    assert sorted(str(line["custom_id"]) for line in lines) == sorted([*(f"c{i}" for i in range(300)), "None"])
    assert all(line["response"]["body"]["choices"][0]["message"]["content"] == f"one two {line['custom_id'][1:]}"
               for line in lines if line["response"])  # fmt: skip


def test_interrupted_it_says_how_to_go_on(files, fake_openai):
    fake_openai.delay = 0.05
    source, target = files
    write(source, [chat(i, "a b c") for i in range(100)])
    argv = [sys.executable, "-m", "llmkit", "batch", str(source), str(target), "--url", fake_openai.url, "--concurrency", "4"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as child:
        while not target.exists() or not target.stat().st_size:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert f"stopped with {len(read(target))} of 100 lines answered; the same command goes on" in err


@pytest.mark.parametrize(("busy", "status", "times"), [(3, 200, 4), (9, 503, 5)])
def test_a_busy_server_is_asked_again_for_a_while(busy, status, times, fake_openai):
    async def ask():
        remote = Remote(OpenAIClient(fake_openai.url), tries=5, pause=0.005)
        return await remote.ask(TEXT, {"prompt": "hello"})

    fake_openai.busy = busy
    assert asyncio.run(ask()).status == status
    assert len(fake_openai.requests) == times


def test_a_line_that_takes_too_long_is_an_error_of_that_line(files, fake_openai):
    fake_openai.delay = 0.05
    source, target = files
    write(source, [chat(1, "word " * 50), chat(2, "word")])
    assert cli.main(["batch", str(source), str(target), "--url", fake_openai.url, "--timeout", "0.5"]) == 1
    got = read(target)
    assert got["c1"]["error"] == {"code": "no_answer", "message": "no answer within 0.5 s"}
    assert got["c2"]["response"]["status_code"] == 200


def test_a_server_that_is_gone_stops_the_batch(files, fake_openai, capsys):
    source, target = files
    write(source, [chat(1, "hello")])
    assert cli.main(["batch", str(source), str(target), "--url", "http://127.0.0.1:9"]) == 1
    assert "there is no server" in capsys.readouterr().err
    assert target.read_text() == ""


@pytest.mark.parametrize(("argv", "message"), [
    (["--concurrency", "0"], "--concurrency must be at least 1"),
    (["--url", "x", "--max-model-len", "5"], "max_model_len means nothing to it"),
])
def test_wrong_usage(files, argv, message, capsys):
    write(files[0], [])
    assert cli.main(["batch", *map(str, files), *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_answers_to_another_file_are_not_mixed_with_these(files, fake_openai, tmp_path, capsys):
    source, target = files
    assert cli.main(["batch", str(write(source, [chat(1, "a")])), str(target), "--url", fake_openai.url]) == 0
    other = write(tmp_path / "other", [chat(2, "b")])
    assert cli.main(["batch", str(other), str(target), "--url", fake_openai.url]) == 1
    assert "has 1 answers to lines that are not in" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/full")
def test_a_full_disk_is_an_error(files, fake_openai):
    from llmkit.batch.journal import Journal

    source, target = files
    write(source, [chat(1, "a")])
    journal = Journal(target)
    journal._file.close()
    journal._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        journal.append([{"id": "batch_req_1", "response": None}])
    assert journal.done == set()


def test_here_a_line_means_what_the_server_would_do(files, dummy_folder, capsys):
    source, target = files
    lines = [chat(i, f"hello {i}", max_tokens=3 + i, temperature=0) for i in range(6)]
    lines += [chat("bad", "x", temperature=-1), chat("unknown", "x", model="nobody")]
    lines += [chat("named", "x", model="small", max_tokens=2)]
    lines += [{"custom_id": "t", "method": "POST", "url": TEXT, "body": {"prompt": ["a", "b"], "max_tokens": 2}}]
    lines += [{"custom_id": "e", "method": "POST", "url": VECTORS, "body": {"input": ["a", "b"]}}]
    write(source, lines)
    argv = ["batch", str(source), str(target), "--model", str(dummy_folder), "--load-format", "dummy", "--max-model-len", "128",
            "--served-model-name", "small"]
    assert cli.main(argv) == 1
    got = read(target)
    usages = [got[f"c{i}"]["response"]["body"]["usage"]["completion_tokens"] for i in range(6)]
    assert usages == [3 + i for i in range(6)]
    assert got["cbad"]["response"]["status_code"] == 400
    assert got["cbad"]["response"]["body"]["error"]["param"] == "temperature"
    assert got["cunknown"]["response"]["status_code"] == 404
    assert got["cnamed"]["response"]["body"]["usage"]["completion_tokens"] == 2
    assert [c["index"] for c in got["t"]["response"]["body"]["choices"]] == [0, 1]
    assert len(got["e"]["response"]["body"]["data"]) == 2
    assert all(line["response"]["request_id"] for line in got.values())
    assert "11 of 11 lines answered, 2 of them with an error" in capsys.readouterr().err


def test_a_batch_without_the_server_s_packages_says_so_before_a_model_is_loaded(files, monkeypatch, capsys):
    write(files[0], [chat(1, "hello")])
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [n for n in sys.modules if n.startswith("llmkit.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("llmkit.llm.LLM.__init__", None)
    assert cli.main(["batch", *map(str, files)]) == 1
    assert 'pip install "llmkit[server]"' in capsys.readouterr().err
