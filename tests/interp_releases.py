"""Faults that single releases of Triton's interpreter have, and compiled kernels don't.

`install` mends them, so that a kernel that is right passes with every release. Where a release has
not the fault, the patch changes nothing.
"""

from typing import Any

import triton.language as tl
from interp_bf16 import COMPARISONS
from triton.runtime import interpreter


def _patch_comparisons(builder: Any) -> None:
    """Type a comparison as bool: 3.9 spreads a scalar's to a mask of integers, and refuses it."""
    binary_op = builder.binary_op

    def new_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        out = binary_op(self, lhs, rhs, op)
        if op in COMPARISONS:
            return interpreter.TensorHandle(out.data.astype(bool), tl.int1)
        return out

    builder.binary_op = new_binary_op


def _patch_index() -> None:
    """Let a tensor of one element bound a loop: NumPy 2.4 refuses what 3.5 and 3.6 do for it."""
    patch_tensor = interpreter._patch_lang_tensor

    def new_patch_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = new_patch_tensor


def install() -> None:
    """Patch the interpreter, once; call it after ``import triton`` and before a launch."""
    if getattr(interpreter.InterpreterBuilder, "mended", False):
        return
    interpreter.InterpreterBuilder.mended = True
    _patch_comparisons(interpreter.InterpreterBuilder)
    _patch_index()
