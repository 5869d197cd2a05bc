"""Runs the rows of a suite: an engine for those that share one, results on the screen and in a file as soon as they are there."""

from __future__ import annotations

import gc
import json
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmkit.bench.engines import LOAD_SECONDS, OURS, known_options, load, version
from llmkit.bench.h100 import FULL, Bench, Clock, Fresh, Row, Scale
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.bench.ceilings import Ceilings
    from llmkit.bench.report import Machine


@dataclass
class Suite:
    """Rows to measure, and where the results go: to the screen, and a line of JSON each, as soon as they are there.

    against: packages that do the same work after llmkit, each with its own engine.
    """

    rows: list[Row]
    scale: Scale
    clock: Clock
    repeat: int
    out: TextIO | None
    options: dict[str, Any]
    against: tuple[str, ...] = ()
    results: list[dict[str, Any]] = field(default_factory=list)
    device_name: str = ""

    def run(self) -> int:
        """Measure everything; 1 when a row broke."""
        from llmkit.bench.report import Machine
        from llmkit.engine.start import choose_device

        device = choose_device(self.options.get("device", "auto"))
        machine, ceilings = Machine.here(_threads(), _gpu_name(device)), self._ceilings(device)
        self.device_name = machine.device
        self._write({"suite": "h100", "machine": asdict(machine), "ceilings": asdict(ceilings), "options": self.options})
        note = "" if "H100" in machine.device else "vLLM's figures are of an H100, this is none\n"
        print(f"{machine}\n{ceilings}\n{note}\n{HEADING}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            for package in (OURS, *self.against):
                if package != OURS:
                    print(f"\n{package} {version(package)}, the same work", flush=True)
                for engine in dict.fromkeys(row.engine for row in self.rows):
                    rows = [row for row in self.rows if row.engine == engine]
                    self._measure(package, rows, Path(place), ceilings, machine)
        return int(any("error" in r for r in self.results))

    def _ceilings(self, device: Any) -> Ceilings:
        import torch

        from llmkit.bench.ceilings import SIZES, Sizes, measure_ceilings
        from llmkit.models.config import ModelConfig

        sizes = SIZES[device.type] if self.scale is FULL else Sizes(1 << 20, 64, 1 << 16, 0.001)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return measure_ceilings(device, dtype, ModelConfig.from_dict(self.scale.config("A")), sizes=sizes)

    def _measure(self, package: str, rows: list[Row], place: Path, ceilings: Ceilings, machine: Machine) -> None:
        """All rows of one engine of one package's."""
        rows = [row for row in rows if self._in_time(package, row, LOAD_SECONDS.get(package, 0))]
        if not rows:
            return
        model, _, rest = rows[0].engine.partition("@")
        context, _, quantization = rest.partition("+")
        options = {"model": str(self._folder(model, place)), "load_format": "dummy", "skip_tokenizer_init": True,
                   "max_model_len": self.scale.context(int(context or 4096)), **self.options}  # fmt: skip
        if quantization:
            options["quantization"] = quantization
        try:
            fresh = Fresh(package, known_options(package, options), self.clock, self.repeat)
            with self._bench(package, model, options, ceilings) if context else nullcontext(fresh) as bench:
                for row in rows:
                    self._one(package, row, bench, machine)
        except Exception as error:  # the engine cannot be had: its rows say why, the others go on
            for row in rows:
                if self._found(package, row) is None:
                    unknown = quantization and isinstance(error, ConfigError)
                    self._keep(package, row, {"skipped": str(error).splitlines()[0]} if unknown else _broken(error))

    def _folder(self, model: str, place: Path) -> Path:
        folder = place / model
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.scale.config(model)))
        return folder

    @contextmanager
    def _bench(self, package: str, model: str, options: dict[str, Any], ceilings: Ceilings) -> Iterator[Bench]:
        from llmkit.bench.limits import Limits, ModelCost
        from llmkit.models.config import ModelConfig

        config = self.scale.config(model)
        with load(package, options) as engine:
            cost = ModelCost.of(ModelConfig.from_dict(config), *engine.itemsizes)
            limits = Limits(cost, ceilings.read, ceilings.matmul)
            yield Bench(engine, config, self.scale, limits, self.clock, self.repeat)
        gc.collect()

    def _in_time(self, package: str, row: Row, load: float = 0) -> bool:
        if self.clock.left >= (row.seconds + load if self.scale is FULL else 0):
            return True
        left = f"{max(0, self.clock.left):.0f} s are left, it takes about {row.seconds + load:.0f}"
        self._keep(package, row, {"skipped": f"--budget: {left}"})
        return False

    def _one(self, package: str, row: Row, bench: Any, machine: Machine) -> None:
        if not self._in_time(package, row, row.starts * LOAD_SECONDS.get(package, 0)):
            return
        try:
            found = row.measure(bench)
        except Exception as error:  # this row is lost; the others are still worth measuring
            self._keep(package, row, _broken(error))
        else:
            self._keep(package, row, asdict(found) | {"date": machine.date})

    def _found(self, package: str, row: Row) -> dict[str, Any] | None:
        """What was measured of it, or why it was not."""
        return next((r for r in self.results if (r["package"], r["name"]) == (package, row.name)), None)

    def _keep(self, package: str, row: Row, result: dict[str, Any]) -> None:
        goals = {"name": row.name, "what": row.what, "unit": row.unit, "vllm": row.vllm, "must": row.must, "wants": row.wants}
        value = result.get("value")
        if value is not None and self.scale is FULL:  # what is tiny compares with nothing
            if package == OURS:
                result |= {"reaches_must": row.beats(value, row.must), "reaches_wants": row.beats(value, row.wants),
                           "times_vllm": row.times(value, row.vllm)}  # fmt: skip
            elif ours := (self._found(OURS, row) or {}).get("value"):
                result["times"] = row.times(ours, value)
        self.results.append({"package": package, "version": version(package)} | goals | result)
        self._write(self.results[-1])
        print(line(self.results[-1]), flush=True)

    def _write(self, value: dict[str, Any]) -> None:
        if self.out:
            self.out.write(json.dumps(value, ensure_ascii=False) + "\n")
            self.out.flush()


def _broken(error: Exception) -> dict[str, Any]:
    """What broke a row; a process's exit code tells, too."""
    return {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _gpu_name(device: Any) -> str | None:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


# ---- showing them

HEADING = f"{'row':<18} {'vLLM':>9} {'must':>9} {'wants':>9} {'measured':>9} {'':5} {'x vLLM':>7} {'of limit':>9}"


def line(result: dict[str, Any]) -> str:
    """One row of the table. Of llmkit the last word is what it reaches: wants, must, or below both; of another engine, how many
    times as fast llmkit was in this run."""
    goals = " ".join(_number(result[name]) for name in ("vllm", "must", "wants"))
    start = f"{result['name']:<18} {goals}"
    if "value" not in result:
        return f"{start} " + (f"broke: {result['error']}" if "error" in result else f"skipped: {result['skipped']}")
    share = f"{result['limit_share']:.1%}" if result["limit_share"] is not None else "–"
    times = "–" if result.get("times_vllm") is None else f"{result['times_vllm']:.2f}"
    last = f"llmkit x {result['times']:.2f}" if result.get("times") else _reached(result)
    return f"{start} {_number(result['value'])} {result['unit']:<5} {times:>7} {share:>9}  {last}".rstrip()


def _reached(result: dict[str, Any]) -> str:
    if result.get("reaches_wants"):
        return "wants"
    return {True: "must", False: "below", None: ""}[result.get("reaches_must")]


def _number(value: float | None) -> str:
    if value is None:
        return f"{'–':>9}"
    return f"{value:>9,.0f}" if abs(value) >= 1000 else f"{value:>9.3g}" if value == round(value) else f"{value:>9.3f}"


def markdown(results: list[dict[str, Any]], device: str, options: dict[str, Any]) -> str:
    """Rows for RESULTS.md: date, device, what, figure, share of limit. options: what the engine was told beyond the suite."""
    found, told = [], "".join(f", {name}={value}" for name, value in options.items())
    for r in results:
        if "value" in r:
            share = f"{r['limit_share']:.0%}" if r["limit_share"] is not None else "–"
            figure = f"{_number(r['value']).strip()} {r['unit']}{_beside(r, device)}"
            what = f"h100: {r['name']}, {r['what']}{told}, {r['package']} {r['version']}"
            found.append(f"| {r['date']} | {device} | {what} | {figure} | {share} |")
    return "\n".join(found)


def _beside(result: dict[str, Any], device: str) -> str:
    """What a figure is to be read beside: of llmkit's, vLLM's on an H100; of another's, llmkit's in the same run."""
    if result["package"] == OURS:
        return f" (vLLM 0.26{'' if 'H100' in device else ' on an H100'}: {_number(result['vllm']).strip()})"
    return f" (llmkit x {result['times']:.2f})" if result.get("times") else ""
