"""All threads of several blocks as one array axis, in lock-step under masks."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import memory, proxies
from ptx.memory import Memory
from ptx.numerics import Array
from ptx.parse import ENDS, Instruction, Kernel, NotEmulated, execution_order, parse
from ptx.translate import Mask, Source, Step, Translator

LANES = 32
# Threads that run together; NumPy's calls cost more than the work below it.
TOGETHER = 4096


class Threads:
    """The state of some blocks of a grid: ``count`` threads, ``threads`` of each.

    ``registers`` are an array (count,) each, unsigned or bool, garbage until assigned; ``special``
    are those such as ``%tid.x``. ``code`` is of an access that a thread would make now, see
    `memory`. ``committed`` counts groups of copies, ``committed_products`` of products.
    """

    def __init__(
        self, kernel: Kernel, shared_bytes: int, global_memory: Memory,
        grid: tuple[int, int, int], blocks: Array, arguments: Sequence[int], *,
        races: bool, backwards: bool,
    ) -> None:  # fmt: skip
        self.threads, self.arguments = kernel.threads, arguments
        self.races, self.backwards = races, backwards
        self.count = count = kernel.threads * len(blocks)
        place, tid = np.divmod(np.arange(count), kernel.threads)
        block = blocks[place].astype(np.int64)
        self.code = block << memory.BLOCK | tid
        x, y, _ = grid
        words = {
            "%tid.x": tid, "%ctaid.x": block % x, "%ctaid.y": block // x % y,
            "%ctaid.z": block // (x * y), "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": grid[2],
        }  # fmt: skip
        self.special = {k: np.full(count, v).astype(np.uint32) for k, v in words.items()}
        garbage = np.random.default_rng(int(blocks[0]))
        self.stride = -(-shared_bytes // 16) * 16 + 64
        self.base, self.shared_bytes = place * self.stride, shared_bytes
        self.memory = global_memory
        cell = kernel.smallest_access("shared")
        self.shared = Memory("shared", self.stride * len(blocks), 0, garbage, cell)
        bits = {n: garbage.integers(0, 1 << 8 * n, count, dtype=f"u{n}") for n in (2, 4)}
        bits[8] = garbage.integers(0, 1 << 63, count, dtype=np.uint64)
        bits[0] = garbage.integers(0, 2, count).astype(bool)
        self.registers: list[Array] = [bits[width] for _, width in kernel.registers.values()]
        self.live = np.ones(count, bool)
        self.committed, self.committed_products = np.zeros((2, count), np.int64)
        self.copies: list[proxies.Copy] = []
        self.products: list[proxies.InFlight] = []
        self.instruction: Instruction | None = None
        self.findings: dict[tuple[str, int], str] = {}

    def find(self, what: str, lanes: Array) -> None:
        """Report a fault of the instruction that runs, once."""
        i = self.instruction
        if i is not None and lanes.size and (what, i.line) not in self.findings:
            block, thread = divmod(int(self.code[lanes.min()]), 1 << memory.BLOCK)
            who = f"block {block} thread {thread % (1 << memory.INTERVAL)}"
            where = f"{i.source} (PTX line {i.line})"
            self.findings[what, i.line] = f"{what}, at {where}, {lanes.size} lanes, first {who}"

    def lanes(self, mask: Mask) -> Array:
        """The numbers of the threads that execute; what stores last wins a place."""
        found = np.arange(self.count) if mask is None else np.flatnonzero(mask)
        return found[::-1] if self.backwards else found

    def require_whole(self, mask: Mask, size: int) -> None:
        """Report warps, or groups of them, of which only a part executes what all must."""
        if mask is None:
            return
        parts = mask.reshape(-1, size)
        broken = parts.any(1) & ~parts.all(1)
        self.find("executed by a part of a warp or warp group", np.flatnonzero(broken) * size)

    def locate(
        self, space: Memory, offset: Array, size: int, lanes: Array, what: str
    ) -> tuple[Array, Array]:
        """Where accesses of lanes lie, in units of their size, and which pass the checks."""
        shift = size.bit_length() - 1
        if space is self.shared:
            valid = (offset >= 0) & (offset + size <= self.shared_bytes)
            offset = offset + self.base[lanes]
        else:
            offset = offset - space.base
            valid = (offset >= 0) & (offset + size <= space.size)
            if valid.all():
                valid = space.allocated[offset] & space.allocated[offset + size - 1]
        aligned = offset & size - 1 == 0
        if valid.all() and aligned.all():
            return offset >> shift, lanes
        text = f"{what} of {size} bytes at an address that {size} doesn't divide"
        self.find(f"{text}, {space.name} memory", lanes[~aligned])
        self.find(f"{what} outside the allocations of {space.name} memory", lanes[~valid])
        return offset[valid & aligned] >> shift, lanes[valid & aligned]

    def load(self, space: Memory, address: Array, width: int, count: int, mask: Mask) -> Array:
        """Values (count, threads) of ``width`` bytes; 0 where the mask or a check forbids."""
        lanes = self.lanes(mask)
        index, lanes = self.locate(space, address[lanes], width * count, lanes, "load")
        out = np.zeros((self.count, count), f"u{width}")
        data = space.read(self, index, width * count, self.code[lanes], lanes)
        out[lanes] = np.ascontiguousarray(data).view(out.dtype)
        return np.ascontiguousarray(out.T)

    def store(self, space: Memory, address: Array, values: Sequence[Array], mask: Mask) -> None:
        """Store vectors of values."""
        size = values[0].dtype.itemsize * len(values)
        lanes = self.lanes(mask)
        index, lanes = self.locate(space, address[lanes], size, lanes, "store")
        rows = np.stack([value[lanes] for value in values], -1)
        space.write(self, index, rows.view(np.uint8), self.code[lanes], lanes)


@dataclass
class Code:
    """A block's steps and its end: ``fall``, ``return``, ``barrier``, or the block jumped to."""

    steps: list[tuple[Instruction, Step]]
    end: str | int = "fall"
    holds: Source | None = None
    last: Instruction | None = None


class Program:
    """A kernel that can be launched."""

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.kernel = parse(ptx)
        self.shared_bytes = shared_bytes
        self.order = execution_order(self.kernel.successors())
        self.rank = np.argsort(self.order)
        self.labels = self.kernel.labels()
        self.translator = Translator(self.kernel)
        self.code = functools.cache(self._code)  # most blocks are never reached
        grouped = any(i.opcode[0] == "wgmma" for b in self.kernel.blocks for i in b.instructions)
        self.unit = proxies.GROUP if grouped else LANES

    def _code(self, number: int) -> Code:
        instructions = self.kernel.blocks[number].instructions
        last = instructions[-1] if instructions else None
        name = last.opcode[0] if last else ""
        if last is None or (name not in ENDS and last.opcode[:2] != ("bar", "sync")):
            return Code([(i, self.translator.step(i)) for i in instructions])
        code = Code([(i, self.translator.step(i)) for i in instructions[:-1]], "return", last=last)
        if name == "bra":
            code.end = self.labels[last.operands[0]]
        elif name == "bar":
            code.end = "barrier"
            if last.operands != ("0",) or last.guard:
                raise NotEmulated(f"a barrier of a part of the block: {last.operands}")
        if last.guard:
            code.holds = self.translator.predicate(last.guard, negated=last.negated)
        return code

    def launch(
        self, grid: Sequence[int], arguments: Sequence[int], global_memory: Memory, *,
        races: bool = True, order: int | None = None,
    ) -> list[str]:  # fmt: skip
        """Run all blocks of a grid; returns findings.

        With None as ``order`` warps run in lock-step and blocks by their numbers; a number seeds
        another order of blocks, and of warps, each of which then runs alone until its barrier.
        """
        x, y, z = (*grid, 1, 1)[:3]
        blocks = np.arange(x * y * z)
        chance = None if order is None else np.random.default_rng(order)
        if chance is not None:
            blocks = chance.permutation(blocks)
        global_memory.forget(self.kernel.smallest_access("global"))
        findings: dict[tuple[str, int], str] = {}
        per = max(1, TOGETHER // self.kernel.threads)
        for start in range(0, len(blocks), per):
            t = Threads(
                self.kernel, self.shared_bytes, global_memory, (x, y, z),
                blocks[start : start + per], arguments, races=races, backwards=order is not None,
            )  # fmt: skip
            with np.errstate(all="ignore"):
                self._run(t, chance)
            findings = {**t.findings, **findings}
        return list(findings.values())

    def _run(self, t: Threads, chance: np.random.Generator | None) -> None:
        """Until all threads have returned."""
        where = np.zeros(t.count, np.int64)  # the block that a thread is at
        waiting = np.zeros(t.count, bool)
        warp = np.arange(t.count) % t.threads // self.unit
        turn: Any = None
        together = chance is None
        while t.live.any():
            if together:
                number, mask = int(where[0]), None
            else:
                ready = t.live & ~waiting
                if not ready.any():
                    raise NotEmulated("threads of a block wait for each other forever")
                if chance is not None:
                    if turn is None or not (ready & (warp == turn)).any():
                        turn = chance.choice(np.unique(warp[ready]))
                    ready &= warp == turn
                number = self.order[int(self.rank[where[ready]].min())]
                mask = ready & (where == number)
            code = self.code(number)
            for instruction, step in code.steps:
                t.instruction = instruction
                if t.products:
                    proxies.check_registers(t, instruction, mask)
                step(t, mask)
            t.instruction = code.last
            self._leave(t, code, number, mask, where, waiting)
            together = chance is None and bool((t.live & ~waiting & (where == where[0])).all())

    def _leave(
        self, t: Threads, code: Code, number: int, mask: Mask, where: Array, waiting: Array
    ) -> None:
        """Go to the next block: all threads of the mask."""
        if mask is None:
            mask = np.ones(t.count, bool)
        taken = mask if code.holds is None else mask & code.holds(t)
        where[mask] = number + 1
        if isinstance(code.end, int):
            where[taken] = code.end
        elif code.end == "return":
            t.live &= ~taken
        elif code.end == "barrier":
            t.require_whole(mask, LANES)
            waiting |= mask
            if waiting.all():
                t.code += 1 << memory.INTERVAL
                waiting[:] = False
            else:
                self._open_barriers(t, where, waiting)

    def _open_barriers(self, t: Threads, where: Array, waiting: Array) -> None:
        arrived, live = waiting.reshape(-1, t.threads), t.live.reshape(-1, t.threads)
        for place in np.flatnonzero((arrived | ~live).all(1) & arrived.any(1)):
            part = slice(place * t.threads, (place + 1) * t.threads)
            if np.ptp(where[part][t.live[part]]):
                t.find("threads of a block wait at different barriers", t.lanes(None)[:1])
            if not t.live[part].all():
                t.find("bar.sync after some threads have returned", np.flatnonzero(~t.live[part]))
            waiting[part] = False
            t.code[part] += 1 << memory.INTERVAL
