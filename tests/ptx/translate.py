"""Each instruction as a function on all threads at once, under a mask of those that execute it."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import numerics, proxies, warps
from ptx.numerics import DTYPES, FUNCTIONS, UNSIGNED, Array, Function
from ptx.parse import WIDTH, Instruction, Kernel, NotEmulated

if TYPE_CHECKING:
    from ptx.machine import Threads

Mask = Array | None  # None: all threads
Step = Callable[["Threads", Mask], None]
Source = Callable[["Threads"], Any]
Destination = Callable[["Threads", Array, Mask], None]
# Dynamic shared memory begins at the address 0 of the state space.
SYMBOLS = {"global_smem": "0"}
# Modifiers that change nothing here, or that a function below looks for.
KNOWN = {"rn", "rna", "approx", "full", "ftz", "lo", "hi", "wide", "NaN"}
KNOWN |= numerics.ROUND.keys() | numerics.COMPARE.keys() | {"nan", "num"}
KNOWN |= {f"{name}u" for name in numerics.COMPARE}
# Hints and orders of memory that say nothing to one who looks at barriers alone.
IGNORED = {"membar", "fence", "nanosleep", "griddepcontrol", "prefetch", "discard"}


class Translator:
    """Makes steps of a kernel's instructions."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def step(self, instruction: Instruction) -> Step:
        """The function of an instruction."""
        handler = getattr(self, f"_{instruction.opcode[0]}", self._compute)
        try:
            run: Step = handler(instruction)
        except NotEmulated as error:
            name = ".".join(instruction.opcode)
            raise NotEmulated(f"{name}, line {instruction.line}: {error}") from None
        if instruction.guard is None:
            return run
        holds = self.predicate(instruction.guard, negated=instruction.negated)

        def guarded(t: "Threads", mask: Mask) -> None:
            chosen = holds(t) if mask is None else holds(t) & mask
            if chosen.all():
                run(t, None)
            elif chosen.any():
                run(t, chosen)

        return guarded

    # ---- operands
    def predicate(self, name: str, *, negated: bool) -> Source:
        """The lanes in which a predicate holds."""
        index = self.kernel.registers[name][0]
        return (lambda t: ~t.registers[index]) if negated else (lambda t: t.registers[index])

    def source(self, text: str, kind: str) -> Source:
        """An operand that is read, as numbers of a type; immediates are scalars."""
        if text in self.kernel.registers:
            index, width = self.kernel.registers[text]
            if width == 0 or kind in {f"b{8 * width}", f"u{8 * width}"}:
                return lambda t: t.registers[index]
            if WIDTH[kind] < width:
                narrow = UNSIGNED[WIDTH[kind]]
                return lambda t: numerics.decode(t.registers[index].astype(narrow), kind)
            if WIDTH[kind] > width:
                raise NotEmulated(f"{text} as {kind}")
            if "bf16" in kind or kind.endswith("x2"):
                return lambda t: numerics.decode(t.registers[index], kind)
            dtype = DTYPES[kind]
            return lambda t: t.registers[index].view(dtype)
        if text.startswith("%"):
            return lambda t: numerics.decode(t.special[text], kind)
        value = numerics.constant(SYMBOLS.get(text, text), kind)
        return lambda _: value

    def address(self, text: str) -> Source:
        """An address of memory, as 64 signed bits."""
        base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
        shift = int(offset or 0)
        if base in SYMBOLS:
            return lambda t: np.full(t.count, shift, np.int64)
        read = self.source(base, f"u{8 * self.kernel.registers[base][1]}")
        return lambda t: read(t).astype(np.int64) + shift

    def destination(self, text: str, kind: str) -> Destination:
        """An operand that is assigned in the lanes of a mask."""
        if text == "_":
            return lambda _t, _value, _mask: None
        index, width = self.kernel.registers[text]

        def assign(t: "Threads", value: Array, mask: Mask) -> None:
            bits = numerics.spread(numerics.encode(np.asarray(value), kind, width), t.count)
            t.registers[index] = bits if mask is None else np.where(mask, bits, t.registers[index])

        return assign

    def sources(self, text: str, kind: str) -> Function:
        """All operands of a vector: a function to a list of arrays."""
        reads = [self.source(part, kind) for part in _vector(text)]
        return lambda t: [numerics.spread(read(t), t.count) for read in reads]

    def destinations(self, text: str, kind: str) -> Callable[..., None]:
        """All registers of a vector."""
        writes = [self.destination(part, kind) for part in _vector(text)]

        def assign(t: "Threads", values: Sequence[Array], mask: Mask) -> None:
            for write, value in zip(writes, values, strict=True):
                write(t, value, mask)

        return assign

    # ---- arithmetic
    def _compute(self, i: Instruction) -> Step:
        name, kinds = i.opcode[0], [part for part in i.opcode[1:] if part in WIDTH]
        if name in IGNORED:
            return lambda _t, _mask: None
        unknown = set(i.opcode[1:]) - KNOWN - WIDTH.keys()
        if unknown or not kinds or (name not in FUNCTIONS and name not in {"setp", "cvt"}):
            raise NotEmulated("no such instruction here")
        kind = kinds[-1]
        to, types = kind, [kind] * (len(i.operands) - 1)
        function = FUNCTIONS.get(name, np.negative)
        if name == "setp":
            return self._compare(i, kind)
        if name == "cvt":
            to = kinds[-2]
            function = numerics.conversion(to, set(i.opcode))
        elif "wide" in i.opcode or "hi" in i.opcode:
            function, to = _product(name, kind, wide="wide" in i.opcode)
            types[2:] = [to] * (name == "mad")
        elif name in {"shl", "shr"}:
            types[1] = "u32"
        elif name == "bfe":
            types[-2:] = ["u32", "u32"]
        elif name == "selp":
            types[2] = "pred"
        elif name == "popc":
            to = "u32"
        elif "NaN" in i.opcode:
            function = np.minimum if name == "min" else np.maximum
        if "ftz" in i.opcode:
            exact = function
            function = lambda *x: numerics.ftz(exact(*map(numerics.ftz, x)))  # noqa: E731
        reads = [self.source(text, of) for text, of in zip(i.operands[1:], types, strict=True)]
        write = self.destination(i.operands[0], to)
        return lambda t, mask: write(t, function(*[read(t) for read in reads]), mask)

    def _compare(self, i: Instruction, kind: str) -> Step:
        function = numerics.comparison(i.opcode[1], kind)
        one, two = (self.source(text, kind) for text in i.operands[1:])
        write = self.destinations(i.operands[0].replace("|", ","), "pred")

        def compare(_t: "Threads", x: Array, y: Array, _mask: Mask) -> list[Array]:
            found = function(x, y)
            return list(found.T) if kind.endswith("x2") else [found]

        return _call(write, compare, one, two)

    def _mov(self, i: Instruction) -> Step:
        to, what = i.operands
        whole, bits = WIDTH[i.opcode[-1]], f"b{8 * WIDTH[i.opcode[-1]]}"
        if to.startswith("{"):
            count = len(_vector(to))
            write, read = self.destinations(to, f"b{8 * whole // count}"), self.source(what, bits)
            part = UNSIGNED[whole // count]
            return lambda t, mask: write(t, read(t).view(part).reshape(-1, count).T, mask)
        if what.startswith("{"):
            reads = self.sources(what, f"b{8 * whole // len(_vector(what))}")
            one, word = self.destination(to, bits), UNSIGNED[whole]
            return lambda t, mask: one(t, np.stack(reads(t), -1).view(word).reshape(-1), mask)
        return self._compute(i)

    # ---- memory
    def _ld(self, i: Instruction) -> Step:
        kind = i.opcode[-1].replace("f", "b")
        if "param" in i.opcode:
            number = self.kernel.parameters.index(i.operands[1].strip("[] "))
            write = self.destination(i.operands[0], kind)
            given = numerics.constant
            return lambda t, mask: write(t, given(str(t.arguments[number]), kind), mask)
        count, width, where = len(_vector(i.operands[0])), WIDTH[kind], self.address(i.operands[1])
        assign = self.destinations(i.operands[0], kind)
        space = "shared" if "shared" in i.opcode else "memory"

        def load(t: "Threads", mask: Mask) -> None:
            rows = t.load(getattr(t, space), where(t), width, count, mask)
            assign(t, numerics.decode(rows, kind), mask)

        return load

    def _st(self, i: Instruction) -> Step:
        width, where = WIDTH[i.opcode[-1]], self.address(i.operands[0])
        reads = self.sources(i.operands[1], f"b{8 * width}")
        space = "shared" if "shared" in i.opcode else "memory"
        return lambda t, mask: t.store(getattr(t, space), where(t), reads(t), mask)

    def _cp(self, i: Instruction) -> Step:
        if i.opcode[1:3] == ("async", "commit_group"):
            return lambda t, mask: proxies.commit(t, t.committed, mask)
        if i.opcode[1:3] == ("async", "wait_group"):
            keep = int(i.operands[0])
            return lambda t, mask: proxies.wait_for_copies(t, keep, mask)
        if i.opcode[1:3] not in {("async", "cg"), ("async", "ca")}:
            raise NotEmulated("no such copy here")
        to, of = self.address(i.operands[0]), self.address(i.operands[1])
        size = int(i.operands[2], 0)
        valid = self.source(i.operands[3] if len(i.operands) > 3 else str(size), "u32")
        return lambda t, mask: proxies.copy(t, to(t), of(t), size, valid(t), mask)

    # ---- what warps and groups of warps do together
    def _bar(self, i: Instruction) -> Step:
        if i.opcode[1] != "warp":
            raise NotEmulated("no such barrier here")
        return lambda t, mask: t.require_whole(mask, 32)

    def _shfl(self, i: Instruction) -> Step:
        reads = [self.source(text, "b32") for text in i.operands[1:4]]
        function = functools.partial(warps.shuffle, mode=i.opcode[2])
        return _call(self.destination(i.operands[0], "b32"), function, *reads)

    def _redux(self, i: Instruction) -> Step:
        function, kind = functools.partial(warps.reduce, what=i.opcode[2]), i.opcode[3]
        write, read = self.destination(i.operands[0], kind), self.source(i.operands[1], kind)
        return _call(write, function, read)

    def _ldmatrix(self, i: Instruction) -> Step:
        count, trans = len(_vector(i.operands[0])), "trans" in i.opcode
        function = functools.partial(warps.load_matrices, count=count, trans=trans)
        return _call(self.destinations(i.operands[0], "b32"), function, self.address(i.operands[1]))

    def _stmatrix(self, i: Instruction) -> Step:
        where, reads = self.address(i.operands[0]), self.sources(i.operands[1], "b32")
        trans = "trans" in i.opcode
        return lambda t, mask: warps.store_matrices(t, where(t), reads(t), mask, trans=trans)

    def _mma(self, i: Instruction) -> Step:
        shape, types = i.opcode[3], i.opcode[6:]
        kind = "b64" if types[0] == "f64" else "b32"
        function = functools.partial(warps.multiply, shape=shape, types=types)
        reads = [self.sources(text, kind) for text in i.operands[1:]]
        return _call(self.destinations(i.operands[0], kind), function, *reads)

    def _fence(self, i: Instruction) -> Step:
        return proxies.fence if i.opcode[1:3] == ("proxy", "async") else self._compute(i)

    def _wgmma(self, i: Instruction) -> Step:
        what = i.opcode[1]
        if what == "fence":
            return lambda t, mask: t.require_whole(mask, proxies.GROUP)
        if what == "commit_group":
            return lambda t, mask: proxies.commit(t, t.committed_products, mask)
        if what == "wait_group":
            most = int(i.operands[0])
            return lambda t, mask: proxies.wait_for_products(t, most, mask)
        function = functools.partial(proxies.multiply, product=proxies.Product.of(i))
        old, inside = self.sources(i.operands[0], "b32"), i.operands[1].startswith("{")
        a = self.sources(i.operands[1], "b32") if inside else self.source(i.operands[1], "b64")
        b, keep = self.source(i.operands[2], "b64"), self.sources(i.operands[3], "pred")
        return _call(self.destinations(i.operands[0], "b32"), function, old, a, b, keep)


def _call(write: Callable[..., None], function: Function, *reads: Source) -> Step:
    """Write what a function of all threads makes of the operands."""

    def run(t: "Threads", mask: Mask) -> None:
        write(t, function(t, *[read(t) for read in reads], mask), mask)

    return run


def _vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


def _product(name: str, kind: str, *, wide: bool) -> tuple[Function, str]:
    """A product of more bits than its factors, or the upper half of it, and its type."""
    if not wide:
        if name == "mul":
            return numerics.mulhi, kind
        return (lambda x, y, z: numerics.mulhi(x, y) + z), kind
    to = f"{kind[0]}{16 * WIDTH[kind]}"
    dtype = DTYPES[to]
    if name == "mul":
        return (lambda x, y: x.astype(dtype) * y.astype(dtype)), to
    return (lambda x, y, z: x.astype(dtype) * y.astype(dtype) + z), to
