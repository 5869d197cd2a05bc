"""What a fresh process does up to its first token: `python -m llmkit.bench.first_token ENGINE OPTIONS-AS-JSON`.

Prints a line of JSON at each stage, which the parent stamps with its own clock. Imports nothing before it must: the imports
are part of what is measured. Run by llmkit.bench.startup.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is"


def main(engine: str, options: dict[str, Any]) -> None:
    """Say "python" (the interpreter is up), "ready" (the model is loaded), "token", and then the facts."""
    tell("python")
    facts = {"llmkit": run_llmkit, "transformers": run_transformers}[engine](options)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    tell("facts", **facts, threads=torch.get_num_threads(), gpu=gpu)


def tell(at: str, **facts: Any) -> None:
    print(json.dumps({"at": at, **facts}), flush=True)


def run_llmkit(options: dict[str, Any]) -> dict[str, Any]:
    """options: of the engine. The facts name the folder, device and dtype for the others to use."""
    from llmkit import LLM, SamplingParams

    tell("import")
    llm = LLM(**options)
    tell("ready")
    llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    tell("token")
    peak, stages = peak_rss(), dict(llm.startup_report().stages)
    from llmkit.bench.contenders import Subject

    subject = Subject.of(options)
    return {"peak_rss": peak, "stages": stages, "folder": str(subject.folder), "dtype": subject.dtype_name,
            "device": str(subject.device)}  # fmt: skip


def run_transformers(options: dict[str, Any]) -> dict[str, Any]:
    """options: folder, dtype, device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tell("import")
    tokenizer = AutoTokenizer.from_pretrained(options["folder"])
    load: Any = AutoModelForCausalLM
    model = load.from_pretrained(options["folder"], dtype=getattr(torch, options["dtype"])).to(options["device"])
    tell("ready")
    inputs = tokenizer(PROMPT, return_tensors="pt").to(options["device"])
    with torch.inference_mode():
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=1, do_sample=False).tolist()
    tell("token")
    return {"peak_rss": peak_rss()}


def peak_rss() -> int:
    """Most bytes of memory this process has held. Linux's VmHWM rather than ru_maxrss, which a child inherits from its parent."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
