"""Compile every kernel with every shipped tile ahead of time, on a machine without a GPU.

    python -m benchmarks.codegen [--arch sm_80|sm_90|sm_100|sm_120|gfx942] [--json FILE|-]
                                 [--only TEXT,TEXT] [--brief]

The launchers themselves are run, on CPU tensors, with their launches caught and compiled instead:
so what is checked is what a GPU would be given. Exit status 1 if a kernel spills registers or takes
more shared memory than the architecture has.

A row of FILE whose launch and kernel are the same still isn't compiled again. `results/codegen/`
has the brief runs, which tests hold to be of the kernels that are here.

A row: ``kernel, case, arch, dtype, tile, registers, spill_bytes, shared_bytes, wgmma, mma,
uses_dot, instructions, float_atomics, narrow``; sizes in bytes; spills and instructions are counted
in the machine code (SASS or GCN) that Triton made. ``narrow`` names what has too few bits in a
float64 launch: floats, and flags, whose width decides there whether a product compiles. ``digest``
is of all that the machine code depends on.
"""

import argparse
import functools
import hashlib
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
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no code to show

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.codegen_cases import BRIEF_FLOAT64, brief_cases, cases
from benchmarks.digests import kernel_digests
from segmoe_kernels import functional, options

# Shared memory that one program may take, in bytes.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
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
    num_warps: int = 4
    float_atomics: int = 0
    narrow: str = ""
    digest: str = ""

    def fault(self) -> str | None:
        """Say what makes this kernel unfit, or None."""
        # Float64 is for checks, not for speed.
        if self.spill_bytes and self.dtype != "fp64":
            return f"spills {self.spill_bytes} bytes"
        if self.arch.startswith("sm_") and self.registers * 32 * self.num_warps > 65536:
            return f"needs {self.registers} registers in each of {32 * self.num_warps} threads"
        if self.float_atomics:
            return f"adds floats atomically {self.float_atomics} times"
        if self.narrow:
            return f"computes float64 with {self.narrow}"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"takes {self.shared_bytes} of {SHARED_LIMIT[self.arch]} bytes of shared memory"
        return None


@dataclass
class Launch:
    """A launch that was caught: what the compiler needs of it.

    Arguments go by name; a field of a tuple has that of the tuple, a dot and its own.
    """

    function: JITFunction
    types: dict[str, Any]  # of parameters: names of types, in tuples as the arguments are
    signature: dict[str, str]  # of arguments
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    paths: dict[str, tuple[int, ...]]  # where an argument is among the parameters
    options: dict[str, Any]
    dtype: str

    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.function.__name__ + repr(parts)

    def source(self) -> ASTSource:
        """What ``triton.compile`` takes."""
        constants = {self.paths[name]: value for name, value in self.constants.items()}
        return ASTSource(self.function, self.types, constants, self.attributes)

    def given(self) -> list[str]:
        """The arguments that a GPU gets, in order."""
        return [name for name, kind in self.signature.items() if kind != "constexpr"]

    def narrow(self) -> str:
        """The arguments of a float64 launch that have too few bits."""
        kinds = {"fp32", "*fp32", "*fp16", "*bf16", "*i1"} if self.dtype == "fp64" else set()
        return " ".join(name for name, kind in self.signature.items() if kind in kinds)

    def tile(self) -> str:
        """The tile sizes, warps and stages, as text."""
        blocks = {k: v for k, v in self.constants.items() if k.startswith(("BLOCK", "CHUNK"))}
        return " ".join(f"{k}={v}" for k, v in {**blocks, **self.options}.items())


def _describe(value: Any, *, constant: bool, special: bool) -> tuple[str, bool]:
    """Return the compiler's name of an argument's type, and whether it is told that 16 divides it.

    As Triton's launcher does.
    """
    if constant or value is None or (type(value) is int and value == 1 and special):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return POINTER_NAMES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), special and value % 16 == 0
    return "fp32", False


def named_arguments(
    function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Yield ``(name, path, value)`` of every argument of a launch, of tuples every field."""

    def fields(name: str, path: tuple[int, ...], value: Any) -> Iterator[Any]:
        if isinstance(value, tuple):
            names = getattr(value, "_fields", range(len(value)))
            for index, (field, inner) in enumerate(zip(names, value, strict=True)):
                yield from fields(f"{name}.{field}", (*path, index), inner)
        else:
            yield name, path, value

    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    for index, parameter in enumerate(function.params):
        if parameter.is_constexpr:  # whole
            yield parameter.name, (index,), values[parameter.name]
        else:
            yield from fields(parameter.name, (index,), values[parameter.name])


def catch(function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Describe one launch by what it was called with; kwargs loses what is no argument."""
    names = ("num_warps", "num_stages", "maxnreg")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    for name in ("grid", "warmup"):
        kwargs.pop(name, None)
    signature, constants, attributes, paths = {}, {}, {}, {}
    dtype = ""
    for name, path, value in named_arguments(function, args, kwargs):
        parameter = function.params[path[0]]
        # In a tuple Triton specialises every number.
        special = len(path) > 1 or not parameter.do_not_specialize
        kind, divisible = _describe(value, constant=parameter.is_constexpr, special=special)
        signature[name], paths[name] = kind, path
        if kind == "constexpr":
            constants[name] = value
        elif divisible:
            attributes[path] = [["tt.divisibility", 16]]
        if kind.startswith("*") and kind[1:] not in {"i1", "i32", "i64"} and not dtype:
            dtype = kind[1:]
    kinds = iter(signature.values())

    def types(value: Any, constant: bool = False) -> Any:
        inside = isinstance(value, tuple) and not constant
        return getattr(value, "_make", tuple)(map(types, value)) if inside else next(kinds)

    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    nested = {p.name: types(values[p.name], p.is_constexpr) for p in function.params}
    return Launch(function, nested, signature, constants, attributes, paths, options, dtype)


@contextmanager
def caught_launches(store: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every kernel launch to ``store`` instead of a GPU."""
    real = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        store(catch(self, args, dict(kwargs)))
        for _, _, value in named_arguments(self, args, kwargs):
            # PyTorch may look rows up by them.
            if isinstance(value, torch.Tensor) and value.dtype == torch.int32:
                value.zero_()

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = real


def describe(launch: Launch, arch: str, case: str) -> Row:
    """What is known of a launch that is not compiled."""
    name = launch.function.__name__
    parts = (triton.__version__, arch, launch.key(), _kernel_digests().get(name))
    return Row(
        kernel=name.removeprefix("_"),
        case=case,
        arch=arch,
        dtype=launch.dtype,
        tile=launch.tile(),
        registers=0,
        spill_bytes=0,
        shared_bytes=0,
        wgmma=0,
        mma=0,
        uses_dot=False,
        instructions=0,
        num_warps=launch.options.get("num_warps", 4),
        narrow=launch.narrow(),
        digest=hashlib.sha256(repr(parts).encode()).hexdigest()[:12],
    )


@functools.cache
def _kernel_digests() -> dict[str, str]:
    return kernel_digests()


def compile_launch(launch: Launch, arch: str, case: str) -> Row:
    """Compile one launch for ``arch`` and read the result."""
    source = launch.source()
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    options = dict(launch.options)
    if amd:
        options["num_stages"] = min(2, options.get("num_stages", 2))
    compiled = triton.compile(source, target=target, options=options)
    row = describe(launch, arch, case)
    row.shared_bytes = compiled.metadata.shared
    row.uses_dot = "tt.dot" in compiled.asm["ttir"]
    if launch.dtype == "fp64":
        inside = sorted(set(re.findall(r"\bb?f(?:16|32)\b", compiled.asm["ttir"])))
        row.narrow = " ".join([row.narrow, *inside]).strip()
    if amd:
        _read_amd(row, compiled.asm["amdgcn"])
    else:
        _read_nvidia(row, compiled.asm["ptx"], compiled.asm["cubin"])
    return row


def _read_nvidia(row: Row, ptx: str, cubin: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool(NVIDIA_BIN / "cuobjdump", "-res-usage", file.name)
        sass = run_tool(NVIDIA_BIN / "nvdisasm", "-c", file.name)
    row.registers = int(re.search(r"REG:(\d+)", usage)[1])
    row.spill_bytes = sum(
        {"64": 8, "128": 16}.get(width, 4)
        for width in re.findall(r"\b(?:STL|LDL)(?:\.LU)?(?:\.(64|128))?\b", sass)
    )
    row.instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE))
    row.wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    row.mma = len(re.findall(r"\bmma\.sync", ptx)) + len(re.findall(r"tcgen05\.mma", ptx))
    row.float_atomics = len(re.findall(r"\b(?:red|atom)\.\S*\.(?:b?f16|f32|f64)", ptx))


def _read_amd(row: Row, assembly: str) -> None:
    row.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    row.spill_bytes = 4 * int(spilled[1]) if spilled else 0
    row.mma = assembly.count("v_mfma")
    row.float_atomics = len(re.findall(r"_atomic_(?:pk_)?add_(?:b?f16|f32|f64)", assembly))
    row.instructions = len(re.findall(r"^\t[sv]_|^\t(?:buffer|global|ds)_", assembly, re.MULTILINE))


def run_tool(*command: Any) -> str:
    """Run a program and return what it printed."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{words[0]} failed: {result.stderr[-2000:]}")
    return result.stdout + result.stderr


@contextmanager
def pretend_triton_runs(arch: str) -> Iterator[None]:
    """Let ``backend="triton"`` take CPU tensors as if on a GPU of ``arch``: nothing is launched."""
    hip = "0" if arch.startswith("gfx") else None
    with (
        mock.patch.object(functional, "_why_not_triton", return_value=None),
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(options, "_NOW", options.settings()._replace(arch=arch)),
    ):
        yield


def compile_all(
    arch: str, only: str = "", *, brief: bool = False, known: dict[str, Row] | None = None
) -> Iterator[Row]:
    """Yield a row for each distinct kernel that the cases launch.

    Args:
        arch: a key of SHARED_LIMIT; its tiles are taken.
        only: cases whose name has this text; several texts are separated by commas.
        brief: `brief_cases` alone, and of float64 `BRIEF_FLOAT64` once.
        known: rows by digest, which are not compiled again.
    """
    seen: set[str] = set()
    found = cases()
    for case, run in ((name, found[name]) for name in (brief_cases() if brief else found)):
        if only and not any(text in case for text in only.split(",")):
            continue
        launches: list[Launch] = []
        with caught_launches(launches.append), pretend_triton_runs(arch):
            run()
        for launch in launches:
            if launch.key() not in seen:
                seen.add(launch.key())
                name, row = launch.function.__name__, describe(launch, arch, case)
                short = brief and case.startswith("float64")
                told = short and (name not in BRIEF_FLOAT64 or name in seen)
                if short:
                    seen.add(name)
                if not told:
                    row = (known or {}).get(row.digest) or compile_launch(launch, arch, case)
                yield row


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=sorted(SHARED_LIMIT), default="sm_90")
    parser.add_argument(
        "--json", metavar="FILE", help="write the rows there; - for standard output"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="cases whose name has one of the comma-separated texts",
    )
    parser.add_argument("--brief", action="store_true", help="the few cases of tests/test_codegen")
    arguments = parser.parse_args()
    rows, faults, known = [], 0, {}
    if arguments.json and os.path.exists(arguments.json):
        for row in json.loads(Path(arguments.json).read_text(encoding="utf-8")):
            del row["fault"]
            known[row["digest"]] = Row(**row)
    for row in compile_all(arguments.arch, arguments.only, brief=arguments.brief, known=known):
        rows.append(row)
        faults += row.fault() is not None
        if arguments.json != "-":
            print(
                f"{row.kernel:<28} {row.case:<38} {row.dtype:<5} {row.tile:<62} "
                f"regs {row.registers:>3} spill {row.spill_bytes:>5} smem {row.shared_bytes:>6} "
                f"wgmma {row.wgmma:>3} mma {row.mma:>3} "
                f"instr {row.instructions:>6}"
                f"{'  FAULT: ' + row.fault() if row.fault() else ''}",
                flush=True,
            )
    if arguments.json:
        found = (json.dumps(asdict(row) | {"fault": row.fault()}) for row in rows)
        text = "[\n" + ",\n".join(found) + "\n]"
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
