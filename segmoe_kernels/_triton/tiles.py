"""Tile sizes, warps and stages for every kernel: one deterministic choice from `tile_table`.

It depends on widths, the number of experts, the dtype, what is fused in and the architecture, never
on the number of rows, so that nothing is compiled anew; two kernels take it in buckets. A row's
result depends on tiles by rounding alone. Whoever wants other tiles on his GPU names them in a
file: `tuned`.
"""

import torch

from segmoe_kernels._triton.tile_table import (
    FUSED_TILES,
    GEMM_LIKE,
    GEMM_TILES,
    SMALLEST,
    TILES_OF,
    TileConfig,
    architecture,
    kind_of,
    power,
)
from segmoe_kernels._triton.tuned import FUSED, PRODUCT, read_tiles, replaceable
from segmoe_kernels.options import settings


def describe_source() -> str:
    """Say whose tiles the kernels take, as one line.

    Raises:
        ValueError: if SEGMOE_ARCH or SEGMOE_TILES is wrong.
    """
    path, arch = settings().tiles, architecture()
    if not path:
        return f"the table's for {arch}"
    count = len(read_tiles(path).get(arch, {}))
    return f"the table's for {arch}, but {count} of its answers from {path}"


# The router goes as many at a time, 32 of more than 64 experts, or a part of them.
SEGMENTS_AT_ONCE = 64


def segments_per_block(num_segments: int, num_experts: int) -> int:
    """Segments whose histogram is one, a program's of the router and of `permute`.

    There are at most 1,024 histograms: each program of `permute` sums up all of them.
    """
    at_once = SEGMENTS_AT_ONCE if num_experts <= 64 else 32
    return at_once * (1 + num_segments // (1024 * at_once))


@replaceable(*FUSED[1:])
def route_fwd_tile(d_model: int, num_experts: int, dtype: torch.dtype) -> TileConfig:
    """block_m segments (they divide SEGMENTS_AT_ONCE) and block_n columns of x at a time."""
    # Every expert's logit, probability and rank stay in registers.
    if num_experts > 256:
        return TileConfig(16, power(d_model, 16, 32), 0, 8, 1)
    if dtype.itemsize > 2:
        return TileConfig(32, power(d_model, 16, 64), 0, 8, 2, 255)
    if num_experts > 64:
        return TileConfig(32, power(d_model, 16, 128), 0, 8, 2)
    return TileConfig(64, power(d_model, 16, 128), 0, 4, 2)


@replaceable(*FUSED[1:])
def route_bwd_tile(d_model: int, num_experts: int, dtype: torch.dtype) -> TileConfig:
    """block_m segments and block_n columns."""
    # 128 columns spill 36 bytes at 4 warps.
    most = 16 if num_experts > 256 else 32 if num_experts > 64 else 64
    warps = 8 if num_experts > 128 or dtype.itemsize > 2 else 4
    return TileConfig(32, power(d_model, 16, most), 0, warps, 2)


# A row of at most this many columns stays on chip through the whole FFN.
MAX_FUSED_WIDTH = 256

# Up to here one kernel makes weight gradients, except in float32. Else it would compute the hidden
# layer for few columns at a time: backward writes it once, and weight gradients are products.
# Modelled us of a backward, P = 5, F = 2 D, by one kernel and by products, 1e4, 1e5 and 1e6 rows:
# D = 64, E = 4 29, 78, 616 and 32, 86, 615; D = 128, E = 8 49, 193, 1,697 and 51, 155, 1,267; of
# the experts alone in float32, 1e5 rows: D = 64 1,214 and 660, D = 128 5,406 and 2,918.
MAX_FUSED_DW_WIDTH = 64

# Multiprocessors of the largest GPU at hand (H100, H200); a constant, so that sums don't depend on
# the device.
NUM_SMS = 132


def _fused_tile(
    operation: str, d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """Look up the table for rows of a padded width."""
    width, kind = power(d_model, 16, MAX_FUSED_WIDTH), kind_of(dtype)
    tile = SMALLEST
    if kind != "fp64":
        family = TILES_OF[architecture()]
        key = (operation, kind, family)
        widths = FUSED_TILES[key if key in FUSED_TILES else (operation, kind, "any")]
        tile = widths[max(width, min(widths))][2 * gated + extras]
    block_m, chunk, *others = tile
    return TileConfig(block_m, power(d_ff, 16, chunk), width, *others)


@replaceable(*FUSED)
def expert_ffn_fwd_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """block_m rows, block_n columns of d_ff at a time, block_k the padded width."""
    return _fused_tile("expert_ffn_fwd", d_model, d_ff, dtype, gated=gated, extras=extras)


@replaceable(*FUSED)
def expert_ffn_dx_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """As the forward's."""
    return _fused_tile("expert_ffn_dx", d_model, d_ff, dtype, gated=gated, extras=extras)


@replaceable(*FUSED)
def expert_ffn_dw_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """As the forward's; block_n columns of d_ff make a program's share."""
    return _fused_tile("expert_ffn_dw", d_model, d_ff, dtype, gated=gated, extras=extras)


def _gemm_tile(
    operation: str, n: int, k: int, rows_per_expert: int, dtype: torch.dtype
) -> TileConfig:
    kind, family = kind_of(dtype), TILES_OF[architecture()]
    found = None
    while found is None:
        found = GEMM_TILES.get((operation, kind, family)) or GEMM_TILES.get(
            (operation, kind, "any")
        )
        operation = GEMM_LIKE.get(operation, operation)
    tile = found[power(rows_per_expert, 16, 128)]
    block_n = tile.block_n
    if block_n > 128 and -(-n // block_n) * block_n > 1.1 * n:
        block_n = 128
    return tile._replace(block_n=power(n, 16, block_n), block_k=power(k, 16, tile.block_k))


@replaceable(*PRODUCT)
def grouped_gemm_tile(
    n: int,
    k: int,
    rows_per_expert: int,
    dtype: torch.dtype,
    *,
    gated: bool,
    activated: bool,
    dropout: bool,
) -> TileConfig:
    """block_m follows the rows that an expert can expect, bucketed to four sizes.

    Args:
        n: columns of the product.
        k: contraction.
        rows_per_expert: on average.
        dtype: of the operands.
        gated: two products side by side.
        activated: an activation.
        dropout: behind the activation.

    Returns:
        TileConfig.
    """
    operation = "activated with dropout" if dropout else "activated" if activated else "product"
    if gated:
        operation = "gated"
    return _gemm_tile(operation, n, k, rows_per_expert, dtype)


@replaceable(*PRODUCT)
def grouped_gemm_dhidden_tile(
    n: int, k: int, rows_per_expert: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """As `grouped_gemm_tile`, for the gradient of the hidden layer."""
    operation = "dhidden with extras" if gated and extras else "dhidden"
    return _gemm_tile(operation, n, k, rows_per_expert, dtype)


# Tiles of rows, and tiles of weight columns, that the programs of one group share in L2.
GEMM_GROUP_M = 8
GEMM_DW_GROUP_M = 4

# With so many programs, four waves, a weight gradient's splits are whole experts.
GEMM_DW_WHOLE = 4 * NUM_SMS


@replaceable(*PRODUCT)
def grouped_gemm_dw_tile(
    n: int, k: int, dtype: torch.dtype, *, bias: bool, gathered: bool
) -> TileConfig:
    """block_m rows at a time into block_n x block_k sums."""
    if dtype == torch.float64:
        return TileConfig(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return TileConfig(16 if bias else 32, power(n, 16, 64), power(k, 16, 64), 8, 2, 128)
    # Two programs of 4 warps fit a multiprocessor; with a bias they spill.
    warps = 4 if architecture() == "sm_90" and not bias else 8
    # Of 32 rows whose addresses wait for nothing three fit: 490 -> 398 us at qwen3-8k, modelled.
    rows = 64 if gathered or warps == 8 else 32
    return TileConfig(rows, power(n, 16, 128), power(k, 16, 128), warps, 3)


def num_row_splits(num_rows: int, tile: TileConfig, column_programs: int) -> int:
    """Into how many runs of rows a weight gradient is split.

    As many as fill a GPU in one wave together with the programs over columns, but at least two
    tiles each, since the splits that share an expert write and read its gradient in float32.
    """
    wanted = NUM_SMS * tile.programs_at_once() // column_programs
    return int(max(1, min(wanted, num_rows // (2 * tile.block_m))))
