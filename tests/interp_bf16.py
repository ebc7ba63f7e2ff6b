"""Bfloat16 in Triton's interpreter.

The interpreter keeps bfloat16 as uint16 bit patterns and computes with those bits: sums, products
and ``tl.dot`` are silently wrong, and float32 is truncated instead of rounded (Triton 3.6 to 3.9).
`install` widens every operand to float32 and rounds each result to the nearest even bfloat16, as
the hardware does. It patches private names; ``test_interp_bf16.py`` notices when they move.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bit patterns; exact."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 values to bit patterns, to nearest even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.atleast_1d(values).view(np.uint32).reshape(values.shape)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + rounding) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return (
        isinstance(handle, interpreter.TensorHandle)
        and handle.dtype.scalar == tl.bfloat16
        and handle.data.dtype == np.uint16
    )


def _widen(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(to_float32(handle.data), tl.float32)


def _narrow(handle: Any) -> Any:
    return interpreter.TensorHandle(to_bfloat16(handle.data), tl.bfloat16)


def _tensor(handle: Any, like: Any) -> Any:
    """Wrap a handle as a language tensor of the shape of ``like``."""
    shape = list(like.shape)
    scalar = handle.dtype.scalar
    return tl.core.tensor(handle, tl.block_type(scalar, shape) if shape else scalar)


def _patch_builder(builder: Any) -> None:
    binary_op, unary_op, ternary_op = builder.binary_op, builder.unary_op, builder.ternary_op
    cast_impl, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    dot, fma = builder.create_dot, builder.create_fma

    def new_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_is_bfloat16(lhs) or _is_bfloat16(rhs)):
            return binary_op(self, lhs, rhs, op)
        out = op(_widen(lhs).data, _widen(rhs).data)
        if op in COMPARISONS:
            return interpreter.TensorHandle(out, tl.int1)
        return _narrow(interpreter.TensorHandle(out.astype(np.float32), tl.float32))

    def new_unary_op(self: Any, arg: Any, op: Any) -> Any:
        out = unary_op(self, _widen(arg), op)
        return _narrow(out) if _is_bfloat16(arg) else out

    def new_ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.where or not _is_bfloat16(other):  # selecting moves bits, no arithmetic
            return ternary_op(self, lhs, rhs, other, op)
        return _narrow(ternary_op(self, _widen(lhs), _widen(rhs), _widen(other), op))

    def new_cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == tl.bfloat16:
            wide = _widen(src)
            return wide if target == tl.float32 else cast_impl(self, wide, dst_type)
        if target == tl.bfloat16:
            wide = src.data.astype(np.float32)
            return _narrow(interpreter.TensorHandle(wide, tl.float32))
        return cast_impl(self, src, dst_type)

    def new_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return new_cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def new_dot(self: Any, a: Any, b: Any, d: Any, *args: Any, **options: Any) -> Any:
        return dot(self, _widen(a), _widen(b), d, *args, **options)

    def new_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        out = fma(self, _widen(x), _widen(y), _widen(z))
        return _narrow(out) if _is_bfloat16(z) else out

    builder.binary_op = new_binary_op
    builder.unary_op = new_unary_op
    builder.ternary_op = new_ternary_op
    builder.cast_impl = new_cast_impl
    builder.create_fp_to_fp = new_fp_to_fp
    builder.create_dot = new_dot
    builder.create_fma = new_fma
    builder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))


def _patch_reduction(operation: Any) -> None:
    """Let a reduction or scan work on float32, and round its bfloat16 results once."""
    apply_impl = operation.apply_impl

    def new_apply_impl(self: Any, args: Any) -> Any:
        inputs = args if isinstance(args, tuple) else (args,)
        narrow = [_is_bfloat16(arg.handle) for arg in inputs]
        wide = tuple(_tensor(_widen(arg.handle), arg) for arg in inputs)
        if not any(narrow):
            return apply_impl(self, args)
        out = apply_impl(self, wide if isinstance(args, tuple) else wide[0])
        outputs = list(out) if isinstance(out, (list, tuple)) else [out]
        for i, result in enumerate(outputs):
            if i < len(narrow) and narrow[i] and result.dtype == tl.float32:
                outputs[i] = _tensor(_narrow(result.handle), result)
        return tuple(outputs) if isinstance(out, (list, tuple)) else outputs[0]

    operation.apply_impl = new_apply_impl


def install() -> None:
    """Patch the interpreter, once; call it after ``import triton`` and before a launch."""
    if getattr(interpreter.InterpreterBuilder, "rounds_bfloat16", False):
        return
    interpreter.InterpreterBuilder.rounds_bfloat16 = True
    _patch_builder(interpreter.InterpreterBuilder)
    _patch_reduction(interpreter.ReduceOps)
    _patch_reduction(interpreter.ScanOps)
