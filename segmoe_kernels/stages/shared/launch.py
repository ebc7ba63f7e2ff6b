"""Launches of `shared`: one call's tensors, PyTorch's products and our kernels between them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.arguments import Kept, Pre, dropout_of, rows_of
from segmoe_kernels._triton.launch import accumulator, accumulator_dtype, cdiv, padded
from segmoe_kernels._triton.partials import sum_splits
from segmoe_kernels.routing import FFNWeights
from segmoe_kernels.stages.combine import launch_combine, rows_at_once
from segmoe_kernels.stages.shared.kernels import (
    shared_activate_bwd_kernel,
    shared_activate_kernel,
    shared_dx_kernel,
    shared_rows_kernel,
)


class SharedCall:
    """One call's tensors and what the launches derive from them."""

    def __init__(
        self,
        x: Tensor,
        weights: FFNWeights,
        shared_gate: Tensor,
        padding_mask: Tensor | None,
        seed: Tensor | None,
        segment_size: int,
        activation: str,
        dropout: float,
    ) -> None:
        self.x, self.weights, self.shared_gate = x, weights, shared_gate
        self.padding_mask = padding_mask
        self.segment_size, self.dropout = segment_size, dropout_of(seed, dropout, x.dtype)
        self.batch, self.length, self.d_model = x.shape
        self.hidden, self.width = weights.up_proj.shape
        self.segments_per_sequence = -(-self.length // segment_size)
        self.num_rows = self.batch * self.segments_per_sequence
        self.gated = weights.gate_proj is not None
        self.places = {"D": self.d_model, "SEGMENT_SIZE": segment_size}
        self.activation = {"ACTIVATION": activation}
        self.acc = {"ACC": accumulator(x.dtype)}

    def are_rows(self, x: Tensor) -> bool:
        """Whether x (B, T, D) holds the rows already, one behind the other."""
        whole = self.length % self.segment_size == 0 and self.padding_mask is None
        return whole and x.is_contiguous()

    def new_hidden(self) -> Tensor:
        """Room for a hidden layer."""
        return self.x.new_empty(self.num_rows, self.hidden)

    def new_scalars(self, *shape: int) -> Tensor:
        """Room for sums, in the accumulator's dtype."""
        return self.x.new_empty(shape, dtype=accumulator_dtype(self.x.dtype))


def _pass_block(columns: int) -> tuple[int, int]:
    """Rows and columns of a program that computes on every element once."""
    block_n = min(padded(columns), 256)
    return 4096 // block_n, block_n


def _lay_out_rows(
    call: SharedCall, x: Tensor, vector: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return x as (M, W), and its product with vector, in one pass; none where neither needs it."""
    copied = not call.are_rows(x)
    shape = (call.num_rows, call.width)
    rows = x.new_empty(shape) if copied else x.view(shape)
    along = None if vector is None else call.new_scalars(call.num_rows)
    if copied or vector is not None:
        block_m, block_n = _pass_block(call.width)
        shared_rows_kernel[(cdiv(call.num_rows, block_m),)](
            rows_of(x),
            vector,
            call.padding_mask,
            rows if copied else None,
            along,
            call.num_rows,
            call.segments_per_sequence,
            call.length,
            W=call.width,
            **call.places,
            **call.acc,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return rows, along


def forward(
    call: SharedCall, expert_out: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the gate's logits, and the rows, pre and gate_pre that backward needs."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    rows, logits = _lay_out_rows(call, call.x, call.shared_gate)
    assert logits is not None
    pre = torch.mm(rows, up.t())
    gate_pre = None if gate is None else torch.mm(rows, gate.t())
    hidden = torch.empty_like(pre) if keep else pre
    block_m, block_n = _pass_block(call.hidden)
    programs = cdiv(call.num_rows, block_m) * cdiv(call.hidden, block_n)
    check.check_programs("shared_combine", programs)
    shared_activate_kernel[(programs,)](
        Pre(pre, gate_pre, up_bias, gate_bias),
        hidden,
        call.dropout,
        call.num_rows,
        H=call.hidden,
        **call.activation,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    if down_bias is None:
        out = torch.mm(hidden, down.t())
    else:
        out = torch.addmm(down_bias, hidden, down.t())
    shape = (call.batch, call.segments_per_sequence)
    y = launch_combine(
        expert_out, out.view(*shape, call.width), logits.view(shape), call.padding_mask
    )
    found = [None if call.are_rows(call.x) else rows, pre, gate_pre]
    # Outputs may not alias each other: an empty tensor for each that is not there.
    rows, pre, gate_pre = (call.x.new_empty(0) if t is None or not keep else t for t in found)
    return y, logits, rows, pre, gate_pre


def backward(
    call: SharedCall,
    dy: Tensor,
    logits: Tensor,
    rows: Tensor,
    pre: Tensor,
    gate_pre: Tensor | None,
    wanted: Sequence[Tensor | None],
) -> None:
    """Write the gradients of x, the weights and the shared gate; None where nobody wants one."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    dx, dup, ddown, dgate_proj, dup_bias, dgate_bias, ddown_bias, dshared_gate = wanted
    if call.are_rows(call.x):
        rows = call.x.view(call.num_rows, call.width)
    drows, from_bias = _lay_out_rows(call, dy, down_bias)
    dpre = torch.mm(drows, down)
    hidden = call.new_hidden()
    dgate = call.new_hidden() if call.gated else None
    dlogits = call.new_scalars(call.num_rows)
    # 128 columns of float64 spill.
    block_m, block_n = 32, min(padded(call.hidden), 128 if dpre.itemsize < 8 else 32)
    programs = cdiv(call.num_rows, block_m)
    dbias = None
    if dup_bias is not None or dgate_bias is not None:
        dbias = call.new_scalars(programs, call.hidden * (2 if call.gated else 1))
    shared_activate_bwd_kernel[(programs,)](
        dpre,
        Pre(pre, gate_pre, up_bias, gate_bias),
        logits,
        from_bias,
        Kept(hidden, dpre, dgate),
        dlogits,
        dbias,
        call.dropout,
        call.num_rows,
        H=call.hidden,
        **call.activation,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8,
    )
    if dbias is not None:
        sum_splits(dbias, *[dup_bias, dgate_bias][: 2 if call.gated else 1])
    if ddown is not None:
        torch.mm(drows.t(), hidden, out=ddown)
    if ddown_bias is not None:
        opened = torch.sigmoid(logits).to(dy.dtype)
        torch.mv(drows.t(), opened, out=ddown_bias)
    if dup is not None:
        torch.mm(dpre.t(), rows, out=dup)
    if dgate_proj is not None and dgate is not None:
        torch.mm(dgate.t(), rows, out=dgate_proj)
    if dshared_gate is not None:
        torch.mv(rows.t(), dlogits.to(rows.dtype), out=dshared_gate.view(-1))
    if dx is None:
        return
    drows = torch.mm(dpre, up)
    if dgate is not None and gate is not None:
        drows = torch.addmm(drows, dgate, gate)
    _, block_d = _pass_block(call.d_model)
    block_m = rows_at_once(block_d, drows.dtype)
    num_steps = call.batch * call.length
    programs = cdiv(num_steps, block_m) * cdiv(call.d_model, block_d)
    check.check_programs("shared_combine", programs)
    shared_dx_kernel[(programs,)](
        drows,
        dlogits,
        call.shared_gate,
        call.padding_mask,
        dx,
        num_steps,
        call.segments_per_sequence,
        call.length,
        **call.places,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )
