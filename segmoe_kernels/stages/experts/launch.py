"""Launches of `experts`: one call's tensors, and the kernels that run on them, fused or not."""

from typing import Any

import torch
from torch import Tensor

from segmoe_kernels._triton.arguments import (
    NO_KEPT,
    Gradients,
    Kept,
    Layout,
    Sequences,
    Slots,
    dropout_of,
    experts_of,
    factor_of,
    rows_of,
    sorted_rows,
)
from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    input_precision,
    padded,
    within_reach,
)
from segmoe_kernels._triton.partials import new_partials, reduce_partials
from segmoe_kernels._triton.tiles import (
    GEMM_GROUP_M,
    MAX_FUSED_WIDTH,
    expert_ffn_dw_tile,
    expert_ffn_dx_tile,
    expert_ffn_fwd_tile,
    grouped_gemm_dhidden_tile,
    num_row_splits,
)
from segmoe_kernels.routing import FFNWeights
from segmoe_kernels.stages.experts.kernels import (
    expert_ffn_dw_kernel,
    expert_ffn_dx_kernel,
    expert_ffn_fwd_kernel,
)
from segmoe_kernels.stages.grouped_gemm import Product, gemm_grid, product, weight_gradients
from segmoe_kernels.stages.grouped_gemm.kernels import grouped_gemm_dhidden_kernel


def by_choice(rows: Tensor) -> Tensor:
    """(top_k, B, T, D), as which one choice's may be (B, T, D)."""
    return rows if rows.ndim == 4 else rows[None]


class Call:
    """One call's tensors and what the launches derive from them.

    Products run in the weights' dtype; under autocast x has a wider one. One choice's x, and what
    is written for it, may be (B, T, D).
    """

    def __init__(
        self,
        x: Tensor,
        topk_weights: Tensor,
        slots: Slots,
        weights: FFNWeights,
        seed: Tensor | None,
        segment_size: int,
        concat: bool,
        activation: str,
        dropout: float,
    ) -> None:
        self.shape, self.segment_size = x.shape, segment_size
        self.x, self.topk_weights, self.weights = self.in_sequence(x), topk_weights, weights
        self.slots, self.activation = slots, activation
        self.top_k, self.batch, self.length, self.d_model = self.x.shape
        self.num_slots = topk_weights.shape[0] * topk_weights.shape[1]
        self.segments_per_sequence = -(-self.length // segment_size)
        self.rows_per_slot = 1 if concat else segment_size
        self.num_rows = self.num_slots * self.rows_per_slot
        self.num_experts, self.d_ff, self.width = weights.up_proj.shape
        self.dtype = weights.up_proj.dtype
        self.gated = weights.gate_proj is not None
        biased = any(bias is not None for bias in weights[3:])
        # What the table of tiles asks of a fused kernel.
        self.fused_in = {
            "gated": self.gated,
            "extras": biased or slots.padding_mask_ptr is not None or seed is not None,
        }
        self.fused = self.width <= MAX_FUSED_WIDTH and not concat
        layout = Layout(self.d_model, self.top_k, segment_size, self.rows_per_slot, concat)
        self.numerics = {
            "ACC": accumulator(self.dtype),
            "PRECISION": input_precision(self.dtype),
        }
        self.fused_constants = {
            "F": self.d_ff,
            "LAYOUT": layout,
            "ACTIVATION": activation,
            **self.numerics,
        }
        self.sequences = Sequences(slots, self.segments_per_sequence, self.length, layout)
        self.x_rows, self.experts = rows_of(self.x), experts_of(weights)
        self.hidden_dropout = dropout_of(seed, dropout, self.dtype)

    def in_sequence(self, x: Tensor) -> Tensor:
        """As (top_k, B, T, D), which has one sequence where P = 1, as `find_steps` wants."""
        x = by_choice(x)
        if self.segment_size > 1:
            return x
        # Of a view that repeats one choice's rows, a copy that strides may ask for is of these.
        once = x[:1] if x.stride(0) == 0 else x
        return once.flatten(1, 2)[:, None].expand(x.shape[0], 1, -1, -1)


def forward_fused(call: Call, out: Tensor) -> None:
    """Weighted outputs of every slot, hidden layer on chip: out is (top_k, B, T, D)."""
    tile = expert_ffn_fwd_tile(call.width, call.d_ff, call.dtype, **call.fused_in)
    grid = gemm_grid(call.num_rows, call.num_experts, 1, tile)
    expert_ffn_fwd_kernel[grid](
        call.x_rows,
        call.topk_weights,
        call.experts,
        out,
        call.slots,
        call.hidden_dropout,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        call.batch,
        **call.fused_constants,
        GROUPS=padded(call.num_experts + 1),
        BLOCK_M=tile.block_m,
        BLOCK_F=tile.block_n,
        BLOCK_D=tile.block_k,
        **tile.options(),
    )


def forward_two_products(
    call: Call, out: Tensor, pre: Tensor | None, gate_pre: Tensor | None
) -> None:
    """As `forward_fused`, for wide rows; pre and gate_pre keep what the activation saw."""
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    hidden, out = call.x.new_empty(call.num_rows, call.d_ff), by_choice(out)
    product(
        call.x,
        factor_of(up, up_bias, pre),
        hidden,
        call.num_rows,
        call.sequences,
        second=None if gate is None else factor_of(gate, gate_bias, gate_pre),
        dropout=call.hidden_dropout,
        activation=call.activation,
    )
    product(
        hidden,
        factor_of(down, down_bias),
        out,
        call.num_rows,
        call.sequences,
        row_weights=call.topk_weights,
    )


def launch_dx(
    call: Call,
    dy: Tensor,
    dx: Tensor | None,
    drow_weights: Tensor,
    kept: Kept | None,
) -> None:
    """Gradients of x, for each choice, of the routing weights, one share for each step, and kept.

    kept is from `new_kept`, for `launch_products_dw`, or None.
    """
    tile = expert_ffn_dx_tile(call.width, call.d_ff, call.dtype, **call.fused_in)
    grid = gemm_grid(call.num_rows, call.num_experts, 1, tile)
    expert_ffn_dx_kernel[grid](
        call.x_rows,
        rows_of(dy),
        call.topk_weights,
        call.experts,
        dx,
        drow_weights,
        kept or NO_KEPT,
        call.slots,
        call.hidden_dropout,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        call.batch,
        **call.fused_constants,
        GROUPS=padded(call.num_experts + 1),
        BLOCK_M=tile.block_m,
        BLOCK_F=tile.block_n,
        BLOCK_D=tile.block_k,
        **tile.options(),
    )


def launch_dw(call: Call, dy: Tensor, dweights: FFNWeights) -> None:
    """Weight gradients of experts of a width that is fused."""
    tile = expert_ffn_dw_tile(call.width, call.d_ff, call.dtype, **call.fused_in)
    columns = cdiv(call.d_ff, tile.block_n)
    splits = num_row_splits(call.num_rows, tile, columns)
    dup, ddown, dgate, dup_bias, dgate_bias, ddown_bias = dweights
    gradients = Gradients(dup, ddown, dgate, dup_bias, ddown_bias, dgate_bias)
    if any(bias is not None for bias in dweights[3:]):
        # The kernel writes the gradients of all biases or of none.
        room = [None if w is None else w.new_empty(w.shape[:2]) for w in gradients[:3]]
        found = [r if b is None else b for b, r in zip(gradients[3:], room, strict=True)]
        gradients = Gradients(*gradients[:3], *found)
    partials = new_partials(gradients, splits, call.num_experts, accumulator_dtype(call.dtype))
    expert_ffn_dw_kernel[(splits, columns)](
        call.x_rows,
        rows_of(dy),
        call.topk_weights,
        call.experts,
        gradients,
        partials,
        call.slots,
        call.hidden_dropout,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        splits,
        partials.shape[1],
        **call.fused_constants,
        GROUPS=padded(call.num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_F=tile.block_n,
        BLOCK_D=tile.block_k,
        **tile.options(),
    )
    offsets = call.slots.expert_offsets_ptr
    reduce_partials(partials, gradients, offsets, splits, call.rows_per_slot, tile.block_m)


def new_kept(call: Call) -> Kept:
    """Room for the hidden layer and the gradients of what the activation saw, (M, F) each."""
    hidden, dpre = (call.x.new_empty(call.num_rows, call.d_ff, dtype=call.dtype) for _ in range(2))
    return Kept(hidden, dpre, torch.empty_like(dpre) if call.gated else None)


def backward_two_products(
    call: Call,
    dy: Tensor,
    dx: Tensor | None,
    drow_weights: Tensor,
    dweights: FFNWeights | None,
    pre: Tensor,
    gate_pre: Tensor | None,
) -> None:
    """Gradients of wide rows, their routing weights and, where dweights is given, the weights."""
    up, down, gate, _, _, down_bias = call.weights
    hidden, dpre = torch.empty_like(pre), torch.empty_like(pre)
    kept = Kept(hidden, dpre, None if gate_pre is None else torch.empty_like(gate_pre))
    tile = _dhidden_tile(call)
    grid = gemm_grid(call.num_rows, call.num_experts, call.d_ff, tile)
    grouped_gemm_dhidden_kernel[grid](
        rows_of(dy),
        factor_of(down.transpose(1, 2)),
        down_bias,
        pre,
        gate_pre,
        call.topk_weights,
        kept,
        drow_weights,
        call.slots,
        call.hidden_dropout,
        call.num_slots,
        call.segments_per_sequence,
        call.length,
        call.num_experts,
        N=call.d_ff,
        K=call.width,
        LAYOUT=call.sequences.layout,
        ACTIVATION=call.activation,
        **call.numerics,
        GROUPS=padded(call.num_experts + 1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GEMM_GROUP_M,
        **tile.options(),
    )
    if dx is not None:
        product(
            dpre,
            factor_of(up.transpose(1, 2)),
            by_choice(dx),
            call.num_rows,
            call.sequences,
            a2=kept.dgate_ptr,
            second=None if gate is None else factor_of(gate.transpose(1, 2)),
        )
    if dweights is not None:
        launch_products_dw(call, dy, dweights, *kept)


def launch_products_dw(
    call: Call, dy: Tensor, dweights: FFNWeights, hidden: Tensor, dpre: Tensor, dgate: Tensor | None
) -> None:
    """Weight gradients as products: hidden holds the routing weights, as dpre and dgate do."""
    up, down, gate, up_bias, gate_bias, down_bias = dweights
    x, sequences = call.x, call.sequences
    if _pays_to_sort(call, dy):
        # A load whose address is itself loaded is not started early enough.
        token = call.slots.sorted_to_slot_ptr // call.top_k
        x, dy = (rows[0, 0].index_select(0, token) for rows in (x, dy))
        sequences = sorted_rows(call.slots.expert_offsets_ptr)
    products = [
        Product(dpre, x, up, up_bias),
        Product(dy, hidden, down, down_bias, call.topk_weights),
    ]
    if dgate is not None and gate is not None:
        products.append(Product(dgate, x, gate, gate_bias))
    weight_gradients(products, call.num_rows, sequences)


def _pays_to_sort(call: Call, dy: Tensor) -> bool:
    """Whether copies of x and dy in sorted order cost less than gathering them in each tile."""
    tokens = call.segment_size == 1 and call.slots.padding_mask_ptr is None
    wide = not call.fused and call.dtype.itemsize == 2 and call.weights[-1] is None
    return tokens and wide and all(t.shape[0] == 1 or t.stride(0) == 0 for t in (call.x, dy))


def _dhidden_tile(call: Call) -> Any:
    rows_per_expert = call.num_rows // call.num_experts
    return grouped_gemm_dhidden_tile(
        call.d_ff, call.width, rows_per_expert, call.x.dtype, **call.fused_in
    )


def column_tiles(call: Call) -> int:
    """Rows of drow_weights: one for each column tile that contributes to a routing weight."""
    return cdiv(call.d_ff, int(_dhidden_tile(call).block_n))


def rows_contiguous(weights: FFNWeights) -> FFNWeights:
    """Inner stride 1 for the matrices, biases contiguous; copies only what is not."""
    matrices = [w if w is None else within_reach(w) for w in weights[:3]]
    biases = [None if w is None else w.contiguous() for w in weights[3:]]
    return FFNWeights(*matrices, *biases)  # type: ignore[arg-type]  # up and down are never None
