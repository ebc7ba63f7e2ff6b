"""Stage 3', grouped_gemm: rows of expert e times the matrix of e; knows offsets, not MoE.

Data flow: ``x (M, K), weight (E, N, K) -> y (M, N)``. Backward: ``dx = dy @ weight[e]``, and
``dweight[e] = dy[rows of e].T @ x[rows of e]`` as partial sums over runs of rows, added up in a
fixed order. The launchers here serve `experts` too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.arguments import (
    NO_FACTOR,
    Dropout,
    Factor,
    Sequences,
    dropout_of,
    factor_of,
    rows_of,
    sorted_rows,
)
from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    define_operator,
    input_precision,
    padded,
    within_reach,
)
from segmoe_kernels._triton.partials import new_partials, reduce_partials
from segmoe_kernels._triton.tile_table import TileConfig
from segmoe_kernels._triton.tiles import (
    GEMM_DW_GROUP_M,
    GEMM_DW_WHOLE,
    GEMM_GROUP_M,
    grouped_gemm_dw_tile,
    grouped_gemm_tile,
    num_row_splits,
)
from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.autograd import apply
from segmoe_kernels.stages.grouped_gemm.kernels import grouped_gemm_dw_kernel, grouped_gemm_kernel


class Product(NamedTuple):
    """``a.T @ b`` of each expert's rows, which is the gradient of a weight.

    a and b are sorted, (M, N) and (M, K), or (top_k, B, T, D) gathered.
    """

    a: Tensor
    b: Tensor
    weight: Tensor  # (E, N, K) contiguous, every element is written
    bias: Tensor | None  # (E, N) contiguous, every element is written: sums of a
    row_weights: Tensor | None = None  # (R,) by slot: scales the rows of a in bias


def weight_gradients(products: Sequence[Product], num_rows: int, sequences: Sequences) -> None:
    """Write the weight gradients of one call, of matrices (N, K) and (K, N) of one size.

    Args:
        products: a launch for each; what their splits share is added up in one more.
        num_rows: M.
        sequences: where gathered rows live, and which rows an expert has.
    """
    outputs = [out for product in products for out in (product.weight, product.bias)]
    dtype = products[0].weight.dtype
    num_experts, n, k = products[0].weight.shape
    biased = any(product.bias is not None for product in products)
    gathered = sequences.slots.sorted_to_slot_ptr is not None
    tile = grouped_gemm_dw_tile(n, k, dtype, bias=biased, gathered=gathered)
    columns = cdiv(n, tile.block_n) * cdiv(k, tile.block_k)
    splits = num_row_splits(num_rows, tile, columns)
    # Many experts fill a GPU alone: one each, and nothing is left to add up. Whatever the batch is:
    # else a short last one would be compiled anew.
    whole = num_experts * columns >= GEMM_DW_WHOLE
    if whole:
        splits = num_experts
    partials = new_partials(outputs, 1 if whole else splits, num_experts, accumulator_dtype(dtype))
    check.check_programs("grouped_gemm", splits * columns)
    slots, layout = sequences.slots, sequences.layout
    first = 0
    for a, b, weight, bias, row_weights in products:
        blocks = tile.block_n, tile.block_k
        block_n, block_k = blocks if weight.shape[1:] == (n, k) else blocks[::-1]
        grouped_gemm_dw_kernel[(splits * columns,)](
            rows_of(a),
            rows_of(b),
            row_weights,
            weight,
            bias,
            partials[:, first:],
            slots,
            sequences.segments_per_sequence,
            sequences.length,
            num_experts,
            splits,
            partials.shape[1],
            N=weight.shape[1],
            K=weight.shape[2],
            LAYOUT=layout,
            WHOLE=whole,
            **_numerics(dtype),
            GROUPS=padded(num_experts),
            BLOCK_M=tile.block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=GEMM_DW_GROUP_M,
            **tile.options(),
        )
        first += n * k if bias is None else n * k + bias.shape[1]
    if not whole:
        offsets = slots.expert_offsets_ptr
        reduce_partials(partials, outputs, offsets, splits, layout.rows_per_slot, tile.block_m)


def _numerics(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": accumulator(dtype), "PRECISION": input_precision(dtype)}


def product(
    a: Tensor,
    first: Factor,
    y: Tensor,
    num_rows: int,
    sequences: Sequences,
    *,
    a2: Tensor | None = None,
    second: Factor | None = None,
    row_weights: Tensor | None = None,
    dropout: Dropout | None = None,
    activation: str = "none",
) -> None:
    """Launch `grouped_gemm_kernel`.

    Args:
        a: (M, K) sorted, or (top_k, B, T, D) gathered.
        first: its factor.
        y: (M, N) sorted, or (top_k, B, T, D) contiguous, to which rows are scattered.
        num_rows: M, slots without an expert included.
        sequences: where gathered and scattered rows live, and which rows an expert has.
        a2: see the kernel, as for all that follow.
        second: see the kernel.
        row_weights: see the kernel.
        dropout: see the kernel.
        activation: see the kernel.
    """
    dropout = dropout_of(None, 0.0, a.dtype) if dropout is None else dropout
    num_experts, n, k = first.ptr.shape
    tile = grouped_gemm_tile(
        n,
        k,
        num_rows // max(1, num_experts),
        a.dtype,
        gated=second is not None and a2 is None,
        activated=activation != "none",
        dropout=dropout.seed_ptr is not None,
    )
    grid = gemm_grid(num_rows, num_experts, n, tile)
    grouped_gemm_kernel[grid](
        rows_of(a),
        rows_of(a2),
        first,
        second or NO_FACTOR,
        row_weights,
        rows_of(y),
        sequences.slots,
        dropout,
        num_rows // sequences.layout.rows_per_slot,
        sequences.segments_per_sequence,
        sequences.length,
        num_experts,
        N=n,
        K=k,
        LAYOUT=sequences.layout,
        ACTIVATION=activation,
        **_numerics(a.dtype),
        GROUPS=padded(num_experts + 1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GEMM_GROUP_M,
        **tile.options(),
    )


def gemm_grid(num_rows: int, num_experts: int, n: int, tile: TileConfig) -> tuple[int]:
    """Tiles of rows, at most one of them partial for each expert, times tiles of columns."""
    row_tiles = cdiv(num_rows, tile.block_m) + num_experts
    # Kernels count rows in 32 bits, those of partial tiles included.
    check.check_programs("grouped_gemm", row_tiles * tile.block_m)
    programs = row_tiles * cdiv(n, tile.block_n)
    check.check_programs("grouped_gemm", programs)
    return (programs,)


def _grouped_gemm_fwd(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    y = _grouped_gemm_fwd_fake(x, weight, expert_offsets, bias, activation)
    if x.shape[0]:
        where = sorted_rows(expert_offsets)
        product(x, factor_of(weight, bias), y, x.shape[0], where, activation=activation)
    return y


def _grouped_gemm_fwd_fake(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,  # noqa: ARG001  schema
    bias: Tensor | None,  # noqa: ARG001
    activation: str,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _grouped_gemm_dw(
    dy: Tensor, x: Tensor, expert_offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    weight, bias = _grouped_gemm_dw_fake(dy, x, expert_offsets, has_bias)
    if x.shape[0]:
        out = bias if has_bias else None
        where = sorted_rows(expert_offsets)
        weight_gradients([Product(dy, x, weight, out)], x.shape[0], where)
    else:
        weight.zero_()
        bias.zero_()
    return weight, bias


def _grouped_gemm_dw_fake(
    dy: Tensor, x: Tensor, expert_offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    num_experts = expert_offsets.shape[0] - 1
    weight = x.new_empty(num_experts, dy.shape[1], x.shape[1])
    return weight, x.new_empty((num_experts, dy.shape[1]) if has_bias else (0,))


# Backward runs the forward's products too.
_grouped_gemm_fwd_op = define_operator(
    "grouped_gemm_fwd", _grouped_gemm_fwd, _grouped_gemm_fwd_fake, gradient=True
)
_grouped_gemm_dw_op = define_operator(
    "grouped_gemm_dw", _grouped_gemm_dw, _grouped_gemm_dw_fake, gradient=True
)


class _GroupedGemm(torch.autograd.Function):
    """Keeps x and the weight; what the activation's gradient needs is recomputed."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None, activation: str
    ) -> Tensor:
        y: Tensor = _grouped_gemm_fwd_op(x, weight, expert_offsets, bias, activation)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, expert_offsets, bias = ctx.saved_tensors
        (dy,) = grads
        need_dx, need_dweight, _, need_dbias, _ = ctx.needs_input_grad
        if ctx.activation != "none":
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                pre = _grouped_gemm_fwd_op(x, weight, expert_offsets, bias, "none")
                y = ACTIVATIONS[ctx.activation].function(pre)
            (dy,) = torch.autograd.grad(y, pre, dy, create_graph=create_graph)
        dy, dx, dweight, dbias = dy.contiguous(), None, None, None
        if need_dx:
            dx = _grouped_gemm_fwd_op(dy, weight.transpose(1, 2), expert_offsets, None, "none")
        if need_dweight or need_dbias:
            dweight, dbias = _grouped_gemm_dw_op(dy, x, expert_offsets, need_dbias)
        return dx, dweight if need_dweight else None, None, dbias if need_dbias else None, None


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Rows of expert e times its matrix; see `functional.grouped_gemm`."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    weight = within_reach(weight, rows=False)
    if bias is not None:
        bias = bias.contiguous()
    y: Tensor = apply(_GroupedGemm, x, weight, expert_offsets, bias, activation or "none")
    return y
