"""What Triton's interpreter does wrong or slowly, and compiled kernels don't.

`install` mends faults that single releases have, so that a kernel that is right passes with every
release; where a release has not the fault, the patch changes nothing. Work that no result shows is
left out, which takes two thirds off the time of a layer.
"""

import dataclasses
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


def _patch_preparation() -> None:
    """Prepare `triton.language` once for a launch, not for every call of a device function."""
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[tuple[bool, bool]] = set()

    def prepare_once(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        seen = (tl in modules, tl.core in modules)
        if seen in prepared:
            return None
        prepared.add(seen)
        return prepare(fn)

    def new_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()  # the end of a launch takes it back
        launch(self, *args, **kwargs)

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = new_launch


def _patch_checks() -> None:
    """Leave out the search for overflows, whose finds are reported with ``debug`` alone."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def install() -> None:
    """Patch the interpreter, once; call it after ``import triton`` and before a launch."""
    if getattr(interpreter.InterpreterBuilder, "mended", False):
        return
    interpreter.InterpreterBuilder.mended = True
    _patch_comparisons(interpreter.InterpreterBuilder)
    _patch_index()
    _patch_preparation()
    _patch_checks()
