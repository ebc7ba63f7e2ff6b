"""Each instruction as a function on all threads at once, under a mask of those that execute it."""

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
        elif name in {"bfe", "bfi"}:
            types[-2:] = ["u32", "u32"]
        elif name == "selp":
            types[2] = "pred"
        elif name in {"popc", "clz"}:
            to = "u32"
        elif "NaN" in i.opcode:
            function = np.minimum if name == "min" else np.maximum
        if "ftz" in i.opcode:
            exact = function
            function = lambda *x: numerics.ftz(exact(*map(numerics.ftz, x)))  # noqa: E731
        reads = [self.source(text, of) for text, of in zip(i.operands[1:], types, strict=True)]
        write = self.destination(i.operands[0], to)
        if len(reads) == 2:  # most are
            one, two = reads
            return lambda t, mask: write(t, function(one(t), two(t)), mask)
        return lambda t, mask: write(t, function(*[read(t) for read in reads]), mask)

    def _compare(self, i: Instruction, kind: str) -> Step:
        function = numerics.comparison(i.opcode[1], kind)
        one, two = (self.source(text, kind) for text in i.operands[1:])
        names = [name.strip() for name in i.operands[0].split("|")]
        if len(names) == 1:
            write = self.destination(names[0], "pred")
            return lambda t, mask: write(t, function(one(t), two(t)), mask)
        if not kind.endswith("x2"):
            raise NotEmulated("a predicate and its opposite")
        low, high = (self.destination(name, "pred") for name in names)

        def both(t: "Threads", mask: Mask) -> None:
            found = function(one(t), two(t))
            low(t, found[:, 0], mask)
            high(t, found[:, 1], mask)

        return both

    def _mov(self, i: Instruction) -> Step:
        to, what = i.operands
        whole = WIDTH[i.opcode[-1]]
        if to.startswith("{"):
            count = len(_vector(to))
            write = self.destinations(to, f"b{8 * whole // count}")
            read = self.source(what, f"b{8 * whole}")
            part = UNSIGNED[whole // count]
            return lambda t, mask: write(
                t, np.ascontiguousarray(read(t)).view(part).reshape(-1, count).T, mask
            )
        if what.startswith("{"):
            reads = self.sources(what, f"b{8 * whole // len(_vector(what))}")
            one = self.destination(to, f"b{8 * whole}")
            word = UNSIGNED[whole]
            return lambda t, mask: one(t, np.stack(reads(t), -1).view(word).reshape(-1), mask)
        return self._compute(i)

    # ---- memory
    def _ld(self, i: Instruction) -> Step:
        kind = i.opcode[-1].replace("f", "b")
        if "param" in i.opcode:
            number = self.kernel.parameters.index(i.operands[1].strip("[] "))
            write = self.destination(i.operands[0], kind)
            size = WIDTH[kind]

            def parameter(t: "Threads", mask: Mask) -> None:
                bits = np.array([t.arguments[number]], np.uint64).view(UNSIGNED[size])[:1]
                write(t, numerics.decode(bits, kind)[0], mask)

            return parameter
        count, width, where = len(_vector(i.operands[0])), WIDTH[kind], self.address(i.operands[1])
        assign = self.destinations(i.operands[0], kind)
        shared = "shared" in i.opcode

        def load(t: "Threads", mask: Mask) -> None:
            rows = t.load(t.space(shared), where(t), width, count, mask)
            assign(t, numerics.decode(rows, kind), mask)

        return load

    def _st(self, i: Instruction) -> Step:
        width, where = WIDTH[i.opcode[-1]], self.address(i.operands[0])
        reads = self.sources(i.operands[1], f"b{8 * width}")
        shared = "shared" in i.opcode
        return lambda t, mask: t.store(t.space(shared), where(t), reads(t), mask)

    def _cp(self, i: Instruction) -> Step:
        if i.opcode[1:3] == ("async", "commit_group"):
            return proxies.commit_copies
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
        value, lane = (self.source(text, "b32") for text in i.operands[1:3])
        control = self.source(i.operands[3], "b32")
        write = self.destination(i.operands[0], "b32")
        mode = i.opcode[2]
        return lambda t, mask: write(
            t, warps.shuffle(t, mode, value(t), lane(t), control(t), mask), mask
        )

    def _redux(self, i: Instruction) -> Step:
        value, write = (f(x, i.opcode[-1]) for f, x in
                        ((self.source, i.operands[1]), (self.destination, i.operands[0])))  # fmt: skip
        what = i.opcode[2]
        return lambda t, mask: write(t, warps.reduce(t, what, value(t), mask), mask)

    def _vote(self, i: Instruction) -> Step:
        value = self.source(i.operands[1], "pred")
        write = self.destination(i.operands[0], i.opcode[-1])
        what = i.opcode[2]
        return lambda t, mask: write(t, warps.vote(t, what, value(t), mask), mask)

    def _ldmatrix(self, i: Instruction) -> Step:
        count, where = len(_vector(i.operands[0])), self.address(i.operands[1])
        assign = self.destinations(i.operands[0], "b32")
        trans = "trans" in i.opcode
        return lambda t, mask: assign(
            t, warps.load_matrices(t, where(t), count, mask, trans=trans), mask
        )

    def _stmatrix(self, i: Instruction) -> Step:
        where, reads = self.address(i.operands[0]), self.sources(i.operands[1], "b32")
        trans = "trans" in i.opcode
        return lambda t, mask: warps.store_matrices(t, where(t), reads(t), mask, trans=trans)

    def _mma(self, i: Instruction) -> Step:
        shape, types = i.opcode[3], i.opcode[6:]
        kind = "b64" if types[0] == "f64" else "b32"
        a, b, c = (self.sources(text, kind) for text in i.operands[1:])
        assign = self.destinations(i.operands[0], kind)
        return lambda t, mask: assign(
            t, warps.multiply(t, shape, types, a(t), b(t), c(t), mask), mask
        )

    def _fence(self, i: Instruction) -> Step:
        if i.opcode[1:3] == ("proxy", "async"):
            return proxies.fence
        return self._compute(i)

    def _wgmma(self, i: Instruction) -> Step:
        what = i.opcode[1]
        if what == "fence":
            return lambda t, mask: t.require_whole(mask, proxies.GROUP)
        if what == "commit_group":
            return proxies.commit_products
        if what == "wait_group":
            keep = int(i.operands[0])
            return lambda t, mask: proxies.wait_for_products(t, keep, mask)
        flags = [int(text) for text in i.operands[4:]]
        call = proxies.Product.of(i, flags)
        old, assign = self.sources(i.operands[0], "b32"), self.destinations(i.operands[0], "b32")
        inside = i.operands[1].startswith("{")
        a = self.sources(i.operands[1], "b32") if inside else self.source(i.operands[1], "b64")
        b, scale = self.source(i.operands[2], "b64"), self.source(i.operands[3], "pred")


        def multiply(t: "Threads", mask: Mask) -> None:
            keep = numerics.spread(scale(t), t.count)
            assign(t, proxies.multiply(t, call, old(t), a(t), b(t), keep, mask), mask)

        return multiply

    def _trap(self, _i: Instruction) -> Step:
        return lambda t, mask: t.find("trap", t.lanes(mask))


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
