"""What runs on by itself: asynchronous copies, products of warp groups, and the fence between.

A copy owns its destination until its thread has waited for it, a product of a warp group its
registers and what it reads of shared memory; it reads by another proxy than threads write by, so a
fence has to stand between.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx import memory, numerics, warps
from ptx.numerics import Array, f4, f8, u1
from ptx.parse import Instruction, NotEmulated

if TYPE_CHECKING:
    from ptx.machine import Threads

GROUP = 128


# ---- copies from global to shared memory
@dataclass
class Copy:
    """A ``cp.async`` on its way: for each lane where to, what, and in which group."""

    lanes: Array
    index: Array
    data: Array
    group: Array


def copy(t: "Threads", to: Array, of: Array, size: int, valid: Array, mask: Array | None) -> None:
    """``cp.async``: all of it, or zeros where ``valid`` is 0."""
    lanes = t.lanes(mask)
    index, lanes = t.locate(t.shared, to[lanes], size, lanes, "asynchronous copy")
    count = numerics.spread(valid, t.count)[lanes]
    if not ((count == 0) | (count == size)).all():
        raise NotEmulated("a copy of a part")
    reading = np.zeros(t.count, bool)
    reading[lanes] = count == size
    words = t.load(t.memory, of, 4, size // 4, reading)
    data = np.ascontiguousarray(words.T[lanes]).view(u1)
    t.shared.check_write(t, index, size, t.code[lanes], lanes)
    t.shared.pending.reshape(-1, size)[index] += 1
    t.copies.append(Copy(lanes, index, data, t.committed[lanes]))


def commit(t: "Threads", counter: Array, mask: Array | None) -> None:
    """Close a group of copies or products."""
    counter[t.lanes(mask)] += 1


def wait_for_copies(t: "Threads", keep: int, mask: Array | None) -> None:
    """``cp.async.wait_group``: for each thread its own, but for the last ``keep`` groups."""
    waiting = t.live if mask is None else mask
    left = []
    for c in t.copies:
        done = waiting[c.lanes] & (c.group < t.committed[c.lanes] - keep)
        index, lanes, size = c.index[done], c.lanes[done], c.data.shape[1]
        t.shared.data.reshape(-1, size)[index] = c.data[done]
        t.shared.pending.reshape(-1, size)[index] -= 1
        t.shared.writer.reshape(-1, size // t.shared.cell)[index] = t.code[lanes][:, None]
        t.shared.unfenced.reshape(-1, size)[index] = True
        if not done.all():
            left.append(Copy(c.lanes[~done], c.index[~done], c.data[~done], c.group[~done]))
    t.copies = left


# ---- products of warp groups
def fence(t: "Threads", mask: Array | None) -> None:
    """``fence.proxy.async``: what these threads wrote, or saw by a barrier, may be read."""
    if not t.races:
        return
    active = (t.live if mask is None else mask).reshape(-1, t.threads)
    for place in np.flatnonzero(active.any(1)):
        part = slice(place * t.stride, (place + 1) * t.stride)
        hidden = np.flatnonzero(t.shared.unfenced[part])
        code = t.shared.writer[(part.start + hidden) // t.shared.cell]
        own = active[place][code & memory.SEVERAL_WARPS]
        now = t.code[place * t.threads + active[place].argmax()] >> memory.INTERVAL
        t.shared.unfenced[part][hidden[own | (code >> memory.INTERVAL < now)]] = False


@dataclass(frozen=True)
class Product:
    """A ``wgmma.mma_async`` as it is written."""

    columns: int
    depth: int
    kind: str
    transposed: tuple[bool, bool]
    results: frozenset[str]
    operands: frozenset[str]

    @classmethod
    def of(cls, i: Instruction) -> "Product":
        """Read it; factors aren't negated, and results have 32 bits."""
        shape, kinds = re.fullmatch(r"m64n(\d+)k(\d+)", i.opcode[4]), i.opcode[5:]
        inside, flags = i.operands[1].startswith("{"), [int(text) for text in i.operands[4:]]
        if kinds[0] != "f32" or kinds[1] != kinds[2] or flags[:2] != [1, 1] or not shape:
            raise NotEmulated(f"{kinds} {flags}")
        trans = [False] * inside + [bool(flag) for flag in flags[2:]] + [False, False]
        operands = frozenset(re.findall(r"%\w+", i.operands[1])) if inside else frozenset()
        return cls(int(shape[1]), int(shape[2]), kinds[1], (trans[0], trans[1]), i.writes, operands)


@dataclass
class InFlight:
    """A product that nobody has waited for."""

    product: Product
    lane: int  # the first of its warp group
    group: int  # of products
    reads: list[tuple[Array, Array]]


def multiply(
    t: "Threads", old: list[Array], a: list[Array] | Array, b: Array, keep: list[Array],
    mask: Array | None, *, product: Product,
) -> list[Array]:  # fmt: skip
    """D = A B + D, or A B where ``keep`` is False; A in registers or, as B, in shared memory."""
    t.require_whole(mask, GROUP)
    result = [np.array(x) for x in old]
    active = (t.live if mask is None else mask).reshape(-1, GROUP).any(1)
    for lane in (np.flatnonzero(active) * GROUP).tolist():
        part = slice(lane, lane + GROUP)
        flight = InFlight(product, lane, int(t.committed_products[lane]), [])
        t.products.append(flight)
        if isinstance(a, list):
            halves = warps.rows_of([x[part] for x in a], product.kind, 2)
            left = np.stack(halves, 1).reshape(64, -1)
        else:
            left = _matrix(t, flight, a[part], 64, trans=product.transposed[0])
        right = _matrix(t, flight, b[part], product.columns, trans=product.transposed[1])
        # Warp, half of its rows, row; eight columns, pair, element.
        total = (left @ right.T).reshape(4, 2, 8, -1, 4, 2)
        for i, register in enumerate(result):
            before = np.where(keep[0][part], register[part].view(f4), f4(0)).astype(f8)
            value = before + total[:, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
            register[part] = value.astype(f4).view(register.dtype)
    return result


def _matrix(t: "Threads", flight: InFlight, words: Array, rows: int, *, trans: bool) -> Array:
    """A factor (rows, depth) that a descriptor tells the place of in shared memory."""
    t.find("descriptors of a warp group differ", flight.lane + np.flatnonzero(words != words[0]))
    word, kind = int(words[0]), flight.product.kind
    start, lead, stride = ((word >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    if word >> 62 == 0 or word >> 49 & 7:
        raise NotEmulated("a descriptor without swizzle, or with a base offset")
    width, size = 256 >> (word >> 62), 4 if kind == "tf32" else 2
    # Sixteen bytes lie together: along the rows if it is transposed, else along the depth.
    along, across = (rows, flight.product.depth) if trans else (flight.product.depth, rows)
    far, near = np.arange(across)[:, None], np.arange(0, along * size, 16)[None, :]
    if trans:
        place = near // width * lead + near % width + far // 8 * stride + far % 8 * width
    else:
        place = far // 8 * stride + far % 8 * width + near
    address = (start + place).reshape(-1)
    address ^= (address >> 7 & (width // 16 - 1)) << 4
    lanes = np.full(address.size, flight.lane)
    index, found = t.locate(t.shared, address, 16, lanes, "wgmma reads")
    if found.size < lanes.size:
        return np.zeros((rows, flight.product.depth))
    if t.races and t.shared.unfenced.reshape(-1, 16)[index].any():
        t.find("wgmma reads shared memory without fence.proxy.async after the write", lanes[:1])
    flight.reads.append((index, lanes))
    data = t.shared.read(t, index, 16, _code(t, lanes), lanes)
    factor = warps.factor(np.ascontiguousarray(data).view(f"u{size}").reshape(across, -1), kind)
    return factor.T if trans else factor


def _code(t: "Threads", lanes: Array) -> Array:
    """The code of accesses that a warp group makes together."""
    group = lanes % t.threads // GROUP << memory.WARP
    return t.code[lanes] & ~memory.SEVERAL_WARPS | memory.GROUP | group


def wait_for_products(t: "Threads", keep: int, mask: Array | None) -> None:
    """``wgmma.wait_group``: until now they may have read."""
    t.require_whole(mask, warps.LANES)
    waiting = t.live if mask is None else mask
    left = []
    for flight in t.products:
        if waiting[flight.lane] and flight.group < t.committed_products[flight.lane] - keep:
            for index, lanes in flight.reads:
                t.shared.check_read(t, index, 16, _code(t, lanes), lanes)
        else:
            left.append(flight)
    t.products = left


def check_registers(t: "Threads", i: Instruction, mask: Array | None) -> None:
    """Report an instruction that reads or writes what a product in flight still owns."""
    chained = i.opcode[:2] == ("wgmma", "mma_async")
    touches = i.touches - i.writes if chained else i.touches
    for flight in t.products:
        active = slice(flight.lane, flight.lane + GROUP)
        if mask is not None and not mask[active].any():
            continue
        if touches & flight.product.results or i.writes & flight.product.operands:
            t.find("register that wgmma still owns", np.arange(t.count)[active])
