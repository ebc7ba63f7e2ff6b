"""Plan "fused" of `shared`: our own products, with what comes before and after them inside."""

import torch
import triton
from torch import Tensor

from segmoe_kernels._triton.launch import exact
from segmoe_kernels._triton.tiles import (
    SHARED_GROUP_M,
    num_shared_splits,
    shared_gemm_dw_tile,
    shared_gemm_tile,
)
from segmoe_kernels.stages.shared_backward_kernels import (
    shared_dhidden_kernel,
    shared_dlogit_kernel,
    shared_dw_kernel,
)
from segmoe_kernels.stages.shared_call import (
    Gradients,
    SharedCall,
    reduce_shares,
    tile_grid,
    tile_options,
)
from segmoe_kernels.stages.shared_kernels import shared_steps_kernel, shared_up_kernel


def fused_fwd(
    call: SharedCall, expert_out: Tensor, y: Tensor, logits: Tensor, pre: Tensor | None,
    gate_pre: Tensor | None,
) -> None:  # fmt: skip
    """y, the gate's logits and, where room is given, what the activation saw."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    hidden = call.new_hidden()
    tile = shared_gemm_tile(
        call.hidden, call.width, call.x.dtype, accumulators=4 if call.gated else 2
    )
    shared_up_kernel[tile_grid(call.num_rows, call.hidden, tile)](
        call.x,
        up,
        gate,
        up_bias,
        gate_bias,
        call.shared_gate,
        call.padding_mask,
        call.seed,
        hidden,
        pre,
        gate_pre,
        logits,
        *call.sizes,
        *call.x.stride()[:2],
        up.stride(0),
        call.gate_stride(),
        exact(call.dropout, call.x.dtype),
        H=call.hidden,
        W=call.width,
        **call.places,
        **call.activation,
        **call.numerics,
        GROUP_M=SHARED_GROUP_M,
        **tile_options(tile),
    )
    _rows_to_steps(call, hidden, down.t(), y, bias=down_bias, logits=logits, expert_out=expert_out)


def _rows_to_steps(
    call: SharedCall,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    *,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    dlogits: Tensor | None = None,
    expert_out: Tensor | None = None,
) -> None:
    """Launch `shared_steps_kernel`; the arguments are its own."""
    tile = shared_gemm_tile(call.width, call.hidden, call.x.dtype)
    shared_steps_kernel[tile_grid(call.num_rows, call.width, tile)](
        a,
        a2,
        b,
        b2,
        bias,
        logits,
        dlogits,
        call.shared_gate,
        expert_out,
        call.padding_mask,
        y,
        *call.sizes,
        *b.stride(),
        *((0, 0) if b2 is None else b2.stride()),
        *((0, 0, 0) if expert_out is None else expert_out.stride()[:3]),
        K=call.hidden,
        W=call.width,
        **call.places,
        TOP_K=0 if expert_out is None else expert_out.shape[0],
        **call.numerics,
        GROUP_M=SHARED_GROUP_M,
        **tile_options(tile),
    )


def fused_bwd(
    call: SharedCall, dy: Tensor, logits: Tensor, pre: Tensor, gate_pre: Tensor | None,
    grads: Gradients,
) -> None:  # fmt: skip
    """The gradients that are wanted; the hidden layer comes from what its activation saw."""
    up, down, gate, _, _, down_bias = call.weights
    tile = shared_gemm_tile(
        call.hidden, call.width, call.x.dtype, accumulators=4 if call.gated else 2
    )
    column_tiles = triton.cdiv(call.hidden, tile.block_n)
    row_tiles = triton.cdiv(call.num_rows, tile.block_m)
    hidden, dpre = call.new_hidden(), call.new_hidden()
    dgate = call.new_hidden() if call.gated else None
    shares = call.new_scalars(column_tiles, call.num_rows)
    dbias = grads.bias_partials(call, row_tiles)
    shared_dhidden_kernel[tile_grid(call.num_rows, call.hidden, tile)](
        dy,
        down,
        down_bias,
        pre,
        gate_pre,
        logits,
        call.padding_mask,
        call.seed,
        hidden,
        dpre,
        dgate,
        shares,
        dbias,
        *call.sizes,
        *dy.stride()[:2],
        down.stride(0),
        exact(call.dropout, call.x.dtype),
        H=call.hidden,
        W=call.width,
        **call.places,
        **call.activation,
        **call.numerics,
        GROUP_M=SHARED_GROUP_M,
        **tile_options(tile),
    )
    dlogits = call.new_scalars(call.num_rows)
    opened = None if grads.down_bias is None else torch.empty_like(dlogits)
    if grads.x is not None or grads.shared_gate is not None or opened is not None:
        shared_dlogit_kernel[(triton.cdiv(call.num_rows, 128),)](
            shares,
            logits,
            dlogits,
            opened,
            call.num_rows,
            column_tiles,
            **call.acc,
            BLOCK_M=128,
            num_warps=4,
        )
    if grads.x is not None:
        _rows_to_steps(call, dpre, up, grads.x, a2=dgate, b2=gate, dlogits=dlogits)
    _fused_dw(call, dy, hidden, dpre, dgate, dlogits, opened, grads)
    grads.reduce_bias(call, dbias)


def _fused_dw(
    call: SharedCall, dy: Tensor, hidden: Tensor, dpre: Tensor, dgate: Tensor | None,
    dlogits: Tensor, opened: Tensor | None, grads: Gradients,
) -> None:  # fmt: skip
    """Weight gradients, in partial sums over runs of rows."""
    # a, b, whether the sum is transposed, vector, the matrix and the vector that come out. Where
    # the vector alone is wanted, the matrix is made too.
    matrix = call.hidden * call.width
    products = [
        (call.x, dpre, True, dlogits, grads.up_proj, grads.shared_gate),
        (call.x, dgate, True, None, grads.gate_proj, None),
        (dy, hidden, False, opened, grads.down_proj, grads.down_bias),
    ]
    products = [p for p in products if p[-2] is not None or p[-1] is not None]
    if not products:
        return
    masked = call.padding_mask is not None
    tile = shared_gemm_dw_tile(call.width, call.hidden, call.x.dtype, masked=masked)
    columns = (triton.cdiv(call.width, tile.block_n), triton.cdiv(call.hidden, tile.block_k))
    splits = num_shared_splits(call.num_rows, tile.block_m, columns[0] * columns[1])
    grid = (splits, *columns)
    sizes = [[matrix] if p[-1] is None else [matrix, call.width] for p in products]
    outputs: list[tuple[Tensor | None, int]] = []
    partials = None
    if splits > 1 or any(p[-2] is None for p in products):
        partials = call.new_scalars(splits, sum(map(sum, sizes)))
    offset = 0
    for (a, b, transposed, vector, weight, along), parts in zip(products, sizes, strict=True):
        slots = [weight, along]
        if partials is not None:
            slots = [partials[:, offset:], partials[:, offset + matrix :]]
            outputs += zip((weight, along), parts, strict=False)
            offset += sum(parts)
        shared_dw_kernel[grid](
            a,
            b,
            None if along is None else vector,
            call.padding_mask,
            slots[0],
            None if along is None else slots[1],
            *call.sizes,
            splits,
            0 if partials is None else partials.shape[1],
            *a.stride()[:2],
            H=call.hidden,
            W=call.width,
            **call.places,
            TRANSPOSED=transposed,
            **call.numerics,
            **tile_options(tile),
        )
    if partials is not None:
        reduce_shares(partials, outputs, block_r=1)
