"""Machine code of one kernel: its instructions in the tree of its loops, each loop by its variable.

`annotate` shortens what ``nvdisasm -gi`` prints to a listing that needs no sources; `read_kernel`
makes the tree. A backward branch whose source line is a ``for`` closes a loop of that variable.
Both branches of a condition count, with one exception: a 64-bit division that is guarded by a
short path for numbers of 32 bits takes the short path.
"""

import itertools
import linecache
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

# Where the first argument of a kernel lies in constant bank 0 of sm_90.
_FIRST_ARGUMENT = 0x210
_SIZES = {"i1": 1, "i8": 1, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}

_PLACE = re.compile(r'^\s*//## File "(.*?)", line (\d+)')
_NOTE = re.compile(r"^//# (\S+) (\d+) ?(\w*)")
_LABEL = re.compile(r"^(\.L_x_\d+|\$__internal\S*?):")
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+((?:@(!?U?P\w+)\s+)?(.*?))\s*;")
_FOR = re.compile(r"^for (\w+) in ")
_TARGET = re.compile(r"`\((\.L_x_\d+|\$__internal\S*?)\)")
_REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)(\.64)?\b")
_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
# What writes no register.
_NO_RESULT = {
    *("STG", "STS", "STSM", "STL", "BAR", "BRA", "EXIT", "LDGSTS", "LDGDEPBAR", "DEPBAR"),
    *("WARPGROUP", "WARPSYNC", "NANOSLEEP", "BSYNC", "BSSY", "RET", "CALL", "ERRBAR", "MEMBAR"),
    *("FENCE", "NOP", "BREAK", "CCTL", "UTMALDG", "ARRIVES", "SYNCS", "RED"),
}
_WIDE_LOADS = {"LDG", "LDS", "LDSM", "LDC", "ULDC", "LDL", "LD", "CS2R"}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        predicate: the register that guards it, or "".
        opcode: with its modifiers.
        operands: as text.
        place: source file and line.
        reads_from: names of the pointer arguments that a load from global memory follows.
    """

    predicate: str
    opcode: str
    operands: tuple[str, ...]
    place: tuple[str, int] = ("", 0)
    reads_from: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def words(self) -> int:
        """Registers of 32 bits that a load or store moves for each lane."""
        if ".128" in self.opcode:
            return 4
        if ".64" in self.opcode:
            return 2
        matrices = re.search(r"M88\.(\d)", self.opcode)
        return int(matrices[1]) if matrices else 1


@dataclass
class Loop:
    """A loop, or with the name "" the whole kernel.

    Attributes:
        name: its variable; a second loop over a variable of the same name is ``name#2``.
        body: one iteration in order, loops inside included.
        unrolled: iterations of the source that one of the machine code makes.
        rest_of: what a loop of the same name before it unrolled, of which this one does the rest; 0
            if it does all iterations.
    """

    name: str
    body: list["Instruction | Loop"] = field(default_factory=list)
    unrolled: int = 1
    rest_of: int = 0

    @property
    def inner(self) -> list["Loop"]:
        """The loops directly inside."""
        return [part for part in self.body if isinstance(part, Loop)]

    def walk(self) -> Iterator["Loop"]:
        """Yield this loop and all inside."""
        yield self
        for loop in self.inner:
            yield from loop.walk()

    def turns(self, trips: int) -> int:
        """Iterations of the machine code for so many of the source."""
        return (trips % self.rest_of if self.rest_of else trips) // self.unrolled


@dataclass(frozen=True)
class Kernel:
    """What the model needs of a compiled kernel.

    Attributes:
        digest: of source, specialisation and compiler.
        name: of the function.
        registers: of a thread.
        shared_bytes: of a program.
        num_warps: of a program.
        spills: loads and stores of spilled registers.
        root: its instructions in the tree of its loops.
    """

    digest: str
    name: str
    registers: int
    shared_bytes: int
    num_warps: int
    spills: int
    root: Loop


def annotate(disassembly: str) -> str:
    """Shorten ``nvdisasm -gi`` to instructions, labels and, for each place, file, line, variable.

    Args:
        disassembly: with absolute paths of sources that are there.

    Returns:
        The listing that `read_kernel` takes.
    """
    lines = []
    for line in disassembly.splitlines():
        if place := _PLACE.match(line):
            path, number = place[1], int(place[2])
            loop = _FOR.match(linecache.getline(path, number).strip())
            file = path.rpartition("/")[2]
            lines.append(f"//# {file} {number} {loop[1] if loop else ''}".rstrip())
        elif label := _LABEL.match(line):
            lines.append(label[0])
        elif code := _CODE.match(line):
            lines.append(f"/*{code[1]}*/ {code[2]};")
    return "\n".join(lines)


def parameter_offsets(signature: Mapping[str, str]) -> dict[int, str]:
    """Byte in constant bank 0 -> pointer argument that lies there.

    Args:
        signature: names and types of a kernel's arguments, as the compiler takes them.
    """
    found, offset = {}, _FIRST_ARGUMENT
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        size = _SIZES.get(kind, 8)
        offset = -(-offset // size) * size
        if kind.startswith("*"):
            found[offset] = name
        offset += size
    return found


def registers_of(text: str, width: int = 1) -> list[str]:
    """Registers that an operand names, ``width`` of each, two where it says ``.64``."""
    return [
        f"{kind}{int(number) + i}"
        for kind, number, pair in _REGISTER.findall(text)
        for i in range(max(width, 2 if pair else 1))
    ]


def registers(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Return the registers that an instruction writes and those that it reads."""
    name, opcode, operands = instruction.name, instruction.opcode, instruction.operands
    words = instruction.words
    reads = registers_of(instruction.predicate)
    if name in _NO_RESULT:
        data = name in {"STG", "STS", "STSM", "STL"}
        for operand in operands:
            reads += registers_of(operand, words if data and "[" not in operand else 1)
        return [], reads
    if not operands:
        return [], reads
    width = words if name in _WIDE_LOADS else 2 if "WIDE" in opcode else 1
    if name == "HMMA":
        width = 4
    elif name == "HGMMA":
        width = int(opcode.split("x")[1]) // 2
    writes = registers_of(operands[0], width)
    rest = 1
    while rest < len(operands) and re.fullmatch(r"U?P(\d|T)", operands[rest]):
        if name in {"SEL", "FSEL"}:
            break
        writes += registers_of(operands[rest])
        rest += 1
    if not registers_of(operands[0]) and rest < len(operands) and name in {"SHFL", "LOP3"}:
        writes += registers_of(operands[rest])
        rest += 1
    for at, operand in enumerate(operands[rest:]):
        width = 1
        if name == "HMMA" and at < 3:
            width = (4, 2, 4)[at]
        elif (name == "HGMMA" and at == 0) or ("WIDE" in opcode and at == 2):
            width = 4 if name == "HGMMA" else 2
        reads += registers_of(operand, width)
    return writes, reads


@dataclass
class _Line:
    text: str
    predicate: str
    opcode: str
    operands: tuple[str, ...]
    place: tuple[str, int]
    variable: str

    @property
    def target(self) -> str:
        found = _TARGET.search(self.text)
        return found[1] if found and self.opcode.startswith(("BRA", "CALL")) else ""

    @property
    def leaves(self) -> bool:
        """Whether nothing runs on from here to the next instruction."""
        return not self.predicate and self.opcode.startswith(("BRA", "EXIT", "RET"))


def _parse(listing: str) -> tuple[list[_Line], dict[str, int]]:
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    place, variable = ("", 0), ""
    for text in listing.splitlines():
        if note := _NOTE.match(text):
            place, variable = (note[1], int(note[2])), note[3]
        elif label := _LABEL.match(text):
            labels[label[1]] = len(lines)
        elif code := _CODE.match(text):
            opcode, _, rest = code[4].partition(" ")
            operands = tuple(o.strip() for o in re.split(r",(?![^\[]*\])", rest)) if rest else ()
            lines.append(_Line(code[4], code[3] or "", opcode, operands, place, variable))
    return lines, labels


def read_kernel(listing: str, pointers: Mapping[int, str]) -> Loop:
    """Make the tree of loops.

    Args:
        listing: from `annotate`.
        pointers: from `parameter_offsets`.

    Raises:
        ValueError: for a conditional backward branch that no ``for`` of the source explains.
    """
    lines, labels = _parse(listing)
    routines = {name: at for name, at in labels.items() if name.startswith("$")}
    end = min(routines.values(), default=len(lines))
    origins = _follow_pointers(lines, pointers)
    skipped = _slow_divisions(lines[:end], labels)
    intervals: dict[int, tuple[int, str]] = {}  # first line -> last line, variable
    for at, line in enumerate(lines[:end]):
        start = labels.get(line.target, end)
        if start > at or not line.opcode.startswith("BRA") or start == at:
            continue
        if line.variable:
            intervals[start] = max(intervals.get(start, (0, "")), (at, line.variable))
        elif line.predicate:
            raise ValueError(f"the loop at {line.place} has no variable: {line.text}")

    def instructions(first: int, stop: int) -> Iterator[Instruction]:
        for at in range(first, stop):
            line = lines[at]
            if at in skipped or line.opcode.startswith("NOP"):
                continue
            if line.opcode.startswith("CALL") and line.target in routines:
                begin = routines[line.target]
                later = [n for n in (*routines.values(), len(lines)) if n > begin]
                yield from instructions(begin, min(later))
                continue
            yield Instruction(
                line.predicate, line.opcode, line.operands, line.place, origins.get(at, frozenset())
            )

    root = Loop("")
    nest = [(end, root)]
    named: dict[str, list[tuple[str, int]]] = {}
    for at in range(end):
        while at > nest[-1][0]:
            nest.pop()
        if at in intervals:
            last, variable = intervals[at]
            places = named.setdefault(variable, [])
            if lines[last].place not in places:
                places.append(lines[last].place)
            number = places.index(lines[last].place) + 1
            loop = Loop(variable if number == 1 else f"{variable}#{number}")
            nest[-1][1].body.append(loop)
            # Loops that overlap without one lying in the other end together.
            nest.append((min(last, nest[-1][0]), loop))
        nest[-1][1].body.extend(instructions(at, at + 1))
    for loop in root.walk():
        _find_unrolled(loop.inner)
    return root


def _find_unrolled(loops: list[Loop]) -> None:
    """A loop and one that does what it leaves over: the compiler unrolled the first."""
    for loop, twin in itertools.combinations(loops, 2):
        if loop.name == twin.name:
            most, least = (
                sum(
                    i.name in {"LDG", "LDGSTS", "STG"} for i in x.body if isinstance(i, Instruction)
                )
                for x in (loop, twin)
            )
            loop.unrolled = twin.rest_of = max(1, round(most / max(1, least)))


def _slow_divisions(lines: list[_Line], labels: Mapping[str, int]) -> set[int]:
    """Lines of 64-bit divisions that a test for numbers of 32 bits leads around."""
    entries = set(labels.values())
    jumps: dict[int, list[int]] = {}
    for at, line in enumerate(lines):
        if line.opcode.startswith("BRA") and line.predicate and line.target in labels:
            jumps.setdefault(labels[line.target], []).append(at)
    skipped: set[int] = set()
    for at, line in enumerate(lines):
        if not (line.opcode.startswith("CALL") and line.target.startswith("$")):
            continue
        start = at
        while start > 0 and start not in entries and not _branches(lines[start - 1]):
            start -= 1
        # Who leads here: a jump whose other way is short, or the line before, whose jump is.
        other_ways = [source + 1 for source in jumps.get(start, [])]
        if start > 0 and lines[start - 1].predicate and lines[start - 1].target in labels:
            other_ways.append(labels[lines[start - 1].target])
        if any(_divides_shortly(lines, way) for way in other_ways):
            stop = at + 1
            while stop < len(lines) and stop not in entries and not _branches(lines[stop - 1]):
                stop += 1
            skipped.update(range(start, stop))
    return skipped


def _branches(line: _Line) -> bool:
    return line.opcode.startswith(("BRA", "EXIT", "RET"))


def _divides_shortly(lines: list[_Line], start: int) -> bool:
    for line in lines[start : start + 12]:
        if line.opcode.startswith("MUFU.RCP"):
            return True
        if line.leaves:
            break
    return False


def _follow_pointers(lines: list[_Line], pointers: Mapping[int, str]) -> dict[int, frozenset[str]]:
    """Line of a load from global memory -> the pointer arguments that its address comes from."""
    held: dict[str, frozenset[str]] = {}
    found: dict[int, frozenset[str]] = {}
    nothing: frozenset[str] = frozenset()
    for _ in range(2):  # the second time loops know what they hand on
        for at, line in enumerate(lines):
            instruction = Instruction(line.predicate, line.opcode, line.operands)
            name = instruction.name
            if name in {"LDG", "LDGSTS"}:
                address = re.sub(r"desc\[.*?\]", "", line.operands[1])
                used = registers_of(address)
                found[at] = nothing.union(*(held.get(r, nothing) for r in used))
            writes, reads = registers(instruction)
            if not writes:
                continue
            value = nothing
            if name not in {"LDG", "LDS", "LDSM", "SHFL", "HMMA", "HGMMA", "LDL"}:
                value = value.union(*(held.get(r, nothing) for r in reads))
                for constant in _CONSTANT.findall(line.text):
                    name_at = pointers.get(int(constant, 16) & ~7)
                    value |= {name_at} if name_at else nothing
            for register in writes:
                old = held.get(register, nothing) if line.predicate else nothing
                held[register] = value | old
    return found
