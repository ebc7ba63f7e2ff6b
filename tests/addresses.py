"""Look for addresses that are computed in 32 bits, in every kernel, without a GPU.

    python -m tests.addresses [--only TEXT,TEXT]

A tensor of 2**31 elements or more needs 64-bit offsets, and the cast has to come before the
multiplication. Kernels count rows, steps and slots in 32 bits, which is checked before a launch
(`validation.check_steps` and `check_programs`); what must be wide is a count times a width or a
stride. Each kernel is lowered to Triton's IR (TTIR) with sizes that are no powers of two, so that
they can't be taken for those of a tile, and integers are followed from where they are made to the
pointers they are added to:

* bounded: constants, ranges, remainders by a constant, and what is made of them;
* a count: program ids, loaded integers, arguments that are numbers of things, times tile sizes,
  segment sizes and the number of choices;
* far: a count times anything else, or times a stride, in 32 bits.

Exit status 1 if something far reaches a pointer.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no code to show

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks.codegen import Launch, caught_launches, pretend_triton_runs
from benchmarks.codegen_cases import run_layer

COUNT = 2.0**31 - 1  # what launchers check
# A program holds 16 segments times all experts, and Triton allows 2**20 elements.
MAX_EXPERTS = 2.0**16
FAR = math.inf
# CUDA's limit for the second and third dimension of a grid.
MAX_PROGRAMS_YZ = 2.0**16 - 1
# Sizes of the layers that are lowered: none of them a power of two.
SEGMENT_SIZE, TOP_K, D_MODEL, D_FF = 5, 3, 120, 200
# A count times one of these, or times a power of two, is a count: rows of a tile, steps of a
# segment, slots of a segment, segments of a tile.
COUNTING = {SEGMENT_SIZE, TOP_K, SEGMENT_SIZE * TOP_K}
COUNTING |= {rows // SEGMENT_SIZE for rows in (16, 32, 64, 128, 256)}
# Arguments that count steps or segments; a count of sequences, programs or splits times one of them
# is such a count, too.
LENGTHS = re.compile(
    "^(length|segments_per_sequence|segments_per_block|list_size|num_sequences|blocks_per_split)$"
)
# Arguments that are distances in memory.
DISTANCE = re.compile(r"stride_|_size$")
# Distances within one matrix of weights, whose span in memory is less than 2**31 elements
# (`launch.within_reach`): a bounded index times one of them is bounded by that.
MATRIX = re.compile(r"(stride_(row|down_d)|(first|second|down)\.stride_[nk])$")

# Operations whose results have the bound of their first operand; the first change shapes alone.
SHAPES = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans")
SAME = ("arith.extsi", "arith.trunci", "arith.divsi", "tt.reduce", "tt.scan")
SUMS = ("arith.addi", "arith.subi", "arith.maxsi")

_NAME = r"%[\w.$-]+"
_RESULT = re.compile(rf"^\s*({_NAME})(?::\d+)? = \"?([\w.]+)\"?(.*)$")
_LOOP = re.compile(rf"scf\.for ({_NAME}) = {_NAME} to ({_NAME}) step")
_CARRIED = re.compile(rf"({_NAME}) = ({_NAME})")


class _Stopped(Exception):
    """Carries the IR of a kernel out of the compiler, which need not go on."""


def lower(launch: Launch) -> str:
    """Return the TTIR of a launch, inlined and simplified."""

    def add_stages(self: Any, stages: dict[str, Callable[..., Any]], *args: Any) -> None:
        real(self, stages, *args)
        make_ttir = stages["ttir"]

        def stop(*inner: Any) -> None:
            raise _Stopped(str(make_ttir(*inner)))

        stages["ttir"] = stop

    real = CUDABackend.add_stages
    source = launch.source()
    with (
        mock.patch.object(CUDABackend, "add_stages", add_stages),
        mock.patch.dict(os.environ, TRITON_ALWAYS_COMPILE="1"),
    ):
        try:
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
        except _Stopped as stopped:
            return str(stopped)
    raise RuntimeError(f"the compiler made no TTIR of {launch.function.__name__}")


class _Integers:
    """The integers of one kernel, by the name of their value in the IR."""

    def __init__(self) -> None:
        self.bound: dict[str, float] = {}  # largest magnitude
        self.constant: dict[str, int] = {}
        self.source: dict[str, str] = {}  # the multiplication behind a far value
        # Arguments, and tensors full of one.
        self.distances: set[str] = set()
        self.matrices: set[str] = set()
        self.lengths: set[str] = set()

    def add_argument(self, value: str, name: str) -> None:
        self.bound[value] = MAX_EXPERTS if name == "num_experts" else COUNT
        for pattern, kept in (
            (DISTANCE, self.distances), (MATRIX, self.matrices), (LENGTHS, self.lengths),
        ):  # fmt: skip
            if pattern.search(name):
                kept.add(value)

    def add_loop(self, index: str, end: str, line: str) -> None:
        self.bound[index] = self.bound.get(end, COUNT)
        carried = line.partition("iter_args(")[2].partition(")")[0]
        for name, first in _CARRIED.findall(carried):
            self.bound[name] = max(COUNT, self.bound.get(first, COUNT))

    def add_result(self, name: str, operation: str, rest: str, line: str) -> None:
        operands = re.findall(_NAME, rest.partition(" : ")[0])
        if operation == "arith.constant":
            value = re.search(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]*)?i\d", rest)
            if value:
                self.constant[name] = int(value[1])
                self.bound[name] = abs(int(value[1]))
            return
        if operation in SHAPES:
            for kept in (self.distances, self.matrices, self.lengths):
                if operands[0] in kept:
                    kept.add(name)
            if operands[0] in self.constant:
                self.constant[name] = self.constant[operands[0]]
        known = [self.bound.get(operand, COUNT) for operand in operands]
        if operation == "arith.muli":
            self.bound[name] = self._product(operands, known, line)
        else:
            self.bound[name] = self._bound(operation, operands, known, rest)
        if self.bound[name] == FAR:
            behind = (self.source[operand] for operand in operands if operand in self.source)
            self.source[name] = next(behind, line)

    def _bound(self, operation: str, operands: list[str], known: list[float], rest: str) -> float:
        bound = COUNT
        if operation == "tt.get_program_id" and rest.split(maxsplit=1)[0] != "x":
            bound = MAX_PROGRAMS_YZ
        elif operation == "tt.make_range":
            bound = float(re.search(r"end = (\d+)", rest)[1])
        elif operation == "arith.extui" and re.search(r": (?:tensor<[\dx]*)?i1\b", rest):
            bound = 1.0  # a flag
        elif operation == "arith.select":
            bound = max(known[1:])
        elif FAR in known and operation in (*SHAPES, *SAME, *SUMS):
            bound = FAR
        elif operation == "arith.minsi" or (
            operation == "arith.remsi" and operands[1] in self.constant
        ):
            bound = min(known)
        elif operation in SUMS:
            bound = min(COUNT, sum(known))
        elif operation in (*SHAPES, *SAME) and known:
            bound = known[0]
        return bound

    def _product(self, operands: list[str], known: list[float], line: str) -> float:
        if FAR in known:
            return FAR
        exact = known[0] * known[1]
        fits = not self.distances.intersection(operands) and exact <= COUNT
        if re.search(r"i64>?$", line) or fits:
            return min(COUNT, exact)
        if self.matrices.intersection(operands):
            return COUNT if min(known) < COUNT else FAR
        numbers = [abs(self.constant[operand]) for operand in operands if operand in self.constant]
        counting = any(n in COUNTING or n & (n - 1) == 0 for n in numbers)
        return COUNT if counting or self.lengths.intersection(operands) else FAR


def narrow_addresses(launch: Launch) -> list[str]:
    """Return the lines of TTIR that add something far, computed in 32 bits, to a pointer."""
    integers = _Integers()
    faults = []
    for full in lower(launch).splitlines():
        line = re.sub(r" loc\(.*", "", full).strip()  # without where it comes from
        if "tt.func" in full:
            values = re.findall(rf"({_NAME}): (\S+)", full)
            for (value, kind), name in zip(values, launch.given(), strict=True):
                if kind in {"i32", "i64"}:
                    integers.add_argument(value, name)
        loop = _LOOP.search(line)
        if loop:
            integers.add_loop(*loop.groups(), line)
        result = _RESULT.match(line)
        if not result:
            continue
        name, operation, rest = result.groups()
        if operation == "tt.addptr":
            offset = re.findall(_NAME, rest)[1]
            if integers.bound.get(offset, COUNT) > COUNT:
                faults.append(f"{line} from {integers.source.get(offset, 'a loop')}")
        else:
            integers.add_result(name, operation, rest, line)
    return faults


def _layer_case(**options: Any) -> Callable[[], None]:
    sizes = {"d_model": D_MODEL, "d_ff": D_FF, "num_experts": 6, "segment_size": SEGMENT_SIZE}
    return lambda: run_layer(torch.bfloat16, {**sizes, "segments": 40, **options})


EXTRAS = {"bias": True, "masked": True, "dropout": 0.2, "router_dropout": 0.1}


def cases() -> dict[str, Callable[[], None]]:
    """Name -> what is run: every kernel, with all that adds addresses to it."""
    found = {}
    for top_k in (1, TOP_K):
        found[f"top_k={top_k}"] = _layer_case(top_k=top_k, shared_expert=None)
        # Of narrow rows weight gradients have a kernel of their own.
        for name, width in (("", D_MODEL), (" narrow", 56)):
            found[f"top_k={top_k}{name} gated extras"] = _layer_case(
                d_model=width, top_k=top_k, shared_expert=None, gated=True, **EXTRAS
            )
    found["wide"] = _layer_case(d_model=600, d_ff=1000, shared_expert=None, gated=True, **EXTRAS)
    found["segment"] = _layer_case(expert_scope="segment", shared_expert=None, gated=True, **EXTRAS)
    for pooling in ("mean", "max", "first", "last"):
        found[pooling] = _layer_case(pooling=pooling, masked=True, shared_expert=None, top_k=TOP_K)
    found["causal"] = _layer_case(causal=True, shared_expert="token")
    found["shared"] = _layer_case(gated=True, **EXTRAS)
    return found


def check(only: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Yield ``(kernel, case, faults)`` for each distinct kernel.

    Args:
        only: cases whose name has this text; several texts are separated by commas.
    """
    seen = set()
    for case, run in cases().items():
        if only and not any(text in case for text in only.split(",")):
            continue
        launches: list[Launch] = []
        with caught_launches(launches.append), pretend_triton_runs("sm_90"):
            run()
        for launch in launches:
            if launch.key() not in seen:
                seen.add(launch.key())
                yield launch.function.__name__, case, narrow_addresses(launch)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with one of these texts")
    checked = narrow = 0
    for kernel, case, faults in check(parser.parse_args().only):
        checked += 1
        narrow += len(faults)
        print(f"{kernel:<32} {case:<28} {len(faults)} narrow")
        for fault in faults:
            print(f"    {fault}")
    print(f"{checked} kernels, {narrow} addresses in 32 bits")
    return 1 if narrow or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
