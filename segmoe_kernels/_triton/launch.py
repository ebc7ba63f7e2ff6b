"""Operator registration, the device guard, and what every launcher needs to know about a dtype."""

import contextlib
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segmoe_kernels._triton.kernels import LISTENER, recorded_jit
from segmoe_kernels._triton.tape import taped
from segmoe_kernels.flops import register_flops

# What 32 bits hold.
MAX_OFFSET = 2**31 - 1

# Numbers that change with the batch, by the names that kernels give them. Triton would compile a
# kernel anew where one of them is 1, or where 16 comes to divide it.
OF_THE_BATCH = (
    "length",
    "num_blocks",
    "num_rows",
    "num_segments",
    "num_sequences",
    "num_slots",
    "num_splits",
    "num_steps",
    "blocks_per_split",
    "segments_per_block",
    "slots_per_block",
    "gates_per_sequence",
    "num_gates",
    "segments_per_sequence",
    "shared_rows",
)
kernel = recorded_jit(do_not_specialize=OF_THE_BATCH)

_LIBRARY = torch.library.Library("segmoe_kernels", "FRAGMENT")


def define_operator(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    gradient: bool = False,
) -> Callable[..., Any]:
    """Register ``segmoe_kernels::<name>`` for CPU (the interpreter) and GPU tensors.

    Operators are opaque and carry no autograd formula: the outer ``autograd.Function`` does, so
    that forward-mode AD and vmap refuse loudly. ``torch.library.triton_op`` does not run in the
    interpreter, hence not here.

    Args:
        name: of the operator; its schema is that of implementation.
        implementation: launches the kernels.
        fake: allocates the outputs' metadata, for tracing.
        gradient: part of a backward, whose own derivative is refused.

    Returns:
        A function of its arguments, in order.
    """
    schema = torch.library.infer_schema(implementation, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    @taped
    def guarded(*args: Any) -> Any:
        if args[0].is_cpu and triton.knobs.runtime.interpret:
            _refuse_wrong_bfloat16(args)
        with device_guard(args[0]):
            return implementation(*args)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, guarded, key)
    torch.library.register_fake(f"segmoe_kernels::{name}", fake, lib=_LIBRARY)
    if gradient:
        qualified = f"segmoe_kernels::{name}"
        torch.library.register_autograd(qualified, _refuse_second_derivative, lib=_LIBRARY)
    packet = getattr(torch.ops.segmoe_kernels, name)
    register_flops(packet, name)

    def operator(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return packet.default(*args)
        if LISTENER.recorder is not None:  # it wants PyTorch's operators, not ours
            return guarded(*args)
        # PyTorch's transforms take no formula of an operator, but functions.
        transformed = gradient and torch._C._are_functorch_transforms_active()
        return _Gradient.apply(packet, *args) if transformed else packet.default(*args)

    return operator


class _Gradient(torch.autograd.Function):
    """An operator of a backward under torch.func."""

    @staticmethod
    def forward(operator: Callable[..., Any], *args: Any) -> Any:
        out = operator(*args)
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        _refuse_second_derivative(ctx, *grads)


def _refuse_wrong_bfloat16(args: tuple[Any, ...]) -> None:
    given = any(isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 for arg in args)
    if given and not interprets_bfloat16():
        raise RuntimeError(
            "segmoe_kernels: backend='triton' can't run bfloat16 on the CPU: Triton's interpreter "
            "(TRITON_INTERPRET=1) multiplies it wrongly; use another dtype or backend='reference'."
        )


@functools.cache
def interprets_bfloat16() -> bool:
    """Whether the interpreter multiplies bfloat16 right: Triton's own (3.5 to 3.9) does not."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device="cpu")
    out = torch.empty(16, 16, device="cpu")
    _multiply[(1,)](ones, ones, out)
    return bool((out == 16).all())


@triton.jit
def _multiply(a_ptr, b_ptr, out_ptr) -> None:
    """Multiply two 16 x 16 matrices.

    Grid: ``(1,)``.
    """
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the GPU of x current: Triton launches on the current one."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def within_reach(weight: Tensor, *, rows: bool = True) -> Tensor:
    """Return the weight, or a copy of one that kernels can't address.

    They reach from the first element of a matrix to all others of it with 32 bits.

    Args:
        weight: (..., N, K).
        rows: the columns of a row have to be contiguous.

    Raises:
        ValueError: if one matrix has 2**31 elements or more.
    """
    n, k = weight.shape[-2:]
    if n * k > MAX_OFFSET:
        raise ValueError(
            f"segmoe_kernels: expected weights of at most {MAX_OFFSET} elements in one matrix, "
            f"got {n} x {k}."
        )
    last = (n - 1) * weight.stride(-2) + (k - 1) * weight.stride(-1)
    reached = last <= MAX_OFFSET and (weight.stride(-1) == 1 or not rows)
    return weight if reached else weight.contiguous()


def accumulator(dtype: torch.dtype) -> Any:
    """The dtype that products of ``dtype`` are summed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """`accumulator`, as PyTorch names it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def input_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` rounds float32 operands: as PyTorch's own matmul is told to."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def exact(value: float, dtype: torch.dtype) -> float | int:
    """A float option as kernels take it: in float64 its bits, for Triton passes floats in 32.

    `activations.read_option` is the other end.
    """
    if dtype != torch.float64:
        return value
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def step_flags(padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as kernels of ``dtype`` read it: contiguous, and in float64 of 32 bits a flag.

    The width of the flags that mask a load decides how a product's operand is laid out; in float64
    what follows from 8 bits does not compile for NVIDIA.
    """
    if padding_mask is None:
        return None
    flags = padding_mask.to(torch.int32) if dtype == torch.float64 else padding_mask
    return flags.contiguous()


def draw_seed(probability: float, x: Tensor) -> Tensor | None:
    """What a kernel's dropout is drawn from, of PyTorch's generator, where there is dropout."""
    if probability == 0:
        return None
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)


def padded(size: int, minimum: int = 16) -> int:
    """The power of two that a block of ``size`` takes; 16 is the least ``tl.dot`` accepts."""
    # Triton's own ``next_power_of_2`` takes 2 us on the host, and so does its ``cdiv``.
    return max(minimum, 1 << (size - 1).bit_length())


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:  # noqa: ARG001
    """Raise for a second derivative through the kernels, which have no formula for it."""
    raise RuntimeError(
        "segmoe_kernels: backend='triton' has no second derivatives; use backend='reference'."
    )
