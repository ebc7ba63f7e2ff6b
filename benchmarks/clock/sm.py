"""One SM: warps that issue in order, four issue ports, pipes with widths, latencies, barriers.

`run` simulates programs side by side from their first instruction to their last, long loops cut
short; what is cut off is added at the pace of their last iterations. Left out: caches of
instructions and constants, bank conflicts, dual issue, the waits that the compiler writes into
control codes (dependences of registers are followed instead), and the latency of tensor
descriptors' copies.
"""

import functools
import hashlib
import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clock import sass
from benchmarks.clock.cache import CACHE, source_digest, write_whole
from benchmarks.clock.machine import Machine

Levels = Mapping[str, Mapping[str, str]]
PIPES = ("integer", "float", "special", "tensor", "memory", "uniform", "barrier")
_INTEGER, _FLOAT, _SPECIAL, _TENSOR, _MEMORY, _UNIFORM, _BARRIER = range(7)
# What an instruction does beyond holding its pipe.
_PLAIN, _COPY, _CLOSE_COPIES, _AWAIT_COPIES, _WGMMA, _AWAIT_WGMMA, _MEETS = range(7)
_KINDS = {
    "LDGSTS": _COPY,
    "LDGDEPBAR": _CLOSE_COPIES,
    "DEPBAR": _AWAIT_COPIES,
    "HGMMA": _WGMMA,
    "WARPGROUP": _AWAIT_WGMMA,
    "BAR": _MEETS,
}
# What of a machine a simulated run depends on.
_MATTERS = (
    *("l1_latency", "shared_latency", "l2_latency", "dram_latency", "barrier_latency"),
    *("shuffle_latency", "integer_busy", "special_busy", "mma_busy"),
)
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


def decode(instruction: sass.Instruction, machine: Machine, levels: Mapping[str, str]) -> _Decoded:
    """Say what an instruction reads, writes and holds.

    Args:
        instruction: to decode.
        machine: whose latencies count.
        levels: pointer argument -> "l1" or "dram", where its loads are served; else from L2.
    """
    writes, reads = (tuple(r) for r in sass.registers(instruction))
    name, opcode, words = instruction.name, instruction.opcode, instruction.words
    served = {levels.get(pointer, "l2") for pointer in instruction.reads_from or {""}}
    load = max(getattr(machine, f"{level}_latency") for level in served)
    shared, special = machine.shared_latency, machine.special_busy
    known = {
        **dict.fromkeys(("FFMA", "FADD", "FMUL"), (_FLOAT, 1.0, 4.0)),
        **dict.fromkeys(("HFMA2", "HADD2", "HMUL2"), (_FLOAT, 1.0, 5.0)),
        "IMAD": (_FLOAT, 1.5, 5.0),
        "MUFU": (_SPECIAL, special, 23.0),
        **dict.fromkeys(("I2F", "F2I", "F2F", "FRND"), (_SPECIAL, special, 14.0)),
        "I2FP": (_SPECIAL, 2.0, 14.0),
        **dict.fromkeys(("LDS", "LDSM"), (_MEMORY, 1.0 * words, shared)),
        **dict.fromkeys(("STS", "STSM"), (_MEMORY, 1.0 * words, 0.0)),
        "SHFL": (_MEMORY, 1.0, machine.shuffle_latency),
        # 64 bytes a clock between L2 and an SM: a copy moves 16 for each lane.
        "LDG": (_MEMORY, 2.0 * words, load),
        "STG": (_MEMORY, 2.0 * words, 0.0),
        "LDGSTS": (_MEMORY, 8.0, load),
        **dict.fromkeys(("LDL", "STL"), (_MEMORY, 1.0 * words, machine.l1_latency)),
        **dict.fromkeys(("S2R", "S2UR", "R2UR", "LDC", "ULDC"), (_UNIFORM, 1.0, 20.0)),
        "BAR": (_BARRIER, 1.0, machine.barrier_latency),
        "HMMA": (_TENSOR, machine.mma_busy / (2 if "1688" in opcode else 1), 33.0),
        **dict.fromkeys(("ISETP", "FSETP", "PLOP3"), (_INTEGER, machine.integer_busy, 9.0)),
        "VOTE": (_INTEGER, machine.integer_busy, 9.0),
    }
    other = (_UNIFORM, 1.0, 8.0) if name.startswith("U") else (_INTEGER, machine.integer_busy, 5.0)
    pipe, busy, latency = known.get(name, other)
    kind, count = _KINDS.get(name, _PLAIN), 0
    if name == "HGMMA":
        pipe, busy, latency = _TENSOR, _wgmma_busy(instruction), 30.0
        count = int("gsb0" in instruction.operands)
    elif name == "DEPBAR" or (name == "WARPGROUP" and "DEPBAR" in opcode):
        kind, count = _KINDS[name], _last_number(instruction)
    elif name == "WARPGROUP":
        kind = _PLAIN  # ARRIVE orders, and doesn't wait
    return _Decoded(writes, reads, pipe, busy, latency, kind, count)


def _wgmma_busy(instruction: sass.Instruction) -> float:
    """Clocks of the tensor cores, or of the operands' way from shared memory if that is longer."""
    columns, depth = (int(size) for size in instruction.opcode.split(".")[1].split("x")[1:])
    products = columns / 2 * (2 if "TF32" in instruction.opcode and depth == 8 else 1)
    # 32 bytes of b for each column, and of a 2,048, at 128 bytes a clock.
    in_shared = instruction.operands[1].startswith("gdesc")
    return max(products, columns / 4 + (16 if in_shared else 0))


def _last_number(instruction: sass.Instruction) -> int:
    return int(instruction.operands[-1], 16) if len(instruction.operands) > 1 else 0


class _Warp:
    __slots__ = ("at", "copies", "next", "open", "port", "program", "ready", "wgmmas")

    def __init__(self, program: int, port: int) -> None:
        self.program, self.port, self.next = program, port, 0.0
        self.at = 0
        self.ready: dict[str, float] = {}
        self.copies: list[float] = []  # when each closed group has arrived
        self.open = 0.0  # when the copies of the open group have arrived
        self.wgmmas: list[float] = []


def simulate(  # noqa: PLR0912, PLR0915  one loop, for speed
    code: list[_Decoded], programs: int, warps: int
) -> float:
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
    kernel: sass.Kernel,
    programs: int,
    machine: Machine,
    levels: Levels,
    trips: Mapping[str, int],
) -> Run:
    """Simulate with few iterations, or look up; kept in ``build/clock``."""
    made_by = source_digest(Path(__file__), Path(sass.__file__))
    served = sorted((n, sorted(d.items())) for n, d in levels.items())
    inside = [getattr(machine, name) for name in _MATTERS]
    asked = (made_by, programs, inside, served, sorted(trips.items()))
    key = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    stored = _stored(kernel.digest)
    if key not in stored:
        known: dict[tuple[int, str], _Decoded] = {}

        def decoded(instruction: sass.Instruction, loop: str) -> _Decoded:
            place = (id(instruction), loop)
            if place not in known:
                known[place] = decode(instruction, machine, levels.get(loop, {}))
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
    kernel: sass.Kernel,
    programs: int,
    machine: Machine,
    levels: Levels,
    trips: Mapping[str, float],
) -> Run:
    """What programs that run side by side on an SM take together.

    Args:
        kernel: compiled.
        programs: side by side.
        machine: to simulate.
        levels: loop -> pointer argument -> "l1" or "dram", where its loads there are served.
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
    first = _simulated(kernel, programs, machine, levels, base)
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
        longer = _simulated(kernel, programs, machine, levels, more)
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
