"""Stage 3', grouped_gemm: rows of expert e times the matrix of e; knows offsets, not MoE.

Data flow: ``x (M, K), weight (E, N, K) -> y (M, N)``. Backward: ``dx = dy @ weight[e]``, and
``dweight[e] = dy[rows of e].T @ x[rows of e]`` as partial sums over runs of rows, added up in a
fixed order. The launchers here serve `experts` too.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    define_operator,
    exact,
    input_precision,
    padded,
    refuse_double_backward,
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
from segmoe_kernels.composed_ffn import ACTIVATION_FUNCTIONS
from segmoe_kernels.stages.grouped_gemm_kernels import grouped_gemm_dw_kernel, grouped_gemm_kernel


def weight_gradient(
    a: Tensor,
    b: Tensor,
    expert_offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_rows: int,
    *,
    widths: tuple[int, int],
    gather: tuple[bool, bool] = (False, False),
    row_weights: Tensor | None = None,
    sequences: dict[str, Any] | None = None,
) -> None:
    """Write ``a.T @ b`` of each expert's rows to weight (E, N, K), and the sums of a to bias.

    Args:
        a: (M, N) sorted, or (top_k, B, T, D) where ``gather[0]``.
        b: (M, K) sorted, or (top_k, B, T, D) where ``gather[1]``.
        expert_offsets: (E + 1,) int32.
        weight: (E, N, K) contiguous, every element is written.
        bias: (E, N) contiguous or None, every element is written.
        num_rows: M.
        widths: (N, K).
        gather: which operands are gathered.
        row_weights: (R,) by slot, or None; scales the rows of a in bias.
        sequences: the keywords that say where gathered rows live; see `experts`.
    """
    where = sequences or NO_SEQUENCES
    n, k = widths
    num_experts = expert_offsets.shape[0] - 1
    tile = grouped_gemm_dw_tile(n, k, a.dtype, bias=bias is not None)
    columns = triton.cdiv(n, tile.block_n) * triton.cdiv(k, tile.block_k)
    splits = num_row_splits(num_rows, tile, columns)
    # Many experts fill a GPU alone: one each, and nothing is left to add up.
    whole = splits == 1 or num_experts * columns >= GEMM_DW_WHOLE
    if whole:
        splits = num_experts
    partials = new_partials(
        [weight, bias], 1 if whole else splits, num_experts, accumulator_dtype(a.dtype)
    )
    check.check_programs("grouped_gemm", splits * columns)
    grouped_gemm_dw_kernel[(splits * columns,)](
        a,
        b,
        row_weights,
        weight,
        bias,
        partials,
        where["sorted_to_slot"],
        expert_offsets,
        where["padding_mask"],
        where["segments_per_sequence"],
        where["length"],
        num_experts,
        splits,
        partials.shape[1],
        *_row_strides(a, gather=gather[0]),
        *_row_strides(b, gather=gather[1]),
        N=n,
        K=k,
        HAS_BIAS=bias is not None,
        WHOLE=whole,
        GATHER_A=gather[0],
        GATHER_B=gather[1],
        GROUPS=padded(num_experts),
        **where["constants"],
        **_numerics(a.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GEMM_DW_GROUP_M,
        **tile.options(),
    )
    if not whole:
        rows = where["constants"]["ROWS_PER_SLOT"]
        reduce_partials(partials, [weight, bias], expert_offsets, splits, rows, tile.block_m)


# Rows that live in a sorted matrix only.
NO_SEQUENCES: dict[str, Any] = {
    "sorted_to_slot": None,
    "padding_mask": None,
    "segments_per_sequence": 1,
    "length": 1,
    "constants": {
        "D": 1,
        "TOP_K": 1,
        "SEGMENT_SIZE": 1,
        "ROWS_PER_SLOT": 1,
        "CONCAT": False,
    },
}


def _numerics(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": accumulator(dtype), "PRECISION": input_precision(dtype)}


def _row_strides(x: Tensor, *, gather: bool) -> tuple[int, int, int]:
    """Strides of (top_k, B, T, D), or of (M, K) with the row's in the place of the step's."""
    return (x.stride(0), x.stride(1), x.stride(2)) if gather else (0, 0, x.stride(0))


def product(
    a: Tensor,
    b: Tensor,
    y: Tensor,
    expert_offsets: Tensor,
    num_rows: int,
    *,
    widths: tuple[int, int],
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    bias: Tensor | None = None,
    bias2: Tensor | None = None,
    row_weights: Tensor | None = None,
    pre: Tensor | None = None,
    pre2: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    activation: str = "none",
    gather: bool = False,
    scatter: bool = False,
    sequences: dict[str, Any] | None = None,
) -> None:
    """Launch `grouped_gemm_kernel`; the arguments are its own.

    Args:
        a: (M, K) sorted, or (top_k, B, T, D) where ``gather``.
        b: (E, N, K) by strides.
        y: (M, N) sorted, or (top_k, B, T, D) contiguous where ``scatter``.
        expert_offsets: (E + 1,) int32.
        num_rows: M, slots without an expert included.
        widths: (N, K).
        a2: see the kernel, as for all that follow.
        b2: see the kernel.
        bias: see the kernel.
        bias2: see the kernel.
        row_weights: see the kernel.
        pre: see the kernel.
        pre2: see the kernel.
        seed: see the kernel.
        dropout: see the kernel.
        activation: see the kernel.
        gather: a is gathered from the sequences.
        scatter: y is scattered to the sequences.
        sequences: the keywords that say where gathered and scattered rows live.
    """
    where = sequences or NO_SEQUENCES
    n, k = widths
    num_experts = expert_offsets.shape[0] - 1
    rows_per_slot = where["constants"]["ROWS_PER_SLOT"]
    tile = grouped_gemm_tile(
        n,
        k,
        num_rows // max(1, num_experts),
        a.dtype,
        gated=b2 is not None and a2 is None,
        activated=activation != "none",
        dropout=seed is not None,
    )
    grid = gemm_grid(num_rows, num_experts, n, tile)
    grouped_gemm_kernel[grid](
        a,
        a2,
        b,
        b2,
        bias,
        bias2,
        row_weights,
        y,
        pre,
        pre2,
        where["sorted_to_slot"],
        expert_offsets,
        where["padding_mask"],
        seed,
        num_rows // rows_per_slot,
        where["segments_per_sequence"],
        where["length"],
        num_experts,
        *_row_strides(a, gather=gather),
        *b.stride(),
        *((0, 0, 0) if b2 is None else b2.stride()),
        y.stride(0) if scatter else 0,
        exact(dropout, a.dtype),
        N=n,
        K=k,
        GATHER=gather,
        SCATTER=scatter,
        ACTIVATION=activation,
        **where["constants"],
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
    row_tiles = triton.cdiv(num_rows, tile.block_m) + num_experts
    # Kernels count rows in 32 bits, those of partial tiles included.
    check.check_programs("grouped_gemm", row_tiles * tile.block_m)
    programs = row_tiles * triton.cdiv(n, tile.block_n)
    check.check_programs("grouped_gemm", programs)
    return (programs,)


def _grouped_gemm_fwd(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    y = _grouped_gemm_fwd_fake(x, weight, expert_offsets, bias, activation)
    if x.shape[0]:
        product(
            x,
            weight,
            y,
            expert_offsets,
            x.shape[0],
            widths=(weight.shape[1], weight.shape[2]),
            bias=bias,
            activation=activation,
        )
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
        widths = (dy.shape[1], x.shape[1])
        out = bias if has_bias else None
        weight_gradient(dy, x, expert_offsets, weight, out, x.shape[0], widths=widths)
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


_grouped_gemm_fwd_op = define_operator(
    "grouped_gemm_fwd(Tensor x, Tensor weight, Tensor expert_offsets, Tensor? bias, "
    "str activation) -> Tensor",
    _grouped_gemm_fwd,
    _grouped_gemm_fwd_fake,
)
_grouped_gemm_dw_op = define_operator(
    "grouped_gemm_dw(Tensor dy, Tensor x, Tensor expert_offsets, bool has_bias) "
    "-> (Tensor, Tensor)",
    _grouped_gemm_dw,
    _grouped_gemm_dw_fake,
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
        wanted = tuple(ctx.needs_input_grad[i] for i in (0, 1, 3))
        dx, dweight, dbias = _GroupedGemmBackward.apply(
            grads[0].contiguous(), *ctx.saved_tensors, ctx.activation, wanted
        )
        return dx, dweight, None, dbias, None


class _GroupedGemmBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that a second derivative is refused loudly."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        expert_offsets: Tensor,
        bias: Tensor | None,
        activation: str,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        if activation != "none":
            pre = _grouped_gemm_fwd_op(x, weight, expert_offsets, bias, "none")
            with torch.enable_grad():
                pre.requires_grad_()
                y = ACTIVATION_FUNCTIONS[activation](pre)
                (dy,) = torch.autograd.grad(y, pre, dy)
        dx = dweight = dbias = None
        if wanted[0]:
            dx = _grouped_gemm_fwd_op(dy, weight.transpose(1, 2), expert_offsets, None, "none")
        if wanted[1] or wanted[2]:
            has_bias = wanted[2]
            dweight, dbias = _grouped_gemm_dw_op(dy, x, expert_offsets, has_bias)
            dbias = dbias if has_bias else None
        return dx, dweight if wanted[1] else None, dbias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        refuse_double_backward()


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
    y: Tensor = _GroupedGemm.apply(x, weight, expert_offsets, bias, activation or "none")
    return y
