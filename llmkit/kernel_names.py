"""What to call a kernel. Profilers give mangled template instances of hundreds of characters, of which a word or two matter."""

from __future__ import annotations

import re
from functools import cache

_COPIES = {"HtoD": "copy to the device", "DtoH": "copy to the host", "DtoD": "copy on the device"}
_FUNCTOR = re.compile(r"(\w+)(?:Functor|_kernel_cuda|_kernel_impl)\b")
_TILE = re.compile(r"\d+x\d+(?:x\d+)?")
_FAMILIES = [(family, re.compile(pattern, re.IGNORECASE)) for family, pattern in (
    ("copies", r"^copy |^memset"),
    ("norm", r"norm"),
    ("attention", r"atten|flash|^decode|^combine|^prefill|rope|scaled_dot"),
    ("sampling", r"best_of|sampl|argmax|gumbel|softmax|penal|settle|count_|topk|sort"),
    ("products", r"product|gemm|gemv|cublas|cutlass|linear|matmul|\bmm\b|gate_up|splitk"),
)]  # fmt: skip
FAMILIES = ("products", "attention", "norm", "sampling", "copies", "other")


@cache
def short_name(name: str) -> str:
    """A kernel's name as people say it: no namespaces, no template arguments; a library's tile size stays."""
    if name.startswith("Memcpy"):
        return next((said for way, said in _COPIES.items() if way in name), "copy")
    if name.startswith("Memset"):
        return "memset"
    name = name.removeprefix("void ").removeprefix("aten::")
    library = next((word for word in ("nvjet", "xmma_gemm", "cutlass") if word in name), None)
    if library:
        tile = _TILE.search(name)
        return " ".join(["cuBLAS" if library != "cutlass" else "cutlass", *([tile[0]] if tile else [])])
    functors = _FUNCTOR.findall(name.partition("<")[2])
    bare = re.sub(r"[<(].*", "", name.replace("(anonymous namespace)::", "")).rpartition("::")[2].strip("_") or name
    return f"elementwise {functors[-1].lower()}" if functors and "elementwise" in bare else bare


@cache
def family(short: str) -> str:
    """What a kernel of this short name does: one of FAMILIES."""
    return next((name for name, pattern in _FAMILIES if pattern.search(short)), "other")
