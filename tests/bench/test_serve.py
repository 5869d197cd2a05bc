"""`llmkit bench serve`: what it sends and when, what it makes of the answers, and that it says when it is the limit itself."""

import asyncio
import json
import math
import statistics
import time

import numpy as np
import pytest

from llmkit import cli
from llmkit.bench.asks import FromFile, read_asks, synthetic
from llmkit.bench.load import Load, Outcome, Run, run_load
from llmkit.bench.serve import percentile, summarize
from llmkit.bench.workload import fixed
from llmkit.client.openai import OpenAIClient, to_json
from llmkit.errors import ConfigError


def bench(capsys, *argv):
    code = cli.main(["bench", "serve", *argv])
    return code, *capsys.readouterr()


def load_of(fake, load, texts, **body):
    bodies = [to_json({"prompt": text, "stream": True, **body}) for text in texts]
    return asyncio.run(run_load(OpenAIClient(fake.url), load, "/v1/completions", bodies, 0))


# ---- when


def test_random_times_are_a_poisson_process_and_repeat():
    times = Load(rate=50).times(20_000, 1)
    gaps = np.diff(times)
    assert times == Load(rate=50).times(20_000, 1)
    assert times != Load(rate=50).times(20_000, 2)
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.05)  # as large as the mean: exponential, not regular
    assert np.mean(gaps > 2 / 50) == pytest.approx(math.exp(-2), rel=0.1)
    assert Load(rate=math.inf).times(3, 0) == [0, 0, 0]


def test_an_open_load_does_not_wait_for_a_slow_server(fake_openai):
    fake_openai.delay = 0.2
    run = load_of(fake_openai, Load(rate=200), ["a b"] * 30)
    assert fake_openai.most > 15
    assert run.seconds < 3
    assert all(o.due <= o.first for o in run.outcomes)


def test_a_request_that_could_not_be_sent_in_time_counts_from_when_it_was_due():
    """The loop is held for 0.3 s, as by a client that is too slow: those that were due meanwhile have waited that long."""
    fake = Outcome(due=0.1, late=0.3, first=0.5, last=0.9, input_tokens=1, output_tokens=5, gaps=[0.1] * 4)
    assert (fake.ttft, fake.e2e, fake.tpot) == pytest.approx((0.4, 0.8, 0.1))
    summary = summarize(Run(Load(rate=1), 1.0, 0.9, [fake] * 3))
    assert summary.latencies["ttft_ms"]["p50"] == pytest.approx(400)
    assert summary.late_ms == pytest.approx(300)
    assert [w.split(": ")[1][:19] for w in summary.warnings] == ["the client used 90%", "one request in a hu"]


def test_a_stalled_client_is_told_of_and_its_requests_wait_from_when_they_were_due(fake_openai):
    async def stall():
        bodies = [to_json({"prompt": "a", "stream": True})] * 40
        sending = asyncio.create_task(run_load(OpenAIClient(fake_openai.url), Load(rate=100), "/v1/completions", bodies, 3))
        await asyncio.sleep(0.05)
        time.sleep(0.4)
        return await sending

    run = asyncio.run(stall())
    summary = summarize(run)
    assert summary.late_ms > 200
    assert any("late or more" in w for w in summary.warnings)
    assert max(o.ttft for o in run.outcomes) > 0.2


def test_a_closed_load_has_so_many_at_once(fake_openai):
    fake_openai.delay = 0.01
    run = load_of(fake_openai, Load(concurrency=5), ["a b c"] * 40)
    summary = summarize(run)
    assert fake_openai.most == 5
    assert summary.in_flight == pytest.approx(5, rel=0.2)  # Little's law
    assert summary.requests_per_s == pytest.approx(40 / run.seconds)
    assert summary.failed == 0


# ---- what comes of it


def test_tokens_and_times_are_those_of_the_server(fake_openai):
    fake_openai.delay = 0.02
    run = load_of(fake_openai, Load(concurrency=1), ["a b c d e"] * 5)
    for o in run.outcomes:
        assert (o.input_tokens, o.output_tokens, len(o.gaps), o.error) == (5, 5, 4, "")
        assert 0.02 <= o.ttft < o.e2e
        assert sum(o.gaps) == pytest.approx(o.last - o.first)
    tpot = [o.tpot for o in run.outcomes]
    assert 0.02 <= statistics.median([t for t in tpot if t is not None]) < 0.06


def test_failures_are_counted_and_left_out_of_the_latencies(fake_openai):
    run = load_of(fake_openai, Load(concurrency=2), ["a b", "please refuse", "a b", "please fail"])
    summary = summarize(run)
    assert (summary.requests, summary.failed) == (4, 2)
    assert summary.failures == {"400: trouble: please refuse": 1, "500: trouble: please fail": 1}
    fake_openai.break_after = 1
    broken = load_of(fake_openai, Load(concurrency=1), ["a b c"]).outcomes[0]
    assert "connection broke" in broken.error
    assert "no server" in load_of(type("Gone", (), {"url": "http://127.0.0.1:9"}), Load(concurrency=1), ["a"]).outcomes[0].error


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("p", [50, 90, 99])
def test_percentiles_are_numpys(count, p):
    values = np.random.default_rng(count).exponential(size=count).tolist()
    assert percentile(values, p) == pytest.approx(np.percentile(values, p))


# ---- prompts


def test_made_up_prompts_have_their_lengths_and_no_common_beginning():
    one, two = (synthetic(fixed(3, 20, 7), seed, 1000, text=False) for seed in (0, 1))
    assert [len(a.prompt) for a in one] == [20] * 3
    assert {a.output_len for a in one} == {7}
    assert max(max(a.prompt) for a in one) < 1000
    assert len({tuple(a.prompt[:4]) for a in one + two}) == 6
    assert [len(str(a.prompt).split()) for a in synthetic(fixed(2, 9, 1), 0, 1, text=True)] == [9, 9]


SHAREGPT = [
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello there you"}]},
    {"conversations": [{"from": "gpt", "value": "no question"}]},
    {"conversations": []},
]
LINES = ['{"prompt": "a", "output_len": 5}', "", '{"messages": [{"role": "user", "content": "b"}], "max_tokens": 6}',
         '{"custom_id": "x", "body": {"prompt": "c", "max_tokens": 7}}', '"d"']  # fmt: skip


def test_datasets(tmp_path):
    path = tmp_path / "data"
    path.write_text(json.dumps(SHAREGPT))
    assert [(a.prompt, a.reference) for a in read_asks(path)] == [("hi", "hello there you")]
    path.write_text("\n".join(LINES))
    asks = read_asks(path)
    assert [a.output_len for a in asks] == [5, 6, 7, None]
    source = FromFile("data", asks, 2)
    assert len(source.take(-1) + source.take(0)) == 4
    assert {str(a.prompt) for a in source.take(-1) + source.take(0)} == {str(a.prompt) for a in asks}
    assert source.has_messages
    for text in ("", "{", "[]", '{"x": 1}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"no prompts|neither JSON"):
            read_asks(path)


# ---- the command


def test_the_command_measures_a_server_somewhere(fake_openai, capsys, tmp_path):
    code, out, _ = bench(capsys, "--url", fake_openai.url + "/v1", "--rate", "200", "inf", "--num-prompts", "20", "--input-len",
                         "6", "--output-len", "4", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.svg"),
                         "--markdown")  # fmt: skip
    assert code == 0
    assert "fake · a server elsewhere\n20 x 6 in, 4 out, completions" in out
    assert "200 a second: 20 of 20 answered" in out
    assert "all at once: 20 of 20 answered" in out
    for name in ("TTFT", "TPOT", "ITL", "E2E", "p99", "| a server elsewhere | serve: fake"):
        assert name in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert [len(load["samples"]) for load in report["loads"]] == [20, 20]
    assert report["loads"][0]["samples"][0]["output_tokens"] == 4
    assert report["options"]["rate"] == [200.0, "inf"]
    assert (tmp_path / "r.svg").read_text().startswith("<?xml")
    body = fake_openai.requests[-1][1]
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert all(isinstance(t, int) for t in body["prompt"])
    prompts = [tuple(b["prompt"]) for _, b in fake_openai.requests]
    assert len(set(prompts)) == len(prompts) == 42  # two to warm up; none is asked twice


def test_the_command_with_a_dataset(fake_openai, capsys, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(SHAREGPT))
    code, _, _ = bench(capsys, "--url", fake_openai.url, "--dataset", str(path), "--num-prompts", "3", "--endpoint", "chat",
                       "--no-ignore-eos", "--extra-body", '{"top_k": 5}', "--plot", str(tmp_path / "one.png"))  # fmt: skip
    assert code == 0
    path_asked, body = fake_openai.requests[-1]
    assert path_asked == "/v1/chat/completions"
    assert (body["messages"][0]["content"], body["max_tokens"], body["top_k"], "ignore_eos" in body) == ("hi", 4, 5, False)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_load_that_fails_gives_an_exit_code(fake_openai, capsys, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "please fail", "output_len": 2}\n')
    code, _, err = bench(capsys, "--url", fake_openai.url, "--dataset", str(path))
    assert code == 1
    assert "does not answer such a request: 500: trouble: please fail" in err
    code, out, _ = bench(capsys, "--url", fake_openai.url, "--dataset", str(path), "--warmup", "0", "--num-prompts", "3")
    assert code == 1
    assert "0 of 3 answered" in out
    assert "warning: 8 at once: 3 failed: 500: trouble: please fail" in out


@pytest.mark.parametrize(("argv", "message"), [
    (["--url", "x", "--dtype", "float32"], "dtype means nothing to it"),
    (["--json", "/no/such/r.json"], "the folder does not exist"),
    (["--plot", "x.gif"], "draws .png, .svg or .pdf"),
    (["--extra-body", "[1]"], "must be a JSON object"),
    (["--rate", "0"], "must be above 0"),
    (["--rate", "1", "--concurrency", "1"], "not allowed with"),
])
def test_mistakes_come_to_light_first(argv, message, capsys):
    code, _, err = bench(capsys, *argv)
    assert code in (1, 2)
    assert message in err


def test_our_own_server_is_started_measured_and_gone(dummy_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path))
    code, out, _ = bench(capsys, str(dummy_folder), "--load-format", "dummy", "--max-model-len", "128", "--concurrency", "4",
                         "--num-prompts", "12", "--input-len", "16", "--output-len", "8", "--json", str(tmp_path / "r.json"))
    assert code == 0, out
    load = json.loads((tmp_path / "r.json").read_text())["loads"][0]
    assert {(s["input_tokens"], s["output_tokens"]) for s in load["samples"]} == {(16, 8)}
    assert "12 of 12 answered" in out
    assert str(tmp_path) not in out
