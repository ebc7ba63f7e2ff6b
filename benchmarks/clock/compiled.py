"""Kernels compiled for sm_90 with Triton's own ptxas, kept in ``build/clock``.

A kernel is known by its source, those it calls included, and what it is specialised for, so a
changed one is compiled anew and nothing stale is read.
"""

import hashlib
import json
import os
import re
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.clock import sass
from benchmarks.clock.cache import CACHE, write_whole
from benchmarks.codegen import NVIDIA_BIN, Launch, run_tool

TARGET = GPUTarget("cuda", 90, 32)


def compiled(launch: Launch) -> sass.Kernel:
    """Compile a launch, or read what was compiled before.

    Args:
        launch: from `capture`.

    Raises:
        triton.compiler.errors.CompilationError: and others of Triton's, if it can't be compiled.
    """
    known = (triton.__version__, launch.function.cache_key, launch.key())
    return _compiled(hashlib.sha256(repr(known).encode()).hexdigest()[:16], launch)


_KERNELS: dict[str, sass.Kernel] = {}


def _compiled(digest: str, launch: Launch) -> sass.Kernel:
    if digest not in _KERNELS:
        path = CACHE / "kernels" / f"{digest}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        else:
            found = _compile(launch)
            write_whole(path, json.dumps(found))
        pointers = sass.parameter_offsets(launch.signature)
        root = sass.read_kernel(found.pop("listing"), pointers)
        warps = launch.options.get("num_warps", 4)
        _KERNELS[digest] = sass.Kernel(
            digest, launch.function.__name__, **found, num_warps=warps, root=root
        )
    return _KERNELS[digest]


def _compile(launch: Launch) -> dict[str, Any]:
    source = launch.source()
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    result = triton.compile(source, target=TARGET, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = run_tool(NVIDIA_BIN / "cuobjdump", "-res-usage", file.name)
        code = run_tool(NVIDIA_BIN / "nvdisasm", "-gi", "-c", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared_bytes": result.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "listing": sass.annotate(code),
    }
