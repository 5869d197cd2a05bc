"""The command line: words in, words out. The engine, the hub and the bench are stood in for; the notebook runs are real."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import llmkit
from llmkit import cli, demo
from llmkit.config import DEFAULT_MODEL
from llmkit.errors import ModelNotFoundError
from llmkit.outputs import CompletionOutput, RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams


class FakeLLM:
    """Answers every prompt with its own words, and remembers how it was called."""

    last: "FakeLLM"

    def __init__(self, **options):
        self.options, self.calls = options, []
        FakeLLM.last = self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.2, top_k=20)

    def answer(self, prompt, params):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        answers = [CompletionOutput(i, f"<{text}>", [1, 2], finish_reason="stop") for i in range(params.n)]
        return RequestOutput("0", text, [1], answers, True)

    def generate(self, prompts, params, use_tqdm):
        self.calls.append(("generate", prompts, params))
        return [self.answer(p, params) for p in prompts]

    def chat(self, messages, params, use_tqdm):
        self.calls.append(("chat", messages, params))
        return [self.answer(m, params) for m in messages]

    def stream(self, prompt, params):
        self.calls.append(("stream", prompt, params))
        text = self.answer(prompt, params).text
        yield from (StreamChunk(text[:2], [1]), StreamChunk(text[2:], [2]))


@pytest.fixture(autouse=True)
def _fake_engine(monkeypatch):
    monkeypatch.setattr("llmkit.LLM", FakeLLM)


def run(capsys, *argv):
    code = cli.main(argv)
    return code, *capsys.readouterr()


# ---- usage


@pytest.mark.parametrize(("argv", "message"), [
    (["genrate"], "error: llmkit has no command 'genrate'\n  -> did you mean generate?\n"),
    (["notebooks", "bild"], "error: llmkit notebooks has no command 'bild'\n  -> did you mean build?\n"),
    (["generate", "--tempurature", "1"], "llmkit generate has no option --tempurature\n  -> did you mean --temperature?\n"),
    (["generate", "--max-model-length=5", "x"], "has no option --max-model-length\n  -> did you mean --max-model-len?\n"),
    (["generate", "--dtype", "floot16"], "error: llmkit generate --dtype cannot be 'floot16'\n  -> did you mean float16?\n"),
    (["pull", "a", "b"], "error: llmkit pull takes no further argument 'b'\n  -> llmkit pull --help\n"),
    (["generate", "--max-tokens", "many"], "invalid int value: 'many'\n  -> llmkit generate --help\n"),
    (["run"], "the following arguments are required: NOTEBOOK\n  -> llmkit run --help\n"),
    (["zzzzz"], "error: llmkit has no command 'zzzzz'\n  -> llmkit --help\n"),
])
def test_wrong_usage_names_the_nearest_and_exits_2(argv, message, capsys):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith(message)


@pytest.mark.parametrize("argv", [[], ["--help"], ["demo", "-h"], ["pull", "-h"], ["list", "-h"], ["rm", "-h"],
                                  ["verify", "-h"], ["generate", "-h"], ["run", "-h"],
                                  ["notebooks"], ["notebooks", "build", "-h"]])
def test_every_command_has_help(argv, capsys):
    with contextlib.suppress(SystemExit):
        assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: llmkit", *[a for a in argv if a[0] != "-"]]))


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"llmkit {llmkit.__version__}\n"


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys, llmkit.cli\ntry: llmkit.cli.main(['generate', '--help'])\nexcept SystemExit: print(*sys.modules)"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()).stdout
    assert time.perf_counter() - start < 2, "0.1 s on an idle machine"
    assert not {"torch", "transformers", "numpy", "IPython", "papermill", "gguf", "llmkit.bench"} & set(out.split())


def environment():
    house = Path(llmkit.__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(house), str(house / "kernels"), os.environ.get("PYTHONPATH", "")])}


def start(code):
    """A child that runs this code, with both its outputs as pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment())


# ---- generate


def test_generate_prints_the_answers_of_all_prompts(capsys):
    code, out, err = run(capsys, "generate", "one", "two", "--temperature", "0", "--max_tokens", "5", "--stop", "a",
                         "--stop", "b", "--max-model-len", "64", "--no-enable-prefix-caching", "--seed", "3")
    assert (code, out, err) == (0, "<one>\n<two>\n", "")
    assert FakeLLM.last.options == {"model": DEFAULT_MODEL, "max_model_len": 64, "enable_prefix_caching": False, "seed": 3}
    params = SamplingParams(temperature=0, top_k=20, max_tokens=5, stop=["a", "b"])
    assert FakeLLM.last.calls == [("generate", ["one", "two"], params)]
    assert FakeLLM.last.closed


def test_generate_without_flags_leaves_the_parameters_to_the_model(capsys):
    run(capsys, "generate", "one")
    assert FakeLLM.last.calls == [("generate", ["one"], SamplingParams(temperature=0.2, top_k=20))]


def test_generate_reads_stdin_and_streams_when_asked(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("从前\n有山\n"))
    assert run(capsys, "generate", "--stream")[:2] == (0, "<从前\n有山>\n")
    assert FakeLLM.last.calls[0][:2] == ("stream", "从前\n有山")


def test_generate_streams_one_prompt_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    run(capsys, "generate", "one")
    run_kinds = [FakeLLM.last.calls[0][0]]
    for argv in (["a", "b"], ["a", "--no-stream"], ["a", "--n", "2"], ["a", "--jsonl"]):
        run(capsys, "generate", *argv)
        run_kinds.append(FakeLLM.last.calls[0][0])
    assert run_kinds == ["stream", "generate", "generate", "generate", "generate"]


def test_generate_with_a_system_message_chats(capsys):
    run(capsys, "generate", "hi", "--system", "be brief")
    assert FakeLLM.last.calls[0][:2] == ("chat", [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]])


def test_generate_jsonl_holds_every_answer(capsys):
    _, out, _ = run(capsys, "generate", "hi", "--n", "2", "--jsonl")
    answer = {"text": "<hi>", "tokens": 2, "finish_reason": "stop"}
    assert json.loads(out) == {"prompt": "hi", "outputs": [answer, answer]}


def test_generate_takes_a_schema_from_a_file(capsys, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object"}')
    run(capsys, "generate", "hi", "--json", f"@{tmp_path}/s.json")
    assert FakeLLM.last.calls[0][2].structured_outputs.json == '{"type": "object"}'


@pytest.mark.parametrize(("argv", "code", "message"), [
    (["--temperature", "-1", "hi"], 1, "error: temperature must be at least 0"),
    (["--regex", "a", "--choice", "b", "hi"], 1, "error: structured_outputs needs exactly one"),
    (["--json", "@/no/such", "hi"], 2, "error: cannot read /no/such: No such file"),
    (["--stream", "--n", "2", "hi"], 2, "error: --stream shows one answer at a time"),
])
def test_generate_finds_mistakes_before_a_model_is_loaded(argv, code, message, capsys, monkeypatch):
    monkeypatch.setattr(FakeLLM, "__init__", None)
    got, out, err = run(capsys, "generate", *argv)
    assert (got, out) == (code, "")
    assert err.startswith(message)


def test_a_terminal_without_a_prompt_is_wrong_usage(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    assert run(capsys, "generate")[0] == 2


# ---- errors and interrupts


def test_an_error_is_two_lines_and_exit_code_1(capsys, monkeypatch):
    def refuse(self, **options):
        raise ModelNotFoundError("there is no model x", "give a folder")

    monkeypatch.setattr(FakeLLM, "__init__", refuse)
    assert run(capsys, "generate", "hi") == (1, "", "error: there is no model x\n  -> give a folder\n")


def test_interrupt_exits_130_without_a_traceback():
    code = ("import sys, time\nfrom llmkit import cli\n"
            "def slow(args): print('loading', flush=True); time.sleep(30)\n"
            "cli.models._pull = slow\nsys.exit(cli.main(['pull']))")
    with start(code) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, "\ninterrupted\n")


def test_a_reader_that_leaves_is_no_error():
    code = ("import sys\nfrom llmkit import cli\n"
            "cli.models._pull = lambda args: [print('x' * 1000) for _ in range(10_000)] and None\nsys.exit(cli.main(['pull']))")
    with start(code) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 141


# ---- bench hands over (pull, list, rm, verify: tests/hub/test_inventory.py)


def test_bench_is_imported_only_when_it_is_asked_for(capsys, monkeypatch):
    def add_arguments(parser):
        parser.add_subparsers(dest="what").add_parser("latency").add_argument("--batch", type=int)

    bench = types.SimpleNamespace(add_arguments=add_arguments, run=lambda args: print(args.what, args.batch))
    monkeypatch.setitem(sys.modules, "llmkit.bench", types.ModuleType("llmkit.bench"))
    monkeypatch.setitem(sys.modules, "llmkit.bench.cli", bench)
    assert run(capsys, "bench", "latency", "--batch", "4")[:2] == (0, "latency 4\n")
    assert run(capsys, "bench", "latency", "--bach", "4")[2].endswith("did you mean --batch?\n")


# ---- run and demo


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A folder with a notebook of the demo's name; the current folder is above it."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    names = 'tier: str = "auto"\nseed: int = 0\nname: str = "x"\nfast: bool = False'
    parameters = new_code_cell(names, metadata={"tags": ["parameters"]})
    body = ("import llmkit\nprint('an answer of', tier, seed, name, fast)\nllmkit.record('tokens_per_second', 12.34)\n"
            "llmkit.check('seed is small', seed < 5)")
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(body)]), folder / demo.NOTEBOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.llmkit, "__file__", str(tmp_path / "llmkit" / "__init__.py"))
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    return folder


def test_run_passes_parameters_and_reports(course, capsys):
    code, out, _ = run(capsys, "run", f"notebooks/{demo.NOTEBOOK}", "-v", "-p", "name=7", "--seed", "3", "--fast",
                       "--tier", "cpu")
    assert code == 0
    assert out.startswith("an answer of cpu 3 7 True\n")
    assert "✓ 02_offline_generate · 1 of 1 checks · " in out
    assert out.endswith(f" · runs/{demo.NOTEBOOK}\n")


def test_what_follows_a_streamed_answer_begins_a_line(capsys):
    screen = cli.Screen()
    stream = {"output_type": "stream", "name": "stdout"}
    picture = {"output_type": "display_data", "data": {"image/png": "", "text/plain": "<Figure>"}}
    check = {"output_type": "display_data", "data": {"text/plain": "✓ c"}}
    pieces = [stream | {"text": text} for text in ("a", "b", "d", "e\n")]
    for output in (*pieces[:2], picture, check, pieces[2], None, None, pieces[3], stream | {"name": "stderr", "text": "f"}):
        screen(output)
    assert capsys.readouterr().out == "ab\n✓ c\nd\ne\n"


def test_run_fails_when_a_check_does_and_goes_on_to_the_next(course, capsys):
    (course / "03.ipynb").write_bytes((course / demo.NOTEBOOK).read_bytes())
    code, out, _ = run(capsys, "run", f"notebooks/{demo.NOTEBOOK}", "notebooks/03.ipynb", "--seed=9", "--out", "elsewhere")
    assert code == 1
    assert out.count("✗") == 2
    assert "CheckFailed: check 'seed is small' does not hold" in out
    assert (course.parent / "elsewhere" / "03.ipynb").exists()


@pytest.mark.parametrize(("argv", "code", "message"), [
    (["--sed", "3"], 1, "has no parameter 'sed'\n  -> did you mean 'seed'?\n"),
    (["-p", "seed"], 2, "-p needs NAME=VALUE; got 'seed'\n"),
])
def test_run_refuses_what_the_notebook_does_not_know(argv, code, message, course, capsys):
    got, _, err = run(capsys, "run", f"notebooks/{demo.NOTEBOOK}", *argv)
    assert (got, err[-len(message):]) == (code, message)


def test_demo_fetches_runs_and_shows(course, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmkit.hub", types.SimpleNamespace(resolve=lambda name: f"/models/{name}"))
    code, out, _ = run(capsys, "demo", "--out", "here")
    assert code == 0
    for part in (f"/models/{DEFAULT_MODEL}", "an answer of cpu 0 x False", "✓ seed is small", "1 of 1 checks",
                 "tokens_per_second = 12.3", f"here/{demo.NOTEBOOK}"):
        assert part in out


def test_demo_fails_when_a_check_does(course, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmkit.hub", types.SimpleNamespace(resolve=lambda name: name))
    nb = nbformat.read(course / demo.NOTEBOOK, as_version=4)
    nb.cells[0].source = nb.cells[0].source.replace("seed: int = 0", "seed: int = 6")
    nbformat.write(nb, course / demo.NOTEBOOK)
    code, out, _ = run(capsys, "demo")
    assert code == 1
    assert "✗ 02_offline_generate · 0 of 1 checks" in out


def test_demo_without_the_notebooks_says_how_to_get_them(course, capsys, monkeypatch):
    (course / demo.NOTEBOOK).unlink()
    monkeypatch.setitem(sys.modules, "llmkit.hub", types.SimpleNamespace(resolve=None))
    code, _, err = run(capsys, "demo")
    assert code == 1
    assert 'pip install -e ".[notebook]" && llmkit demo' in err


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [(["se"], {"serve"}), (["serve", "--served-m"], {"--served-model-name"}),
     (["serve", "--dtype", "b"], {"bfloat16"}), (["bench", "--sui"], {"--suite"})],
)  # fmt: skip
def test_bash_completes_commands_flags_and_values(words, expected, tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "llmkit.bash"
    script.write_text(capsys.readouterr().out)
    typed = " ".join(f"'{w}'" for w in ["llmkit", *words])
    ask = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_llmkit; echo \"${{COMPREPLY[@]}}\""
    run = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=30)
    assert set(run.stdout.split()) == expected, run.stderr
