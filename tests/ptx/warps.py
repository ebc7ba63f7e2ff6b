"""What the lanes of a warp do together: shuffles, reductions, matrices, tensor cores."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import numerics
from ptx.numerics import Array, f4, f8, u2, u4, u8
from ptx.parse import NotEmulated

if TYPE_CHECKING:
    from ptx.machine import Threads

LANES = 32


def shuffle(
    t: "Threads", value: Array, lane: Array, control: Array, mask: Array | None, *, mode: str
) -> Array:
    """``shfl``: the value of another lane, or the lane's own beyond its segment."""
    t.require_whole(mask, LANES)
    own = np.arange(LANES)
    lane = numerics.spread(lane, t.count).reshape(-1, LANES).astype(np.int64) & 31
    control = numerics.spread(control, t.count).reshape(-1, LANES).astype(np.int64)
    segment, clamp = control >> 8 & 31, control & 31
    last = (own & segment) | (clamp & ~segment & 31)
    if mode == "bfly":
        other = own ^ lane
    elif mode == "up":
        other = own - lane
    elif mode == "down":
        other = own + lane
    elif mode == "idx":
        other = (own & segment) | (lane & ~segment & 31)
    else:
        raise NotEmulated(f"shfl.{mode}")
    inside = other >= last if mode == "up" else other <= last
    values = numerics.spread(value, t.count).reshape(-1, LANES)
    return np.take_along_axis(values, np.where(inside, other, own), 1).reshape(-1)


def reduce(t: "Threads", value: Array, mask: Array | None, *, what: str) -> Array:
    """``redux``: one integer of all lanes."""
    t.require_whole(mask, LANES)
    function: Any = numerics.FUNCTIONS[what]
    return np.repeat(function.reduce(value.reshape(-1, LANES), 1, dtype=value.dtype), LANES)


def _givers(t: "Threads", count: int, mask: Array | None) -> Array:
    """The lanes whose addresses count: eight for each matrix."""
    t.require_whole(mask, LANES)
    giving = np.arange(t.count) % LANES < 8 * count
    return giving & t.live if mask is None else giving & mask


def load_matrices(
    t: "Threads", address: Array, mask: Array | None, *, count: int, trans: bool
) -> list[Array]:
    """``ldmatrix``: 8 x 8 numbers of 16 bits; row r lies in four lanes from 4 r on."""
    rows = t.load(t.shared, address, 2, 8, _givers(t, count, mask))
    matrices = rows.T.reshape(-1, 4, 8, 8)
    if trans:
        matrices = matrices.swapaxes(2, 3)
    words = np.ascontiguousarray(matrices).view(u4).reshape(-1, 4, LANES)
    return [words[:, k].reshape(-1) for k in range(count)]


def store_matrices(
    t: "Threads", address: Array, values: list[Array], mask: Array | None, *, trans: bool
) -> None:
    """``stmatrix``: the reverse."""
    words = np.zeros((t.count // LANES, 4, LANES), u4)
    for k, value in enumerate(values):
        words[:, k] = value.reshape(-1, LANES)
    matrices = words.view(u2).reshape(-1, 4, 8, 8)
    if trans:
        matrices = matrices.swapaxes(2, 3)
    halves = np.ascontiguousarray(matrices).reshape(-1, 8).view(u8)
    givers = _givers(t, len(values), mask)
    t.store(t.shared, address, [halves[:, 0], halves[:, 1]], givers)


def factor(bits: Array, kind: str) -> Array:
    """A factor as tensor cores take it, in 64 bits: TF32 without its lower bits."""
    if kind == "tf32":
        bits = bits & u4(0xFFFFE000)
    elif kind not in {"f16", "bf16", "f64"}:
        raise NotEmulated(f"a product of {kind}")
    return numerics.decode(bits, kind).astype(f8)


def rows_of(registers: list[Array], kind: str, tall: int) -> list[Array]:
    """A factor of each warp, in ``tall`` parts (warps, 8, depth).

    A register has the next numbers, one or two of 16 bits, of row ``lane / 4`` of its part; the
    registers go down the rows first.
    """
    parts = []
    for bits in registers:
        packed = np.ascontiguousarray(bits)
        packed = packed.view(u2) if kind in {"f16", "bf16"} else packed
        parts.append(factor(packed, kind).reshape(len(bits) // LANES, 8, -1))
    return [np.concatenate(parts[k::tall], 2) for k in range(tall)]


def multiply(
    t: "Threads", a: list[Array], b: list[Array], c: list[Array], mask: Array | None, *,
    shape: str, types: tuple[str, ...],
) -> list[Array]:  # fmt: skip
    """``mma``: D = A B + C, exact products, one rounding."""
    t.require_whole(mask, LANES)
    out = {"f32": f4, "f64": f8}.get(types[0])
    if out is None or not shape.startswith(("m16n8k", "m8n8k")):
        raise NotEmulated(f"mma {shape} {types}")
    right = rows_of(b, types[1], 1)[0].swapaxes(1, 2)
    result = []
    for k, block in enumerate(rows_of(a, types[1], 2 if shape.startswith("m16") else 1)):
        product = block @ right  # (warps, 8, 8)
        for column in range(2):
            old = c[2 * k + column].view(out).astype(f8)
            value = old + product[:, :, column::2].reshape(-1)
            result.append(value.astype(out).view(f"u{out().itemsize}"))
    return result
