"""Compile every kernel with every shipped tile ahead of time, on a machine without a GPU.

    python -m benchmarks.codegen [--arch sm_80|sm_90|sm_100|gfx942] [--json FILE|-] [--only TEXT]

The launchers themselves are run, on CPU tensors, with their launches caught and compiled instead:
so what is checked is what a GPU would be given. Exit status 1 if a kernel spills registers or takes
more shared memory than the architecture has.

A row: ``kernel, case, arch, dtype, tile, registers, spill_bytes, shared_bytes, wgmma, mma,
uses_dot, instructions``; sizes in bytes, instructions counted in the machine code (SASS or GCN).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no code to show

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from segmoe_kernels import FFNWeights, SegMoE, functional

# Shared memory that one program may take, in bytes.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTER_NAMES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass
class Row:
    """One compiled kernel."""

    kernel: str
    case: str
    arch: str
    dtype: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    uses_dot: bool
    instructions: int

    def fault(self) -> str | None:
        """Say what makes this kernel unfit, or None."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"takes {self.shared_bytes} of {SHARED_LIMIT[self.arch]} bytes of shared memory"
        return None


@dataclass
class Launch:
    """A launch that was caught: what the compiler needs of it."""

    function: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    dtype: str

    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.function.__name__ + repr(parts)

    def tile(self) -> str:
        """The tile sizes, warps and stages, as text."""
        blocks = {k: v for k, v in self.constants.items() if k.startswith(("BLOCK", "CHUNK"))}
        return " ".join(f"{k}={v}" for k, v in {**blocks, **self.options}.items())


def _describe(value: Any, *, constexpr: bool) -> tuple[str, bool]:
    """Return the compiler's name of an argument's type, and whether 16 divides it."""
    if constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return POINTER_NAMES[value.dtype], True
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


def _catch(function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
    for name in ("grid", "warmup"):
        kwargs.pop(name, None)
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    dtype = ""
    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        kind, divisible = _describe(value, constexpr=parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
        if kind.startswith("*") and kind[1:] not in {"i1", "i32", "i64"} and not dtype:
            dtype = kind[1:]
    return Launch(function, signature, constants, attributes, options, dtype)


@contextmanager
def caught_launches(store: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every kernel launch to ``store`` instead of a GPU."""
    real = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        store(_catch(self, args, dict(kwargs)))

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = real


def compile_launch(launch: Launch, arch: str, case: str) -> Row:
    """Compile one launch for ``arch`` and read the result."""
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    options = dict(launch.options)
    if amd:
        options["num_stages"] = min(2, options.get("num_stages", 2))
    compiled = triton.compile(source, target=target, options=options)
    row = Row(
        kernel=launch.function.__name__.removeprefix("_"),
        case=case,
        arch=arch,
        dtype=launch.dtype,
        tile=launch.tile(),
        registers=0,
        spill_bytes=0,
        shared_bytes=compiled.metadata.shared,
        wgmma=0,
        mma=0,
        uses_dot="tt.dot" in compiled.asm["ttir"],
        instructions=0,
    )
    if amd:
        _read_amd(row, compiled.asm["amdgcn"])
    else:
        _read_nvidia(row, compiled.asm["ptx"])
    return row


def _read_nvidia(row: Row, ptx: str) -> None:
    name = row.arch + ("a" if row.arch in {"sm_90", "sm_100"} else "")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx, encoding="utf-8")
        assembler = NVIDIA_BIN / "ptxas"
        blackwell = NVIDIA_BIN / "ptxas-blackwell"
        if row.arch == "sm_100" and blackwell.exists():
            assembler = blackwell
        log = _run(assembler, "-v", f"--gpu-name={name}", source, "-o", cubin)
        sass = _run(NVIDIA_BIN / "nvdisasm", "-c", cubin)
    row.registers = int(re.search(r"Used (\d+) registers", log)[1])
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    row.spill_bytes = int(spills[1]) + int(spills[2]) if spills else 0
    row.instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE))
    row.wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    row.mma = len(re.findall(r"\bmma\.sync", ptx)) + len(re.findall(r"tcgen05\.mma", ptx))


def _read_amd(row: Row, assembly: str) -> None:
    row.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    row.spill_bytes = 4 * int(spilled[1]) if spilled else 0
    row.mma = assembly.count("v_mfma")
    row.instructions = len(re.findall(r"^\t[sv]_|^\t(?:buffer|global|ds)_", assembly, re.MULTILINE))


def _run(*command: Any) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{words[0]} failed: {result.stderr[-2000:]}")
    return result.stdout + result.stderr


def _layer_case(dtype: torch.dtype, **options: Any) -> Callable[[], None]:
    """Forward and backward of a layer on the Triton backend."""

    def run() -> None:
        settings = {"d_model": 64, "num_experts": 4, "segment_size": 5, **options}
        settings.setdefault("d_ff", 2 * settings["d_model"])
        masked = settings.pop("masked", False)
        layer = SegMoE(**settings, backend="triton", dtype=dtype)
        x = torch.zeros(2, 3 * layer.segment_size - 1, layer.d_model, dtype=dtype)
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if masked else None
        y = layer(x.requires_grad_(), mask)
        y.backward(torch.zeros_like(y))

    return run


def _gemm_case(dtype: torch.dtype, n: int, k: int) -> Callable[[], None]:
    def run() -> None:
        x = torch.zeros(4096, k, dtype=dtype, requires_grad=True)
        weight = torch.zeros(8, n, k, dtype=dtype, requires_grad=True)
        offsets = torch.zeros(9, dtype=torch.int32)
        y = functional.grouped_gemm(x, weight, offsets, backend="triton")
        y.backward(torch.zeros_like(y))

    return run


def cases() -> dict[str, Callable[[], None]]:
    """Name -> what is run. Widths and options of the layers that people build."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for d_model in (64, 128, 256):
            plain = {"d_model": d_model, "segment_size": 5}
            found[f"{name} D={d_model}"] = _layer_case(dtype, **plain)
            found[f"{name} D={d_model} gated bias top_k=2"] = _layer_case(
                dtype, **plain, gated=True, bias=True, activation="silu", num_experts=8, top_k=2
            )
        wide = {"d_model": 128, "expert_scope": "segment", "shared_expert": None}
        found[f"{name} segment scope"] = _layer_case(dtype, **wide)
    bf16 = torch.bfloat16
    found["bfloat16 D=16"] = _layer_case(bf16, d_model=16)
    found["bfloat16 dropout mask"] = _layer_case(
        bf16, d_model=128, dropout=0.2, router_dropout=0.1, masked=True, segment_size=3
    )
    for pooling in ("mean", "max", "first", "last"):
        found[f"bfloat16 {pooling}"] = _layer_case(bf16, pooling=pooling, masked=True)
    found["bfloat16 causal"] = _layer_case(bf16, causal=True, shared_expert="token")
    found["bfloat16 E=512"] = _layer_case(bf16, num_experts=512, top_k=2)
    found["bfloat16 D=2048"] = _layer_case(bf16, d_model=2048, segment_size=1, num_experts=8)
    found["bfloat16 gated D=512"] = _layer_case(bf16, d_model=512, gated=True, activation="silu")
    found["float16 D=128"] = _layer_case(torch.float16, d_model=128)
    found["float64 D=64"] = _layer_case(torch.float64)
    found["bfloat16 grouped_gemm"] = _gemm_case(bf16, 256, 128)
    assert FFNWeights._fields  # the launchers below take them
    return found


@contextmanager
def _pretend_triton_runs() -> Iterator[None]:
    """Let ``backend="triton"`` take CPU tensors: nothing is launched."""
    real = functional._why_not_triton
    functional._why_not_triton = lambda device_type: None  # noqa: ARG005
    try:
        yield
    finally:
        functional._why_not_triton = real


def compile_all(arch: str, only: str = "") -> Iterator[Row]:
    """Yield a row for each distinct kernel that the cases launch."""
    seen: set[str] = set()
    for case, run in cases().items():
        if only and only not in case:
            continue
        launches: list[Launch] = []
        with caught_launches(launches.append), _pretend_triton_runs():
            run()
        for launch in launches:
            if launch.key() not in seen:
                seen.add(launch.key())
                yield compile_launch(launch, arch, case)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=sorted(SHARED_LIMIT), default="sm_90")
    parser.add_argument(
        "--json", metavar="FILE", help="write the rows there; - for standard output"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    arguments = parser.parse_args()
    rows, faults = [], 0
    for row in compile_all(arguments.arch, arguments.only):
        rows.append(row)
        faults += row.fault() is not None
        if arguments.json != "-":
            print(
                f"{row.kernel:<28} {row.case:<38} {row.dtype:<5} {row.tile:<62} "
                f"regs {row.registers:>3} spill {row.spill_bytes:>5} smem {row.shared_bytes:>6} "
                f"wgmma {row.wgmma:>3} mma {row.mma:>3} instr {row.instructions:>6}"
                f"{'  FAULT: ' + row.fault() if row.fault() else ''}",
                flush=True,
            )
    if arguments.json:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
