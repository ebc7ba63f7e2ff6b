"""PTX text as data: instructions, basic blocks, and an order of them for threads that part."""

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# What a register of each type is kept in: bytes, 0 for a predicate.
WIDTH = {"pred": 0, "b8": 1, "u8": 1, "s8": 1, "f16x2": 4, "bf16x2": 4, "bf16": 2, "tf32": 4}
WIDTH |= {f"{kind}{8 * n}": n for kind in "bus" for n in (2, 4, 8)}
WIDTH |= {f"f{8 * n}": n for n in (2, 4, 8)}
ENDS = {"bra", "ret", "exit"}


class NotEmulated(Exception):
    """PTX that this emulator doesn't know: no verdict on the kernel."""


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    opcode: tuple[str, ...]  # its parts between dots
    operands: tuple[str, ...]  # as they are written; {a, b} and [a+4] are one operand
    guard: str | None  # the register of its predicate
    negated: bool  # whether the guard is @!
    line: int  # of the PTX text, from 1
    source: str  # file:line:column of the kernel, and of what it was inlined into
    touches: frozenset[str]  # all registers that it names
    writes: frozenset[str]  # those among them that it assigns


@dataclass
class Block:
    """A basic block: entered at its top, left at its end."""

    label: str | None
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Kernel:
    """One ``.entry``."""

    parameters: list[str]  # their names, in order
    blocks: list[Block]
    registers: dict[str, tuple[int, int]]  # name -> (index, bytes); 0 bytes for predicates
    threads: int  # of a block

    def successors(self) -> NDArray[np.bool_]:
        """Edges: whether a block may follow a block."""
        count = len(self.blocks)
        labels = self.labels()
        edges = np.zeros((count, count), bool)
        for number, block in enumerate(self.blocks):
            last = block.instructions[-1] if block.instructions else None
            if last and last.opcode[0] == "bra":
                edges[number, labels[last.operands[0]]] = True
            if number + 1 < count and (not last or last.opcode[0] not in ENDS or last.guard):
                edges[number, number + 1] = True
        return edges

    def labels(self) -> dict[str, int]:
        """The number of each block that has a label."""
        return {block.label: n for n, block in enumerate(self.blocks) if block.label}

    def smallest_access(self, space: str) -> int:
        """Bytes of the smallest load or store of a state space; no other is divided by them."""
        sizes = [16]
        for i in (i for block in self.blocks for i in block.instructions):
            if i.opcode[0] in {"ld", "st"} and space in i.opcode:
                sizes.append(WIDTH[i.opcode[-1]] * (1 + i.operands[i.opcode[0] == "st"].count(",")))
            elif i.opcode[:2] == ("cp", "async") and len(i.operands) > 1:
                sizes.append(4)
        return min(sizes)


def parse(ptx: str) -> Kernel:
    """Read the one kernel of a module."""
    head = re.search(r"\.entry\s+(\w+)\(([^)]*)\)(.*?)^\{", ptx, re.DOTALL | re.MULTILINE)
    end = ptx.find("$L__func_end")
    if not head or end < 0:
        raise NotEmulated("a module without a kernel")
    parameters = [line.split()[-1] for line in head[2].split(",") if line.strip()]
    if "[" in head[2]:
        raise NotEmulated("a parameter that is an array (a tensor map)")
    threads = int(re.findall(r"\.(?:req|max)ntid\s+(\d+)", head[3])[0])
    registers: dict[str, tuple[int, int]] = {}
    body: list[str | Instruction] = []
    source = ""
    first = ptx.count("\n", 0, head.end()) + 1
    for number, line in enumerate(ptx[head.end() : end].split("\n"), first):
        text, _, comment = line.partition("//")
        if text.lstrip().startswith(".loc"):
            source = comment.strip() or source
            continue
        for part in text.split(";"):
            # Braces before an opcode are scopes of inline assembly.
            statement = part.strip(" \t").lstrip("{} \t")
            while label := re.match(r"([$\w]+):\s*", statement):
                if not label[1].startswith("$L__tmp"):  # they mark lines
                    body.append(label[1])
                statement = statement[label.end() :]
            if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
                _declare(registers, WIDTH[declared[1]], declared[2])
            elif statement and not statement.startswith("."):
                body.append(_instruction(statement, number, source))
    return Kernel(parameters, _blocks(body), registers, threads)


def _declare(registers: dict[str, tuple[int, int]], width: int, names: str) -> None:
    for name in names.split(","):
        many = re.fullmatch(r"(%?\w+)<(\d+)>", name.strip())
        for one in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name.strip()]:
            registers.setdefault(one, (len(registers), max(width, 2) if width else 0))


def _instruction(text: str, line: int, source: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if not match:
        raise NotEmulated(f"line {line}: {text}")
    opcode = tuple(part for part in re.split(r"\.|::", match[3]) if part)
    commas = r",(?![^{\[]*[}\]])"  # outside brackets
    operands = tuple(part.strip() for part in re.split(commas, match[4]) if part.strip())
    touches = frozenset(re.findall(r"%\w+", text))
    stores = opcode[0] in {"st", "stmatrix", "cp", "bar", "bra"} or not operands
    writes = frozenset() if stores else frozenset(re.findall(r"%\w+", operands[0]))
    return Instruction(opcode, operands, match[2], bool(match[1]), line, source, touches, writes)


def _blocks(body: list[str | Instruction]) -> list[Block]:
    """Cut the text at labels, at jumps, and behind barriers of the block."""
    blocks = [Block(None)]
    for item in body:
        if isinstance(item, str):
            if blocks[-1].label or blocks[-1].instructions:
                blocks.append(Block(None))
            blocks[-1].label = item
            continue
        blocks[-1].instructions.append(item)
        if item.opcode[0] in ENDS or item.opcode[:2] == ("bar", "sync"):
            blocks.append(Block(None))
    return blocks


def execution_order(edges: NDArray[np.bool_]) -> list[int]:
    """Blocks so that a join comes after all that leads to it, and a loop stays in one piece.

    Threads that parted run the first of their blocks in this order, and so meet again as early as
    they can: in the order of the text they may meet behind the next barrier only.
    """
    count = len(edges)
    reach = np.eye(count, dtype=bool) | edges
    while (wider := (reach.astype(np.float32) @ reach) > 0).sum() > reach.sum():
        reach = wider
    loops = reach & reach.T
    ancestors = reach.sum(0)
    order: list[int] = []
    for first in sorted(set(loops.argmax(1).tolist()), key=lambda n: (ancestors[n], n)):
        inside = loops[first]
        members = np.flatnonzero(inside)
        if len(members) == 1:
            order.append(first)
            continue
        heads = inside & edges[~inside].any(0)
        if not heads.any():
            heads[first] = True
        inner = edges & ~heads[None, :]
        order += members[execution_order(inner[np.ix_(members, members)])].tolist()
    return order
