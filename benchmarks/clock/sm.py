"""One SM: warps that issue in order, four issue ports, pipes with widths, latencies, barriers.

`run` simulates programs side by side from their first instruction to their last, long loops cut short;
what is cut off is added at the pace of their last iterations. Left out: caches of instructions and constants, bank conflicts, dual issue, the waits that the
compiler writes into control codes (dependences of registers are followed instead), and the latency
of tensor descriptors' copies.
"""

import functools
import hashlib
import heapq
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clock import sass
from benchmarks.clock.compiled import CACHE, Kernel, source_digest, write_whole
from benchmarks.clock.machine import Machine

__all__ = ["PIPES", "Run", "decode", "run", "simulate"]

PIPES = ("integer", "float", "special", "tensor", "memory", "uniform", "barrier")
_INTEGER, _FLOAT, _SPECIAL, _TENSOR, _MEMORY, _UNIFORM, _BARRIER = range(7)
# What an instruction does beyond holding its pipe.
_PLAIN, _COPY, _CLOSE_COPIES, _AWAIT_COPIES, _WGMMA, _AWAIT_WGMMA, _MEETS = range(7)
_MEMORY_QUEUE = 24  # clocks of work that wait before the memory pipe without stopping a warp
_TENSOR_QUEUE = 256


@dataclass(frozen=True)
class Run:
    """What programs take that run side by side.

    Attributes:
        clocks: from the start of all to the end of the last.
        busy: clocks that each of `PIPES`, and "issue", is held meanwhile.
    """

    clocks: float
    busy: dict[str, float]

    def times(self, factor: float) -> "Run":
        """So many of it."""
        return Run(self.clocks * factor, {n: b * factor for n, b in self.busy.items()})

    def plus(self, other: "Run", factor: float) -> "Run":
        """Add so many of another."""
        added = other.times(factor)
        busy = {n: b + added.busy[n] for n, b in self.busy.items()}
        return Run(self.clocks + added.clocks, busy)


@dataclass(frozen=True)
class _Decoded:
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    pipe: int
    busy: float
    latency: float
    kind: int = _PLAIN
    count: int = 0  # what may stay outstanding; of a wgmma whether it closes a group


def decode(instruction: sass.Instruction, machine: Machine, dram: frozenset[str]) -> _Decoded:
    """Say what an instruction reads, writes and holds.

    Args:
        instruction: to decode.
        machine: whose latencies count.
        dram: pointer arguments whose loads miss L2.
    """
    writes, reads = (tuple(r) for r in sass.registers(instruction))
    name, opcode, words = instruction.name, instruction.opcode, instruction.words
    load = machine.dram_latency if instruction.reads_from & dram else machine.l2_latency
    pipe, busy, latency, kind, count = _INTEGER, machine.integer_busy, 5.0, _PLAIN, 0
    if name == "HMMA":
        half = "1688" in opcode
        pipe, busy, latency = _TENSOR, machine.mma_busy / (2 if half else 1), 33.0
    elif name == "HGMMA":
        shape = re.match(r"HGMMA\.64x(\d+)x(\d+)", opcode)
        columns, depth = int(shape[1]), int(shape[2])
        products = columns / 2 * (2 if "TF32" in opcode and depth == 8 else 1)
        # 32 bytes of b for each column, and of a 2,048, at 128 bytes a clock.
        in_shared = instruction.operands[1].startswith("gdesc")
        busy = max(products, columns / 4 + (16 if in_shared else 0))
        pipe, latency, kind, count = _TENSOR, 30.0, _WGMMA, "gsb0" in str(instruction.operands)
    elif name == "MUFU":
        pipe, busy, latency = _SPECIAL, machine.special_busy, 23.0
    elif name in {"I2F", "F2I", "F2F", "FRND", "I2FP"}:
        pipe, busy, latency = _SPECIAL, 2.0 if name == "I2FP" else machine.special_busy, 14.0
    elif name in {"FFMA", "FADD", "FMUL"}:
        pipe, busy, latency = _FLOAT, 1.0, 4.0
    elif name in {"HFMA2", "HADD2", "HMUL2"}:
        pipe, busy = _FLOAT, 1.0
    elif name == "IMAD":
        pipe, busy = _FLOAT, 1.5
    elif name in {"LDS", "LDSM"}:
        pipe, busy, latency = _MEMORY, float(words), machine.shared_latency
    elif name in {"STS", "STSM"}:
        pipe, busy, latency = _MEMORY, float(words), 0.0
    elif name == "SHFL":
        pipe, busy, latency = _MEMORY, 1.0, machine.shuffle_latency
    elif name == "LDG":
        pipe, busy, latency = _MEMORY, 2.0 * words, load
    elif name == "STG":
        pipe, busy, latency = _MEMORY, 2.0 * words, 0.0
    elif name in {"LDL", "STL"}:
        pipe, busy, latency = _MEMORY, float(words), machine.l1_latency
    elif name == "LDGSTS":
        pipe, busy, latency, kind = _MEMORY, 8.0, load, _COPY
    elif name == "LDGDEPBAR":
        kind = _CLOSE_COPIES
    elif name == "DEPBAR":
        kind, count = _AWAIT_COPIES, _last_number(instruction)
    elif name == "WARPGROUP" and "DEPBAR" in opcode:
        kind, count = _AWAIT_WGMMA, _last_number(instruction)
    elif name in {"S2R", "S2UR", "R2UR", "LDC", "ULDC"}:
        pipe, busy, latency = _UNIFORM, 1.0, 20.0
    elif name.startswith("U"):
        pipe, busy, latency = _UNIFORM, 1.0, 8.0
    elif name == "BAR":
        pipe, busy, latency, kind = _BARRIER, 1.0, machine.barrier_latency, _MEETS
    if name in {"ISETP", "FSETP", "PLOP3", "VOTE"}:
        latency = 9.0
    return _Decoded(writes, reads, pipe, busy, latency, kind, int(count))


def _last_number(instruction: sass.Instruction) -> int:
    return int(instruction.operands[-1], 16) if len(instruction.operands) > 1 else 0


class _Warp:
    __slots__ = (
        "at",
        "copies",
        "next",
        "open",
        "port",
        "program",
        "ready",
        "round",
        "steps",
        "wgmmas",
    )

    def __init__(self, program: int, port: int) -> None:
        self.program, self.port, self.next = program, port, 0.0
        self.at = 0
        self.ready: dict[str, float] = {}
        self.copies: list[float] = []  # when each closed group has arrived
        self.open = 0.0  # when the copies of the open group have arrived
        self.wgmmas: list[float] = []


def simulate(code: list[_Decoded], programs: int, warps: int) -> float:
    """Clocks until the last warp has issued its last instruction.

    Args:
        code: of a program, with its loops written out.
        programs: side by side on the SM; they start together.
        warps: of each.
    """
    length = len(code)
    flock = [_Warp(p, w % 4) for p in range(programs) for w in range(warps)]
    queue = [(warp.next, at) for at, warp in enumerate(flock)]  # the oldest goes first
    heapq.heapify(queue)
    ports = [0.0] * 4
    free = [[0.0] * 4 for _ in PIPES]
    memory = 0.0
    waiting: list[list[tuple[float, int]]] = [[] for _ in range(programs)]
    end = 0.0
    while queue:
        now, at = heapq.heappop(queue)
        warp = flock[at]
        step = code[warp.at]
        ready, port, pipe, kind = warp.ready, warp.port, step.pipe, step.kind
        time = max(warp.next, ports[port])
        for register in step.reads:
            time = max(time, ready.get(register, 0.0))
        for register in step.writes:
            time = max(time, ready.get(register, 0.0))
        if kind == _AWAIT_COPIES and len(warp.copies) > step.count:
            time = max(time, *warp.copies[: len(warp.copies) - step.count])
        elif kind == _AWAIT_WGMMA and len(warp.wgmmas) > step.count:
            time = max(time, warp.wgmmas[-step.count - 1])
        if pipe == _MEMORY:
            time = max(time, memory - _MEMORY_QUEUE)
        elif kind == _WGMMA:
            time = max(time, free[_TENSOR][port] - _TENSOR_QUEUE)
        else:
            slack = 1.0 if pipe in {_INTEGER, _FLOAT} else 0.0
            time = max(time, free[pipe][port] - slack)
        if time > now and queue and queue[0][0] < time:
            heapq.heappush(queue, (time, at))
            continue
        ports[port] = warp.next = time + 1
        done = time
        if pipe == _MEMORY:
            memory = done = max(memory, time) + step.busy
        else:
            held = free[pipe]
            held[port] = max(held[port], time) + step.busy
        if kind == _COPY:
            warp.open = max(warp.open, done + step.latency)
        elif kind == _CLOSE_COPIES:
            warp.copies.append(warp.open)
            warp.open = 0.0
        elif kind == _AWAIT_COPIES:
            warp.copies = warp.copies[-step.count :] if step.count else []
        elif kind == _WGMMA:
            if step.count:
                warp.wgmmas = [*warp.wgmmas[-15:], free[_TENSOR][port] + step.latency]
        else:
            for register in step.writes:
                ready[register] = done + step.latency
        warp.at += 1
        end = max(end, time)
        if kind == _MEETS:
            met = waiting[warp.program]
            met.append((time, at))
            if len(met) == warps:
                start = max(t for t, _ in met) + step.latency
                for _, other in met:
                    flock[other].next = start
                    if flock[other].at < length:
                        heapq.heappush(queue, (start, other))
                met.clear()
        elif warp.at < length:
            heapq.heappush(queue, (warp.next, at))
    return end


def _write_out(
    loop: sass.Loop, trips: Mapping[str, int], decoded: Callable[[sass.Instruction, str], _Decoded]
) -> Iterator[_Decoded]:
    for part in loop.body:
        if isinstance(part, sass.Loop):
            for _ in range(part.turns(trips[part.name])):
                yield from _write_out(part, trips, decoded)
        else:
            yield decoded(part, loop.name)


@functools.cache
def _stored(digest: str) -> dict[str, Any]:
    path = CACHE / "runs" / f"{digest}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _simulated(
    kernel: Kernel,
    programs: int,
    machine: Machine,
    dram: Mapping[str, frozenset[str]],
    trips: Mapping[str, int],
) -> Run:
    """Simulate with few iterations, or look up; kept in ``build/clock``."""
    made_by = source_digest(Path(__file__), Path(sass.__file__))
    misses = sorted((n, sorted(d)) for n, d in dram.items())
    asked = (made_by, programs, repr(machine), misses, sorted(trips.items()))
    key = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    stored = _stored(kernel.digest)
    if key not in stored:
        known: dict[tuple[int, str], _Decoded] = {}

        def decoded(instruction: sass.Instruction, loop: str) -> _Decoded:
            place = (id(instruction), loop)
            if place not in known:
                known[place] = decode(instruction, machine, dram.get(loop, frozenset()))
            return known[place]

        code = list(_write_out(kernel.root, trips, decoded))
        warps = programs * kernel.num_warps
        busy = dict.fromkeys((*PIPES, "issue"), 0.0)
        busy["issue"] = len(code) * warps / 4
        for step in code:
            name = PIPES[step.pipe]
            busy[name] += step.busy * (warps if name == "memory" else warps / 4)
        clocks = simulate(code, programs, kernel.num_warps)
        stored[key] = {"clocks": clocks, "busy": busy}
        write_whole(CACHE / "runs" / f"{kernel.digest}.json", json.dumps(stored))
    return Run(**stored[key])


def run(
    kernel: Kernel,
    programs: int,
    machine: Machine,
    dram: Mapping[str, frozenset[str]],
    trips: Mapping[str, float],
) -> Run:
    """What programs that run side by side on an SM take together.

    Args:
        kernel: compiled.
        programs: side by side.
        machine: to simulate.
        dram: loop -> pointer arguments whose loads miss L2 there.
        trips: loop -> iterations each time it is reached; 0 for one that they don't reach.

    Raises:
        ValueError: for a loop of the kernel that trips doesn't name.
    """
    loops = [loop for loop in kernel.root.walk() if loop.name and not loop.rest_of]
    for loop in loops:
        if loop.name not in trips:
            raise ValueError(f"{kernel.name} has a loop over {loop.name!r}: say how often it runs")
    # As many iterations as a pipeline of copies is deep pass before its pace is steady.
    step = {loop.name: loop.unrolled * (1 if loop.inner else 4) for loop in loops}
    base = {name: min(math.ceil(trips[name]), 2 if n == 1 else n) for name, n in step.items()}
    first = _simulated(kernel, programs, machine, dram, base)
    wanted, counted = (_iterations(kernel.root, t) for t in (trips, base))
    slopes: dict[str, Run] = {}
    total = first
    for loop in reversed(loops):  # inner loops come before those around them
        name = loop.name
        if name in slopes or abs(wanted[name] - counted[name]) < 1e-9:
            continue
        more = {**base, name: base[name] + step[name]}
        reached = _iterations(kernel.root, more)
        if reached[name] == counted[name]:
            continue
        longer = _simulated(kernel, programs, machine, dram, more)
        for other, pace in slopes.items():
            longer = longer.plus(pace, counted[other] - reached[other])
        added = reached[name] - counted[name]
        slopes[name] = longer.plus(first, -1.0).times(1 / added)
        total = total.plus(slopes[name], wanted[name] - counted[name])
    return total


def _iterations(root: sass.Loop, trips: Mapping[str, float]) -> dict[str, float]:
    """Iterations of each loop in one program."""
    found: dict[str, float] = {}

    def visit(loop: sass.Loop, times: float) -> None:
        for inner in loop.inner:
            if not inner.rest_of:
                found[inner.name] = times * trips[inner.name]
                visit(inner, found[inner.name])

    visit(root, 1.0)
    return found
