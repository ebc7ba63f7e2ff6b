"""Arithmetic of PTX on arrays: what an instruction computes, apart from where its operands lie."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.parse import WIDTH, NotEmulated

Array = np.ndarray[Any, Any]
Function = Callable[..., Any]
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i8 = np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

TINY = f4(2.0**-126)
UNSIGNED = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
# What an operand of each type is computed with; b is kept as unsigned, s is signed.
SPECIAL = {"pred": "?", "f16x2": "f2", "bf16": "f4", "bf16x2": "f4", "tf32": "f4"}
DTYPES = {
    kind: np.dtype(SPECIAL.get(kind, f"{kind[0].translate(str.maketrans('bs', 'ui'))}{width}"))
    for kind, width in WIDTH.items()
}


def bf16_f32(bits: Array) -> Array:
    """Numbers whose upper halves are ``bits``."""
    return (bits.astype(u4) << u4(16)).view(f4)


def f32_bf16(x: Array) -> Array:
    """Round to nearest, ties to even; NaN is 0x7FFF as in hardware."""
    bits = np.ascontiguousarray(x).view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def spread(value: Array, count: int) -> Array:
    """The same for all threads, where it's an immediate."""
    return value if value.ndim else np.full(count, value)


def decode(bits: Array, kind: str) -> Array:
    """What a register holds, as numbers; halves of pairs along a last axis."""
    if kind in {"pred", "b8", "b16", "b32", "b64"}:
        return bits
    if kind.endswith("x2"):
        halves = np.ascontiguousarray(bits).view(u2).reshape(-1, 2)
        return bf16_f32(halves) if kind == "bf16x2" else halves.view(f2)
    return bf16_f32(bits) if kind == "bf16" else bits.view(DTYPES[kind])


def encode(value: Array, kind: str, width: int) -> Array:
    """Numbers as a register of ``width`` bytes keeps them; 0 for predicates."""
    if not width:
        return value
    if kind == "bf16":
        value = f32_bf16(value)
    elif kind.endswith("x2"):
        halves = f32_bf16(value) if kind == "bf16x2" else value.astype(f2).view(u2)
        value = np.ascontiguousarray(halves).view(u4).reshape(-1)
    if value.dtype.itemsize < width:
        value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width}")
    if value.dtype.itemsize != width:
        raise NotEmulated(f"{kind} into a register of {width} bytes")
    return value.view(UNSIGNED[width])


def constant(text: str, kind: str) -> Any:
    """An immediate operand as a scalar of its type."""
    text = text.rstrip("U")
    if not re.fullmatch(r"0[fd][0-9a-fA-F]+|-?(0x)?[0-9a-fA-F]+", text):
        raise NotEmulated(f"the operand {text}")
    bits = int(text[2:], 16) if text[:2] in {"0f", "0d"} else int(text, 0)
    if kind == "pred":
        return np.bool_(bits)
    width = WIDTH[kind]
    return decode(np.array([bits & ((1 << (8 * width)) - 1)], f"u{width}"), kind)[0]


# ---- floats
def ftz(x: Array) -> Array:
    """Subnormal numbers become 0."""
    small = np.abs(x) < TINY
    return np.where(small, np.copysign(f4(0), x), x) if small.any() else x


def fma(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z``, rounded once; in 64 bits to the last bit but one."""
    if x.dtype == f8:
        return (np.multiply(x, y, dtype=np.longdouble) + z).astype(f8)
    product = np.multiply(x, y, dtype=f8)
    total = np.asarray(product + z)
    if x.dtype != f4:
        return total.astype(x.dtype)
    # A sum in 64 bits that fell between two floats was rounded to there: which side it came from?
    tie = (total.view(i8) & 0x1FFFFFFF) == 0x10000000
    if tie.any():
        product, z = np.broadcast_arrays(product, z.astype(f8))
        a, b, s = product[tie], z[tie], total[tie]
        kept = s - a
        lost = (a - (s - kept)) + (b - kept)
        total[tie] = np.where(lost == 0, s, np.nextafter(s, np.copysign(np.inf, lost)))
    return total.astype(f4)


def in_f64(function: Function) -> Function:
    """Compute in 64 bits and round: the same for every lane, wherever it is in the array."""
    return lambda x: function(x.astype(f8)).astype(x.dtype)


# ---- integers
def mulhi(x: Array, y: Array) -> Array:
    """The upper half of a product."""
    x, y = np.asarray(x), np.asarray(y)
    width = x.dtype.itemsize
    if width < 8:
        wide = np.dtype(f"{x.dtype.kind}{2 * width}")
        return ((x.astype(wide) * y.astype(wide)) >> wide.type(8 * width)).astype(x.dtype)
    low, half = u8(0xFFFFFFFF), u8(32)
    a, b = x.view(u8), y.view(u8)
    cross, other = (a >> half) * (b & low), (a & low) * (b >> half)
    middle = (((a & low) * (b & low)) >> half) + (cross & low) + (other & low)
    high = (a >> half) * (b >> half) + (cross >> half) + (other >> half) + (middle >> half)
    if x.dtype.kind == "i":
        high = high - np.where(x < 0, b, u8(0)) - np.where(y < 0, a, u8(0))
    return high.view(x.dtype)


def divide(x: Array, y: Array) -> Array:
    """Quotient; of integers towards zero, whatever for a divisor 0."""
    if y.dtype.kind == "f":
        return x / y
    safe = np.where(y == 0, y.dtype.type(1), y)
    floor = x // safe
    return floor + ((x != floor * safe) & ((x < 0) != (safe < 0))).astype(floor.dtype)


def shift_left(x: Array, n: Array) -> Array:
    """Shift; nothing is left of a number moved by its width."""
    bits = x.dtype.itemsize * 8
    return np.where(n >= bits, x.dtype.type(0), x << np.minimum(n, bits - 1).astype(x.dtype))


def shift_right(x: Array, n: Array) -> Array:
    """Shift, with copies of the sign where there is one."""
    bits = x.dtype.itemsize * 8
    moved = x >> np.minimum(n, bits - 1).astype(x.dtype)
    return moved if x.dtype.kind == "i" else np.where(n >= bits, x.dtype.type(0), moved)


def bit_field_extract(x: Array, place: Array, length: Array) -> Array:
    """``length`` bits from ``place`` on; of signed numbers with the sign of the last."""
    place, length = (np.asarray(n, u4) & u4(255) for n in (place, length))
    bits = x.dtype.itemsize * 8
    if x.dtype.kind == "u":
        ones = np.full(length.shape, ~x.dtype.type(0))
        return shift_right(x, place) & ~shift_left(ones, length)
    if (length == 0).any() or (place + length > bits).any():
        raise NotEmulated("bfe.s beyond the word")
    return shift_right(shift_left(x, bits - place - length), bits - length)


def permute_bytes(x: Array, y: Array, selector: Array) -> Array:
    """``prmt``: four of eight bytes, or their signs."""
    x, y, selector = np.broadcast_arrays(x, y, selector)
    pool = np.stack([x, y], -1).view(u1).reshape(*x.shape, 8)
    nibbles = (selector[..., None] >> (u4(4) * np.arange(4, dtype=u4))) & u4(15)
    chosen = np.take_along_axis(pool, (nibbles & u4(7)).astype(int), -1)
    signs = np.where(chosen & u1(128), u1(255), u1(0))
    return np.where(nibbles & u4(8), signs, chosen).view(u4).reshape(x.shape)


# ---- comparisons and conversions
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def comparison(name: str, kind: str) -> Function:
    """``setp``: ordered unless its name ends in u, so False wherever there is a NaN."""
    if kind not in {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2"}:
        return COMPARE[name]

    def unordered(x: Array, y: Array) -> Array:
        return np.isnan(x) | np.isnan(y)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda x, y: ~unordered(x, y)
    if name in COMPARE:
        return lambda x, y: COMPARE[name](x, y) & ~unordered(x, y)
    return lambda x, y: COMPARE[name[:-1]](x, y) | unordered(x, y)


def conversion(to: str, modifiers: set[str]) -> Function:
    """``cvt``; the operand is decoded already, and the result is encoded after it."""
    if to.endswith("x2"):
        return lambda high, low: np.stack(np.broadcast_arrays(low, high), -1)
    dtype = DTYPES[to]
    whole = next((ROUND[name] for name in ROUND if name in modifiers), None)
    if whole is None:
        return lambda x: np.asarray(x).astype(dtype)
    if dtype.kind == "f":
        return lambda x: whole(x).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return lambda x: np.where(np.isnan(x), 0, np.clip(whole(x).astype(f8), low, high)).astype(dtype)


FUNCTIONS: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda x, y, z: x * y + z,
    "fma": fma, "div": divide, "rem": lambda x, y: x - divide(x, y) * y, "min": np.fmin,
    "max": np.fmax, "neg": np.negative, "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "shl": shift_left, "shr": shift_right,
    "bfe": bit_field_extract, "prmt": permute_bytes, "mov": lambda x: x,
    "popc": lambda x: np.unpackbits(x[:, None].view(u1), axis=1).sum(1, dtype=u4),
    "selp": lambda x, y, chosen: np.where(chosen, x, y), "rcp": in_f64(np.reciprocal),
    "ex2": in_f64(np.exp2), "sqrt": in_f64(np.sqrt), "rsqrt": in_f64(lambda x: 1 / np.sqrt(x)),
}  # fmt: skip
