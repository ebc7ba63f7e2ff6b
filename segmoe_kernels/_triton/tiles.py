"""Tile sizes, warps and stages for every kernel: one deterministic table.

The choice depends on widths, the number of experts, the dtype, what is fused in and the
architecture, never on the number of rows (two kernels take it in buckets), so that results don't
change with the batch and nothing is compiled anew. A row's result depends on no tile. Register and
spill counts behind the choices: ``python -m benchmarks.codegen``.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton

from segmoe_kernels import validation as check


class TileConfig(NamedTuple):
    """What one program works on, and with how many warps.

    Attributes:
        block_m: rows (steps or segments).
        block_n: output columns, or the chunk of d_ff.
        block_k: contraction, or the padded width.
        num_warps: warps in a program.
        num_stages: software-pipelining depth.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# What an architecture's tiles are: its own, or those of another. sm_120 stands for all that have
# 99 KiB of shared memory (sm_86, sm_89, sm_120); no tile of sm_80 takes more.
TILES_OF = {
    "sm_80": "sm_80",
    "sm_90": "sm_90",
    "sm_100": "sm_90",
    "sm_120": "sm_80",
    "gfx942": "gfx942",
}


@functools.cache
def _architecture_of(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8 and minor not in {0, 7}:
        return "sm_120"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, "sm_80")


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available() and not triton.knobs.runtime.interpret


def architecture() -> str:
    """Say whose tiles the current GPU takes, a key of `TILES_OF`; "sm_90" without a GPU.

    The environment variable SEGMOE_ARCH overrides.
    """
    wanted = os.environ.get("SEGMOE_ARCH")
    if wanted is not None:
        check.check_choice("architecture", "SEGMOE_ARCH", wanted, tuple(TILES_OF))
        return wanted
    return _architecture_of(torch.cuda.current_device()) if _has_gpu() else "sm_90"


def _power(size: int, least: int, most: int) -> int:
    return int(min(most, max(least, triton.next_power_of_2(size))))


def _kind(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32"}.get(dtype, "16-bit")


def route_fwd_tile(d_model: int, num_experts: int, dtype: torch.dtype) -> TileConfig:
    """block_n columns of x at a time; block_m is fixed by `permute`'s histogram."""
    wide = dtype in {torch.float32, torch.float64}
    most = 64 if wide else 128
    return TileConfig(32, _power(d_model, 16, most), 0, 4 if num_experts <= 64 else 8, 2)


def route_bwd_tile(d_model: int, num_experts: int) -> TileConfig:
    """block_m segments and block_n columns."""
    # 128 columns spill 36 bytes at 4 warps.
    most = 32 if num_experts > 64 else 64
    return TileConfig(32, _power(d_model, 16, most), 0, 4 if num_experts <= 64 else 8, 2)


# A row of at most this many columns stays on chip through the whole FFN.
MAX_FUSED_WIDTH = 256

# Multiprocessors of the largest GPU at hand (H100, H200); a constant, so that sums don't depend on
# the device.
_NUM_SMS = 132

_Tile = tuple[int, int, int, int]  # rows, columns of d_ff at a time, warps, stages

# The fused kernels: (operation, kind of dtype, architecture or "any") -> padded width -> tiles of
# plain experts, plain ones with extras, gated ones, gated ones with extras. Extras are biases, a
# padding mask and dropout, which take registers. None: no tile of that size fits. Narrower rows
# take the tiles of the narrowest that is listed.
_TABLE: dict[tuple[str, str, str], dict[int, tuple[_Tile | None, ...]]] = {
    ("block_fwd 128", "16-bit", "sm_90"): {
        64: ((128, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: ((128, 32, 8, 1), (128, 16, 8, 1), (128, 32, 8, 1), None),
    },
    ("block_fwd 64", "16-bit", "sm_90"): {
        64: ((64, 128, 4, 2), (64, 128, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        256: ((64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1), None),
    },
    ("block_fwd 32", "16-bit", "sm_90"): {
        64: ((32, 128, 4, 2), (32, 128, 4, 2), (32, 128, 4, 2), (32, 64, 4, 2)),
        128: (None, None, None, None),
        256: (None, None, None, (32, 32, 8, 1)),
    },
    ("block_fwd 128", "16-bit", "sm_80"): {
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        256: (None, None, None, None),
    },
    ("block_fwd 64", "16-bit", "sm_80"): {
        64: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 1), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), None),
    },
    ("block_fwd 32", "16-bit", "sm_80"): {
        64: ((32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1)),
        128: (None, None, None, None),
        256: (None, None, None, (32, 32, 8, 2)),
    },
    ("block_fwd 32", "fp32", "any"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        256: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 16, 1), (32, 16, 8, 1)),
    },
    ("block_dx", "16-bit", "sm_90"): {
        64: ((128, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
        128: ((128, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
        256: ((64, 32, 4, 1), (64, 16, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1)),
    },
    ("block_dx", "16-bit", "sm_80"): {
        64: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        128: ((32, 32, 4, 1), (32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    },
    ("block_dx", "fp32", "any"): {
        64: ((64, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("expert_ffn_fwd", "16-bit", "sm_90"): {
        64: ((128, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        256: ((128, 32, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1), (128, 16, 8, 1)),
    },
    ("expert_ffn_fwd", "16-bit", "sm_80"): {
        64: ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        256: ((128, 16, 8, 1), (64, 16, 8, 2), (64, 16, 8, 2), (32, 32, 8, 2)),
    },
    ("expert_ffn_fwd", "16-bit", "gfx942"): {
        64: ((64, 128, 4, 1), (64, 128, 4, 1), (64, 128, 4, 1), (64, 128, 4, 1)),
        128: ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        256: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    },
    ("expert_ffn_fwd", "fp32", "any"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        256: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    },
    ("expert_ffn_dx", "16-bit", "sm_90"): {
        64: ((128, 64, 8, 1), (128, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 1)),
        128: ((128, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
        256: ((64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    },
    ("expert_ffn_dx", "16-bit", "sm_80"): {
        64: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        128: ((64, 32, 8, 1), (32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
        256: ((32, 16, 8, 1), (16, 32, 8, 1), (64, 16, 8, 1), (16, 32, 8, 1)),
    },
    ("expert_ffn_dx", "16-bit", "gfx942"): {
        64: ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        128: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        256: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1)),
    },
    ("expert_ffn_dx", "fp32", "any"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("expert_ffn_dw", "16-bit", "sm_90"): {
        64: ((64, 64, 4, 1), (128, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 1)),
        128: ((64, 64, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
        256: ((64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1), (64, 16, 8, 1)),
    },
    ("expert_ffn_dw", "16-bit", "sm_80"): {
        64: ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
        128: ((64, 32, 8, 1), (32, 32, 8, 1), (64, 32, 8, 1), (32, 16, 8, 1)),
        256: ((32, 32, 8, 1), (32, 16, 8, 1), (64, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("expert_ffn_dw", "16-bit", "gfx942"): {
        64: ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        128: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1)),
        256: ((64, 16, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    },
    ("expert_ffn_dw", "fp32", "any"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}
# Float64 is for checks.
_SMALLEST: _Tile = (16, 16, 4, 1)


def _find(
    operation: str, width: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig | None:
    """Look up the table for rows of a padded width."""
    kind = _kind(dtype)
    tile: _Tile | None = None
    if kind == "fp64":
        tile = _SMALLEST
    else:
        family = TILES_OF[architecture()]
        widths = _TABLE.get((operation, kind, family)) or _TABLE.get((operation, kind, "any"))
        if widths is not None:
            tile = widths[max(width, min(widths))][2 * gated + extras]
    if tile is None:
        return None
    block_m, chunk, num_warps, num_stages = tile
    return TileConfig(block_m, _power(d_ff, 16, chunk), width, num_warps, num_stages)


def _fused_tile(
    operation: str, d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    width = _power(d_model, 16, MAX_FUSED_WIDTH)
    tile = _find(operation, width, d_ff, dtype, gated=gated, extras=extras)
    assert tile is not None, operation
    return tile


def expert_ffn_fwd_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """block_m rows, block_n columns of d_ff at a time, block_k the padded width."""
    return _fused_tile("expert_ffn_fwd", d_model, d_ff, dtype, gated=gated, extras=extras)


def expert_ffn_dx_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """As the forward's."""
    return _fused_tile("expert_ffn_dx", d_model, d_ff, dtype, gated=gated, extras=extras)


def expert_ffn_dw_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """As the forward's; block_n columns of d_ff make a program's share."""
    return _fused_tile("expert_ffn_dw", d_model, d_ff, dtype, gated=gated, extras=extras)


def block_dx_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """As the forward's of the experts; block_m rows hold whole segments."""
    return _fused_tile("block_dx", d_model, d_ff, dtype, gated=gated, extras=extras)


def block_bwd_tile(
    d_model: int, d_ff: int, dtype: torch.dtype, *, gated: bool, extras: bool, dropout: bool
) -> TileConfig | None:
    """Tile of the one-pass backward; None where the sums of its weights don't fit registers."""
    width, hidden = _power(d_model, 16, MAX_FUSED_WIDTH), _power(d_ff, 16, 1024)
    if _kind(dtype) == "fp64":
        return TileConfig(16, hidden, width, 4, 1) if width * hidden <= 16 * 32 else None
    # Dropout spills, and float32 without tensor cores and gated experts do at any tile.
    if _kind(dtype) == "fp32" or gated or dropout or width > 64 or hidden > 128:
        return None
    return TileConfig(16 if extras else 32, hidden, width, 8, 1)


class BlockTile(NamedTuple):
    """How plan "block" cuts its work.

    Attributes:
        segments: consecutive segments of one program.
        groups: programs over the same segments, each with its share of the experts.
        block_m: rows (steps) at a time.
        block_f: hidden columns at a time.
        block_d: padded width.
        num_warps: warps in a program.
        num_stages: software-pipelining depth.
    """

    segments: int
    groups: int
    block_m: int
    block_f: int
    block_d: int
    num_warps: int
    num_stages: int


# Rows at a time in plan "block", largest first.
BLOCK_ROWS = (128, 64, 32, 16)


def block_fwd_tile(
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int,
    segment_size: int,
    num_segments: int,
    dtype: torch.dtype,
    *,
    gated: bool,
    extras: bool,
) -> BlockTile:
    """Enough segments that each expert fills its tiles, few enough that the programs fill a GPU.

    Rows of one program and expert come in tiles, the last of them partly empty: with twice block_m
    rows a quarter of the work is wasted at worst. Few segments are spread over more programs by
    splitting the experts into groups; with several choices, whose outputs are added in place, they
    can't be. A row's result depends on none of this, so the row count may decide.
    """
    width = _power(d_model, 16, MAX_FUSED_WIDTH)
    # Adding to y takes registers where the rows are wide.
    extras = extras or (top_k > 1 and width > 128)
    tiles = {}
    for rows in BLOCK_ROWS:
        tile = _find(f"block_fwd {rows}", width, d_ff, dtype, gated=gated, extras=extras)
        if tile is not None and tile.block_m == rows:
            tiles[rows] = tile
    most = max(tiles)

    def rows_per_expert(segments: int) -> int:
        return segments * top_k * segment_size // num_experts

    # Every tile reads its expert's weights: wide ones need many rows to make up for it. More
    # segments where more are left for each program.
    worthwhile = min(32 if width <= 64 else 64, most)
    least = triton.cdiv(2 * worthwhile * num_experts, top_k * segment_size)
    # Two programs fit a multiprocessor.
    segments = max(least, min(num_segments // (2 * _NUM_SMS), triton.cdiv(4096, segment_size)))
    segments = int(triton.cdiv(segments, 32) * 32)
    block_m = most
    while block_m > min(tiles) and 2 * block_m > rows_per_expert(segments):
        block_m //= 2
    blocks = triton.cdiv(num_segments, segments)
    groups = 1
    if top_k == 1:
        # Every group routes anew: 32 * D FLOPs a row, an eighth of the experts' at most.
        groups = max(1, min(num_experts, 4, d_ff // 64, 2 * _NUM_SMS // max(1, blocks)))
    tile = tiles[block_m]
    return BlockTile(
        segments, int(groups), block_m, tile.block_n, width, tile.num_warps, tile.num_stages
    )


def block_router_tile(d_model: int, segments: int, dtype: torch.dtype) -> tuple[int, int]:
    """Segments and columns of x at a time in the routing phase of plan "block"."""
    wide = dtype in {torch.float32, torch.float64}
    return 64 if segments % 64 == 0 and not wide else 32, _power(d_model, 16, 16 if wide else 64)


# The grouped products: (operation, kind of dtype, architecture or "any") -> experts with so many
# rows, rounded up to a power of two between 16 and 128 -> tile. "product" is one sum that is stored
# as it is, "activated" one with an epilogue or two products in it, "gated" two sums.
_GEMMS: dict[tuple[str, str, str], dict[int, TileConfig]] = {
    ("product", "16-bit", "sm_90"): {
        128: TileConfig(128, 256, 64, 8, 3),
        64: TileConfig(64, 128, 64, 4, 3),
        32: TileConfig(32, 128, 64, 4, 3),
        16: TileConfig(16, 128, 64, 4, 3),
    },
    ("activated", "16-bit", "sm_90"): {
        128: TileConfig(128, 128, 64, 8, 3),
        64: TileConfig(64, 128, 64, 4, 3),
        32: TileConfig(32, 128, 64, 4, 3),
        16: TileConfig(16, 128, 64, 4, 3),
    },
    ("gated", "16-bit", "sm_90"): {
        128: TileConfig(128, 64, 64, 8, 3),
        64: TileConfig(64, 64, 64, 4, 3),
        32: TileConfig(32, 64, 64, 4, 3),
        16: TileConfig(16, 64, 64, 4, 3),
    },
    ("dhidden", "16-bit", "sm_90"): {
        128: TileConfig(128, 64, 64, 8, 3),
        64: TileConfig(64, 64, 64, 4, 3),
        32: TileConfig(32, 64, 64, 4, 3),
        16: TileConfig(16, 64, 64, 4, 3),
    },
    ("dhidden with extras", "16-bit", "sm_90"): {
        128: TileConfig(128, 32, 64, 8, 3),
        64: TileConfig(64, 32, 64, 4, 3),
        32: TileConfig(32, 64, 64, 4, 3),
        16: TileConfig(16, 64, 64, 4, 3),
    },
    ("product", "16-bit", "any"): {
        128: TileConfig(128, 128, 32, 8, 3),
        64: TileConfig(64, 64, 32, 8, 3),
        32: TileConfig(32, 64, 32, 4, 3),
        16: TileConfig(16, 64, 32, 4, 3),
    },
    ("gated", "16-bit", "any"): {
        128: TileConfig(128, 64, 32, 8, 3),
        64: TileConfig(64, 64, 32, 4, 3),
        32: TileConfig(32, 64, 32, 4, 3),
        16: TileConfig(16, 64, 32, 4, 3),
    },
    ("dhidden", "16-bit", "any"): {
        128: TileConfig(64, 64, 32, 8, 3),
        64: TileConfig(64, 64, 32, 8, 3),
        32: TileConfig(32, 64, 32, 4, 3),
        16: TileConfig(16, 64, 32, 4, 3),
    },
    ("product", "fp32", "any"): {
        128: TileConfig(64, 64, 32, 8, 2),
        64: TileConfig(64, 64, 32, 8, 2),
        32: TileConfig(32, 64, 32, 8, 2),
        16: TileConfig(32, 64, 32, 8, 2),
    },
    ("product", "fp64", "any"): dict.fromkeys((128, 64, 32, 16), TileConfig(16, 16, 16, 4, 1)),
}
# What an operation without tiles of its own takes.
_LIKE = {"activated": "product", "gated": "product", "dhidden": "product"}
_LIKE["dhidden with extras"] = "dhidden"


def _gemm_tile(
    operation: str, n: int, k: int, rows_per_expert: int, dtype: torch.dtype
) -> TileConfig:
    kind, family = _kind(dtype), TILES_OF[architecture()]
    found = None
    while found is None:
        found = _GEMMS.get((operation, kind, family)) or _GEMMS.get((operation, kind, "any"))
        operation = _LIKE.get(operation, operation)
    tile = found[_power(rows_per_expert, 16, 128)]
    block_n = tile.block_n
    if block_n > 128 and triton.cdiv(n, block_n) * block_n > 1.1 * n:
        block_n = 128
    return tile._replace(block_n=_power(n, 16, block_n), block_k=_power(k, 16, tile.block_k))


def grouped_gemm_tile(
    n: int, k: int, rows_per_expert: int, dtype: torch.dtype, *, gated: bool, activated: bool
) -> TileConfig:
    """block_m follows the rows that an expert can expect, bucketed to four sizes.

    Args:
        n: columns of the product.
        k: contraction.
        rows_per_expert: on average.
        dtype: of the operands.
        gated: two products side by side.
        activated: an activation, or a second product into the same sum.

    Returns:
        TileConfig.
    """
    operation = "gated" if gated else "activated" if activated else "product"
    return _gemm_tile(operation, n, k, rows_per_expert, dtype)


def grouped_gemm_dhidden_tile(
    n: int, k: int, rows_per_expert: int, dtype: torch.dtype, *, gated: bool, extras: bool
) -> TileConfig:
    """As `grouped_gemm_tile`, for the gradient of the hidden layer."""
    operation = "dhidden with extras" if gated and extras else "dhidden"
    return _gemm_tile(operation, n, k, rows_per_expert, dtype)


# Tiles of rows, and tiles of weight columns, that the programs of one group share in L2.
GEMM_GROUP_M = 8
GEMM_DW_GROUP_M = 4


def grouped_gemm_dw_tile(n: int, k: int, dtype: torch.dtype, *, bias: bool) -> TileConfig:
    """block_m rows at a time into block_n x block_k sums."""
    if dtype == torch.float64:
        return TileConfig(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return TileConfig(16 if bias else 32, _power(n, 16, 64), _power(k, 16, 64), 8, 2)
    wide = TILES_OF[architecture()] == "sm_90" and triton.cdiv(k, 256) * 256 <= 1.1 * k
    return TileConfig(64, _power(n, 16, 128), _power(k, 16, 256 if wide else 128), 8, 3)


def num_row_splits(num_rows: int, block_m: int, column_programs: int) -> int:
    """Into how many runs of rows a weight gradient is split.

    Enough to fill a GPU together with the programs over columns, but at least 16 tiles of rows
    each, since every split writes and reads a whole gradient in float32.
    """
    wanted = triton.cdiv(_NUM_SMS, column_programs)
    return int(max(1, min(wanted, num_rows // (16 * block_m))))


# Tiles of rows that the programs of one group share in L2.
SHARED_GROUP_M = 8

# Programs that run at once on the largest GPU at hand (132 SMs), two on an SM; a constant, so that
# sums don't depend on the device.
_SHARED_PROGRAMS = 264


def shared_gemm_tile(n: int, k: int, dtype: torch.dtype, *, accumulators: int = 1) -> TileConfig:
    """The shared expert's dense products: block_m segments, block_n columns.

    Args:
        n: columns of the product.
        k: contraction.
        dtype: of the operands.
        accumulators: 1 for a light epilogue. 2 for the activation: at 128 columns it fits in the
            registers of two programs on one SM of sm_90, so that one computes its activation, which
            takes as long as its products, while the other multiplies. 4 for two products (gated).

    Returns:
        TileConfig.
    """
    if dtype == torch.float64:
        return TileConfig(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return TileConfig(64, _power(n, 16, 64), 16, 8, 2)
    block_n = 64
    # The widest block that wastes little on the last, partial one.
    for wide, waste in ((256, 1.1), (128, 1.25)):
        if wide * accumulators <= 256 and triton.cdiv(n, wide) * wide <= waste * n:
            block_n = wide
            break
    return TileConfig(128, _power(n, 16, block_n), _power(k, 16, 64), 8, 3)


def shared_gemm_dw_tile(width: int, hidden: int, dtype: torch.dtype, *, masked: bool) -> TileConfig:
    """block_m segments at a time into block_n (of the width) x block_k (of the hidden) sums."""
    if dtype == torch.float64:
        return TileConfig(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return TileConfig(16, _power(width, 16, 64), _power(hidden, 16, 64), 8, 2)
    # With the mask's flags, 64 rows spill on sm_80.
    block_m, stages = (32, 4) if masked else (64, 3)
    return TileConfig(block_m, _power(width, 16, 128), _power(hidden, 16, 128), 8, stages)


def num_shared_splits(num_rows: int, block_m: int, column_programs: int) -> int:
    """Into how many runs of rows a weight gradient of the shared expert is split.

    As many as run at once: one more would double the time. At least 16 tiles of rows each.
    """
    return int(max(1, min(_SHARED_PROGRAMS // column_programs, num_rows // (16 * block_m))))
