"""The plot of land: what lies at the top, what may never lie there, and what the files of the house promise each other."""

import fnmatch
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import llmkit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
README = (ROOT / "README.md").read_text("utf-8")
MAIN_JOB = 'pip install -e ".[notebook]" && llmkit demo'
TESTS = 'pip install -e ".[test]" && python -m pytest -n 2 --dist loadfile'
TOP = {"pyproject.toml", "environment.yml", "README.md", "LICENSE", "notebooks", "llmkit", "kernels", "tests"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Paths that git knows, relative to the top."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the house")
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(p) for p in out.split("\0") if p and (ROOT / p).exists()]


def test_the_top_level_is_exactly_as_planned(tracked):
    assert {p.parts[0] for p in tracked if not p.parts[0].startswith(".")} == TOP


def test_kernels_holds_one_package_and_nothing_else(tracked):
    """A module in kernels/ would make `kernels` importable and hide the package transformers looks for."""
    inside = [p for p in tracked if p.parts[0] == "kernels"]
    assert {p.parts[1] for p in inside} == {"llmkit_kernels"}
    assert not [p.name for p in (ROOT / "kernels").iterdir() if p.suffix in (".py", ".pyi", ".so")]
    assert Path("kernels/llmkit_kernels/__init__.py") in inside


def test_tests_are_no_packages():
    """tests/kernels/__init__.py would be the same trap."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert "--import-mode=importlib" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]


def test_every_room_is_a_package_and_every_file_in_it_is_shipped(tracked):
    inside = [p for p in tracked if p.parts[0] == "llmkit"]
    rooms = {p.parent for p in inside if p.suffix == ".py"}
    assert {r for r in rooms if r / "__init__.py" not in inside} == set()
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["llmkit"]
    data = [p.relative_to("llmkit").as_posix() for p in inside if p.suffix != ".py"]
    assert [d for d in data if not any(fnmatch.fnmatch(d, pattern) for pattern in patterns)] == []


def test_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"server", "notebook", "gpu", "flash", "quant", "dist", "test", "all"}
    assert not [r for r in extras["all"] if "flash" in r], "flash-attn is compiled from source: never part of [all]"


def test_dependencies_are_ranges_and_names_only():
    project = PROJECT["project"]
    for requirement in [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]:
        assert "==" not in requirement.partition(";")[0], requirement
        assert "@" not in requirement, f"{requirement}: a place, not a name"


def test_environment_yml_has_one_owner_for_everything_but_python_pip_and_git():
    from rattler import MatchSpec

    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, pip = environment["dependencies"]
    assert [str(MatchSpec(spec, strict=True)) for spec in conda] == ["python 3.12.*", "pip >=25", "git"]
    assert pip == {"pip": ["-e .[notebook]"]}
    assert "notebook" in PROJECT["project"]["optional-dependencies"]


def test_the_first_screen_of_the_readme_has_both_commands():
    first_screen = README.split("\n")[:40]
    assert MAIN_JOB in first_screen
    assert TESTS in first_screen


def test_the_readme_has_a_chinese_section_after_the_english_one():
    assert README.index("## 中文") > README.index(MAIN_JOB)
    assert README.count(MAIN_JOB) == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash runs .ci/run")
def test_ci_runs_the_test_command_of_the_readme_as_written():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    extract = re.search(r"^command=\$\((grep .* README\.md)\)$", script.read_text("utf-8"), re.M)
    assert extract is not None
    found = subprocess.run(["bash", "-c", extract[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == TESTS + "\n"
    assert 'bash -c "$command"' in script.read_text("utf-8")


def test_readme_links_lead_somewhere():
    links = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert links
    assert [t for t in links if not (ROOT / t).exists()] == []


def test_license_is_whole():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert PROJECT["project"]["license"] == "Apache-2.0"
    for part in ("Version 2.0, January 2004", "9. Accepting Warranty or Additional Liability.", "END OF TERMS AND CONDITIONS"):
        assert part in text


def test_the_version_is_what_pyproject_reads():
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "llmkit.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", llmkit.__version__)


# Written in two halves, so that this file does not find itself.
PLACES = re.compile("|".join([
    r"pypi\." + "org", "pythonhosted" + r"\.org", r"registry\.npm" + "js", r"conda\.ana" + "conda", r"tuna\." + "tsinghua",
    r"mirrors?\.[a-z]+\." + "(?:com|edu|cn)",
    "/" + r"root/", "/" + r"work/", "/" + r"home/[a-z]", "/" + r"opt/",
]))


def test_no_tracked_file_names_a_package_index_or_a_place_on_a_machine(tracked):
    found = {}
    for path in tracked:
        text = (ROOT / path).read_bytes().decode("utf-8", "replace")
        if hits := sorted(set(PLACES.findall(text))):
            found[str(path)] = hits
    assert found == {}
