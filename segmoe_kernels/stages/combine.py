"""Stage 4 of 4, combine: sum the choices of each step and add the gated shared path.

Data flow: ``expert_out (top_k, B, T, D), shared_out (B, J, P * D), shared_gate_logits (B, J) ->
y (B, T, D)``. One choice without a shared path is y already: nothing is launched then. The GEMMs
of the shared path are PyTorch's.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.arguments import Shared, rows_of
from segmoe_kernels._triton.launch import (
    accumulator,
    cdiv,
    define_operator,
    kernel,
    padded,
    step_flags,
)
from segmoe_kernels._triton.partials import store_sum
from segmoe_kernels._triton.tape import taped
from segmoe_kernels.autograd import apply, is_followed


@kernel
def _combine_fwd_kernel(
    expert_out,  # Rows (top_k, B, T, D)
    shared,  # if there
    padding_mask_ptr,  # (B, T) bool or None
    y_ptr,  # (B, T, D) contiguous, every row is written
    num_steps,
    length,
    shared_rows,
    num_choices,
    D: tl.constexpr,
    STEPS_PER_GATE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Combine BLOCK_M steps and BLOCK_D columns.

    Grid: ``(cdiv(B * T, BLOCK_M) * cdiv(D, BLOCK_D),)``. Sums in ACC, rounded at the store.
    """
    pid = tl.program_id(0).to(tl.int64)
    column_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rows = (pid // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m = rows < num_steps
    mask = mask_m[:, None] & (cols < D)[None, :]
    sequence = rows // length
    step = rows % length

    y = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    offs = sequence * expert_out.stride_b + step * expert_out.stride_t
    ptrs = expert_out.ptr + offs[:, None] + cols[None, :]
    for _ in range(num_choices):
        y += tl.load(ptrs, mask=mask, other=0.0).to(ACC)
        ptrs += expert_out.stride_k
    if shared.out_ptr is not None:
        real = mask_m
        if padding_mask_ptr is not None:
            real &= tl.load(padding_mask_ptr + rows, mask=mask_m, other=0) != 0
        row = sequence * shared_rows + step
        gate_ptrs = shared.gate_logits_ptr + row // STEPS_PER_GATE
        logit = tl.load(gate_ptrs, mask=real, other=0.0).to(ACC)
        ptrs = shared.out_ptr + row[:, None] * D + cols[None, :]
        out = tl.load(ptrs, mask=mask & real[:, None], other=0.0)
        y += out.to(ACC) / (1.0 + tl.exp(-logit))[:, None]
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def _combine_bwd_kernel(
    dy_rows,  # Rows (B, T, D)
    shared,
    dshared,  # every element is written
    padding_mask_ptr,  # (B, T) bool or None
    num_gates,
    length,
    gates_per_sequence,
    D: tl.constexpr,
    STEPS_PER_GATE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Gradients of BLOCK_M gates and of the steps below them.

    Grid: ``(cdiv(B * J, BLOCK_M),)``. Rows behind the sequence and masked ones get 0.
    """
    gate = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_g = gate < num_gates
    sequence = gate // gates_per_sequence
    logit = tl.load(shared.gate_logits_ptr + gate, mask=mask_g, other=0.0).to(ACC)
    opened = 1.0 / (1.0 + tl.exp(-logit))
    dot = tl.zeros((BLOCK_M,), dtype=ACC)
    for p in range(STEPS_PER_GATE):
        step = (gate % gates_per_sequence) * STEPS_PER_GATE + p
        real = mask_g & (step < length)
        if padding_mask_ptr is not None:
            real &= tl.load(padding_mask_ptr + sequence * length + step, mask=real, other=0) != 0
        for d0 in range(0, D, BLOCK_D):
            cols = d0 + tl.arange(0, BLOCK_D)
            mask_d = (cols < D)[None, :]
            rows = sequence * dy_rows.stride_b + step * dy_rows.stride_t
            ptrs = dy_rows.ptr + rows[:, None] + cols[None, :]
            dy = tl.load(ptrs, mask=real[:, None] & mask_d, other=0.0).to(ACC)
            offs = ((gate * STEPS_PER_GATE + p) * D)[:, None] + cols[None, :]
            out = tl.load(shared.out_ptr + offs, mask=real[:, None] & mask_d, other=0.0).to(ACC)
            dot += tl.sum(dy * out, 1)
            store_sum(dshared.out_ptr, offs, dy * opened[:, None], mask_g[:, None] & mask_d)
    store_sum(dshared.gate_logits_ptr, gate, dot * opened * (1.0 - opened), mask_g)


def launch_combine(
    expert_out: Tensor,
    shared_out: Tensor | None,
    shared_gate_logits: Tensor | None,
    padding_mask: Tensor | None,
) -> Tensor:
    """Forward without autograd; the arguments are those of `combine`, contiguous where it says."""
    y = _combine_fwd_fake(expert_out, shared_out, shared_gate_logits, padding_mask)
    if y.numel() == 0:
        return y
    batch, length, d_model = y.shape
    width = d_model if shared_out is None else shared_out.shape[2]
    block_d = min(padded(d_model), 256)
    block_m = rows_at_once(block_d, y.dtype)
    programs = cdiv(batch * length, block_m) * cdiv(d_model, block_d)
    check.check_programs("combine", programs)
    _combine_fwd_kernel[(programs,)](
        rows_of(expert_out),
        Shared(shared_out, shared_gate_logits),
        padding_mask,
        y,
        batch * length,
        length,
        0 if shared_out is None else shared_out.shape[1] * (width // d_model),
        expert_out.shape[0],
        D=d_model,
        STEPS_PER_GATE=width // d_model,
        ACC=accumulator(y.dtype),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return y


def rows_at_once(block_d: int, dtype: torch.dtype) -> int:
    """8 KiB of each operand: with 16, 32 elements of float32 in a thread, it spills."""
    return int(max(1, 8192 // (block_d * dtype.itemsize)))


def _combine_fwd_fake(
    expert_out: Tensor,
    shared_out: Tensor | None,  # noqa: ARG001  schema
    shared_gate_logits: Tensor | None,  # noqa: ARG001
    padding_mask: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return expert_out.new_empty(expert_out.shape[1:])


def _combine_bwd(
    dy: Tensor, shared_out: Tensor, shared_gate_logits: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    dshared, dgate_logits = _combine_bwd_fake(dy, shared_out, shared_gate_logits, padding_mask)
    if dshared.numel() == 0:
        return dshared, dgate_logits.zero_()
    batch, length, d_model = dy.shape
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    block_d = min(padded(d_model), 256)
    block_m = rows_at_once(block_d, dy.dtype)
    num_gates = batch * shared_out.shape[1]
    _combine_bwd_kernel[(cdiv(num_gates, block_m),)](
        rows_of(dy),
        Shared(shared_out, shared_gate_logits),
        Shared(dshared, dgate_logits),
        padding_mask,
        num_gates,
        length,
        shared_out.shape[1],
        D=d_model,
        STEPS_PER_GATE=shared_out.shape[2] // d_model,
        ACC=accumulator(dy.dtype),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return dshared, dgate_logits


def _combine_bwd_fake(
    dy: Tensor,  # noqa: ARG001  schema
    shared_out: Tensor,
    shared_gate_logits: Tensor,
    padding_mask: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    dshared = shared_out.new_empty(shared_out.shape)
    return dshared, shared_gate_logits.new_empty(shared_gate_logits.shape)


combine_fwd = taped(define_operator("combine_fwd", launch_combine, _combine_fwd_fake))
_combine_bwd_op = taped(
    define_operator("combine_bwd", _combine_bwd, _combine_bwd_fake, gradient=True)
)


class _Combine(torch.autograd.Function):
    """Keeps the shared path and its gate; the gradient of every choice is dy itself, not a copy."""

    @staticmethod
    def forward(
        expert_out: Tensor,
        shared_out: Tensor | None,
        shared_gate_logits: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        y: Tensor = combine_fwd(expert_out, shared_out, shared_gate_logits, padding_mask)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.num_choices = inputs[0].shape[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        dshared = dgate_logits = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dshared, dgate_logits = _combine_bwd_op(dy, *ctx.saved_tensors)
        return dy.expand(ctx.num_choices, *dy.shape), dshared, dgate_logits, None


def combine(
    expert_out: Tensor,
    shared_out: Tensor | None = None,
    shared_gate_logits: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Sum the choices and add the gated shared path; see `functional.combine`."""
    if shared_out is None and expert_out.shape[0] == 1:
        return expert_out.squeeze(0)
    if expert_out.stride(-1) != 1:
        expert_out = expert_out.contiguous()
    if shared_out is not None and shared_gate_logits is not None:
        shared_out, shared_gate_logits = shared_out.contiguous(), shared_gate_logits.contiguous()
    flags = step_flags(padding_mask, expert_out.dtype)
    tensors = (expert_out, shared_out, shared_gate_logits)
    y: Tensor = apply(_Combine, *tensors, flags, followed=is_followed(*tensors))
    return y
