"""Plan "vendor" of `shared`: PyTorch's products, and passes of ours between them."""

import torch
import triton
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.launch import exact, padded
from segmoe_kernels.stages.combine import launch_combine
from segmoe_kernels.stages.shared_call import Gradients, SharedCall, pass_block
from segmoe_kernels.stages.shared_passes import (
    shared_activate_bwd_kernel,
    shared_activate_kernel,
    shared_dx_kernel,
    shared_rows_kernel,
)


def _lay_out_rows(
    call: SharedCall, x: Tensor, vector: Tensor | None, *, copied: bool
) -> tuple[Tensor, Tensor | None]:
    """Return x as (M, W), and its product with vector, in one pass; none where neither needs it."""
    if copied:
        rows = x.new_empty(call.num_rows, call.width)
    else:
        rows = x.reshape(call.num_rows, call.width)
    along = None if vector is None else call.new_scalars(call.num_rows)
    if copied or vector is not None:
        block_m, block_n = pass_block(call.width)
        shared_rows_kernel[(triton.cdiv(call.num_rows, block_m),)](
            x,
            vector,
            call.padding_mask,
            rows if copied else None,
            along,
            *call.sizes,
            *x.stride()[:2],
            W=call.width,
            **call.places,
            **call.acc,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return rows, along


def vendor_fwd(call: SharedCall, expert_out: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Return y, the gate's logits, and the rows, pre and gate_pre that backward needs."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    rows, logits = _lay_out_rows(call, call.x, call.shared_gate, copied=not call.is_rows)
    assert logits is not None
    pre = torch.mm(rows, up.t())
    gate_pre = None if gate is None else torch.mm(rows, gate.t())
    hidden = torch.empty_like(pre) if keep else pre
    block_m, block_n = pass_block(call.hidden)
    programs = triton.cdiv(call.num_rows, block_m) * triton.cdiv(call.hidden, block_n)
    check.check_programs("shared_combine", programs)
    shared_activate_kernel[(programs,)](
        pre,
        gate_pre,
        up_bias,
        gate_bias,
        call.seed,
        hidden,
        call.num_rows,
        exact(call.dropout, call.x.dtype),
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
    found = [None if call.is_rows else rows, pre, gate_pre]
    # Outputs may not alias each other: an empty tensor for each that is not there.
    kept = [call.x.new_empty(0) if t is None or not keep else t for t in found]
    return (y, logits, *kept)


def vendor_bwd(
    call: SharedCall, dy: Tensor, logits: Tensor, rows: Tensor, pre: Tensor,
    gate_pre: Tensor | None, grads: Gradients,
) -> None:  # fmt: skip
    """The gradients that are wanted."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    if call.is_rows:
        rows = call.x.view(call.num_rows, call.width)
    whole = call.length % call.segment_size == 0 and call.padding_mask is None
    copied = not (whole and dy.is_contiguous())
    drows, from_bias = _lay_out_rows(call, dy, down_bias, copied=copied)
    dpre = torch.mm(drows, down)
    hidden = call.new_hidden()
    dgate = call.new_hidden() if call.gated else None
    dlogits = call.new_scalars(call.num_rows)
    # 128 columns of float64 spill.
    block_m, block_n = 32, min(padded(call.hidden), 128 if dpre.itemsize < 8 else 32)
    programs = triton.cdiv(call.num_rows, block_m)
    dbias = grads.bias_partials(call, programs)
    shared_activate_bwd_kernel[(programs,)](
        dpre,
        pre,
        gate_pre,
        up_bias,
        gate_bias,
        logits,
        from_bias,
        call.seed,
        hidden,
        dpre,
        dgate,
        dlogits,
        dbias,
        call.num_rows,
        exact(call.dropout, call.x.dtype),
        H=call.hidden,
        **call.activation,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8,
    )
    grads.reduce_bias(call, dbias)
    if grads.down_proj is not None:
        torch.mm(drows.t(), hidden, out=grads.down_proj)
    if grads.down_bias is not None:
        opened = torch.sigmoid(logits).to(dy.dtype)
        torch.mv(drows.t(), opened, out=grads.down_bias)
    if grads.up_proj is not None:
        torch.mm(dpre.t(), rows, out=grads.up_proj)
    if grads.gate_proj is not None and dgate is not None:
        torch.mm(dgate.t(), rows, out=grads.gate_proj)
    if grads.shared_gate is not None:
        torch.mv(rows.t(), dlogits.to(rows.dtype), out=grads.shared_gate)
    if grads.x is None:
        return
    drows = torch.mm(dpre, up)
    if dgate is not None and gate is not None:
        drows = torch.addmm(drows, dgate, gate)
    block_m, block_d = pass_block(call.d_model)
    num_steps = call.batch * call.length
    programs = triton.cdiv(num_steps, block_m) * triton.cdiv(call.d_model, block_d)
    check.check_programs("shared_combine", programs)
    shared_dx_kernel[(programs,)](
        drows,
        dlogits,
        call.shared_gate,
        call.padding_mask,
        grads.x,
        num_steps,
        call.segments_per_sequence,
        call.length,
        **call.places,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )
