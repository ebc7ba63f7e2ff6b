"""The launches of a package, compiled for a GPU that need not be there and run by the emulator.

    launches = []
    with emulated("sm_90", launches):
        y = layer(x)
    assert not [launch for launch in launches if launch.findings]

Each launch sees copies of the storages of CPU tensors, each alone between red zones; what nobody
has written since ``torch.empty`` is garbage that no kernel may read.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from benchmarks import codegen
from ptx.machine import Program
from ptx.memory import GLOBAL_BASE, RED_ZONE, Bytes, Memory
from ptx.parse import NotEmulated

# Not Triton's own folder: what is kept here has no machine code.
CACHE = Path(__file__).parents[2] / "build" / "ptx"
Change = Callable[[codegen.Launch, str], str]

_compiled: dict[tuple[str, str], tuple[str, int]] = {}
_program = functools.cache(Program)


@dataclass
class Launched:
    """A launch that was run."""

    kernel: str
    findings: list[str]  # each with its launch


def compile_to_ptx(launch: codegen.Launch, arch: str) -> tuple[str, int]:
    """PTX of a launch, and the bytes of shared memory that it takes."""
    key = (arch, launch.function.src + launch.key())
    if key not in _compiled:
        source = launch.source()
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        with (
            mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(CACHE)),
        ):
            result = triton.compile(source, target=target, options=dict(launch.options))
        _compiled[key] = result.asm["ptx"], result.metadata.shared
    return _compiled[key]


def _bytes(storage: torch.UntypedStorage) -> Bytes:
    """A storage's memory itself."""
    if storage.nbytes() == 0:
        return np.zeros(0, np.uint8)
    room = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return np.ctypeslib.as_array(room)


class Unwritten:
    """Remembers what ``torch.empty`` handed out, by the garbage that is still in it."""

    def __init__(self) -> None:
        self.garbage: dict[int, Bytes] = {}
        self.kept: list[torch.Tensor] = []  # else another tensor may get the place
        self.random = np.random.default_rng(1)

    def fill(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put garbage into a new tensor."""
        room = _bytes(tensor.untyped_storage())
        room[:] = self.random.integers(0, 256, room.size, dtype=np.uint8)
        self.garbage[tensor.data_ptr()] = room.copy()
        self.kept.append(tensor)
        return tensor

    def written(self, storage: torch.UntypedStorage) -> Any:
        """Which bytes were written: all of a word of which one has changed."""
        garbage = self.garbage.get(storage.data_ptr())
        if garbage is None:
            return True
        changed = np.pad(_bytes(storage) != garbage, (0, -garbage.size % 4)).reshape(-1, 4)
        return np.repeat(changed.any(1), 4)[: garbage.size]

    def update(self, storage: torch.UntypedStorage, written: Any) -> None:
        """Count what a kernel wrote as written, even if it wrote the garbage again."""
        garbage = self.garbage.get(storage.data_ptr())
        if garbage is not None:
            garbage[written] = ~_bytes(storage)[written]


def _as_word(value: Any, where: dict[int, int]) -> int:
    """An argument as the 64 bits that a kernel is given."""
    if isinstance(value, torch.Tensor):
        start = value.untyped_storage().data_ptr()
        return where[start] + value.data_ptr() - start
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<f", value), "little")
    if isinstance(value, int):
        return value & (1 << 64) - 1
    raise NotEmulated(f"an argument of type {type(value).__name__}")


def run(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: str, unwritten: Unwritten,
    change: Change | None, options: dict[str, Any],
) -> Launched:  # fmt: skip
    """Compile one launch, run it, and write what it wrote into the tensors."""
    grid = kwargs["grid"]
    launch = codegen.catch(function, args, dict(kwargs))
    values = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
    grid = tuple(grid(values) if callable(grid) else grid)
    given = {}
    for name, path, value in codegen.named_arguments(function, args, kwargs):
        if launch.signature[name] != "constexpr":
            given[name] = value
        if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
            launch.attributes.pop(path, None)
    ptx, shared_bytes = compile_to_ptx(launch, arch)
    if change is not None:
        ptx = change(launch, ptx)
    program = _program(ptx, shared_bytes)
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in tensors}
    size = sum(s.nbytes() + 2 * RED_ZONE for s in storages.values()) + 4 * RED_ZONE
    memory = Memory("global", size, GLOBAL_BASE, np.random.default_rng(0))
    where = {start: memory.put(_bytes(s), unwritten.written(s)) for start, s in storages.items()}
    words = [_as_word(value, where) for value in given.values()]
    words += [0] * (len(program.kernel.parameters) - len(words))
    findings = program.launch(grid, words, memory, **options)
    for start, storage in storages.items():
        part = slice(where[start] - memory.base, where[start] - memory.base + storage.nbytes())
        _bytes(storage)[:] = memory.data[part]
        unwritten.update(storage, memory.written[part])
    name = function.__name__
    return Launched(name, [f"{name}{grid} for {arch}: {found}" for found in findings])


@contextmanager
def emulated(
    arch: str, launches: list[Launched], change: Change | None = None, **options: Any
) -> Iterator[None]:
    """Run every launch of a Triton kernel in the emulator: ``launches`` gets a `Launched` of each.

    ``change`` is done to the PTX before, to plant a fault; options are those of `Program.launch`.
    """
    unwritten = Unwritten()

    def launch(function: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(run(function, args, kwargs, arch, unwritten, change, options))

    def filled(function: Any) -> Any:
        return lambda *args, **kwargs: unwritten.fill(function(*args, **kwargs))

    with (
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty)),
        codegen.pretend_triton_runs(arch),
    ):
        yield
