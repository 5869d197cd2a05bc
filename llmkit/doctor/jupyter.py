"""The notebook side: kernel, packages, widgets, and fonts for Chinese labels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from llmkit.doctor.report import Finding, ok, warn
from llmkit.doctor.software import install_extra, missing, requirements, version_of

CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP")  # those that notebook/matplotlibrc names
INSTALL_FONTS = "apt-get install -y fonts-noto-cjk   # macOS: brew install --cask font-noto-sans-cjk"


def jupyter() -> list[Finding]:
    """The packages of the [notebook] extra, and whether Jupyter can start a kernel of this very Python."""
    names = [r.name for r in requirements("notebook") if r.name != "llmkit"]  # the extra includes [server]
    wrong = [name for name in names if missing(name, "notebook")]
    if wrong:
        return [warn("jupyter", f"missing or too old: {', '.join(wrong)}", install_extra("notebook"))]
    detail = ", ".join(f"{n} {version_of(n)}" for n in ("jupyterlab", "ipykernel", "papermill"))
    if in_kernel():
        return [ok("jupyter", f"{detail}; this is a kernel")]
    if mine := kernels_of_this_python():
        return [ok("jupyter", f"{detail}; kernel {', '.join(mine)}")]
    return [warn("jupyter", f"{detail}; no kernel runs this Python", "python -m ipykernel install --user --name llmkit")]


def in_kernel() -> bool:
    """True when this process is a Jupyter kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def kernels_of_this_python() -> list[str]:
    """Names of the registered kernels that start this interpreter."""
    from jupyter_core.paths import jupyter_path

    specs = [spec for folder in jupyter_path("kernels") for spec in sorted(Path(folder).glob("*/kernel.json"))]
    return list(dict.fromkeys(spec.parent.name for spec in specs if _starts_this_python(spec)))


def _starts_this_python(spec: Path) -> bool:
    program = (json.loads(spec.read_text("utf-8")).get("argv") or [""])[0]
    if program in ("python", "python3"):  # jupyter_client puts its own interpreter there
        return True
    return bool(program) and Path(program).parent.resolve() == Path(sys.executable).parent.resolve()


def widgets() -> list[Finding]:
    """Live views need ipywidgets and anywidget; without them the same views are pictures."""
    absent = [name for name in ("ipywidgets", "anywidget") if version_of(name) is None]
    if absent:
        return [ok("widgets", f"no {' and no '.join(absent)}: pictures instead of live views", f"pip install {' '.join(absent)}")]
    return [ok("widgets", ", ".join(f"{name} {version_of(name)}" for name in ("ipywidgets", "anywidget")))]


def fonts() -> list[Finding]:
    """A font with Chinese characters that figures will use."""
    here = [name for name in CJK_FONTS if name in font_families()]
    if here:
        return [ok("fonts", f"{here[0]}: Chinese labels are drawn")]
    return [warn("fonts", "no font for Chinese: labels of figures will show boxes", INSTALL_FONTS)]


def font_families() -> set[str]:
    """Names of the installed fonts. fontconfig knows them in milliseconds; matplotlib must read every file once."""
    if program := shutil.which("fc-list"):
        lines = subprocess.run([program, ":", "family"], capture_output=True, text=True, check=True).stdout.splitlines()
        return {name.strip() for line in lines for name in line.split(",")}
    if version_of("matplotlib") is None:
        return set()
    from matplotlib.font_manager import fontManager

    return {font.name for font in fontManager.ttflist}
