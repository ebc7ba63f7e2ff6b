"""The tiles themselves, by operation, dtype, architecture and width, and which of them a GPU takes.

`tiles` looks them up. Register and spill counts behind them: ``python -m benchmarks.codegen``.
"""

import functools
from typing import NamedTuple

import torch
import triton

from segmoe_kernels import validation as check
from segmoe_kernels.options import settings


class TileConfig(NamedTuple):
    """What one program works on, and with how many warps.

    Attributes:
        block_m: rows (steps or segments).
        block_n: output columns, or the chunk of d_ff.
        block_k: contraction, or the padded width.
        num_warps: warps in a program.
        num_stages: software-pipelining depth.
        max_registers: of a thread, 0 for the compiler's own choice. It likes to spill a few
            bytes for one more program on a multiprocessor, and can be told not to.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int = 0

    def options(self) -> dict[str, int]:
        """Say how to launch it: keywords of a kernel's launch."""
        return launch_options(self.num_warps, self.num_stages, self.max_registers)

    def programs_at_once(self) -> int:
        """How many fit the registers of a multiprocessor, at 256 a thread without a limit."""
        return max(1, 2048 // (self.num_warps * (self.max_registers or 256)))


def launch_options(num_warps: int, num_stages: int, max_registers: int) -> dict[str, int]:
    """Keywords of a kernel's launch; `TileConfig` says what they are."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers and architecture().startswith("sm_"):
        # A multiprocessor has 65,536 registers, and a warp 32 threads.
        options["maxnreg"] = min(max_registers, 2048 // num_warps)
    return options


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
    wanted = settings().arch
    if wanted is not None:
        check.check_choice("architecture", "SEGMOE_ARCH", wanted, tuple(TILES_OF))
        return wanted
    return _architecture_of(torch.cuda.current_device()) if _has_gpu() else "sm_90"


def power(size: int, least: int, most: int) -> int:
    """Round up to a power of two within bounds."""
    return min(most, max(least, 1 << (size - 1).bit_length()))


def kind_of(dtype: torch.dtype) -> str:
    """Say which of the table's columns a dtype takes."""
    return {torch.float64: "fp64", torch.float32: "fp32"}.get(dtype, "16-bit")


# Rows, columns of d_ff at a time, warps, stages, and registers where they have a limit.
Tile = tuple[int, int, int, int] | tuple[int, int, int, int, int]

# The fused kernels: (operation, kind of dtype, architecture or "any") -> padded width -> tiles of
# plain experts, plain ones with extras, gated ones, gated ones with extras. Extras are biases, a
# padding mask and dropout, which take registers. Narrower rows take the tiles of the narrowest that
# is listed.
FUSED_TILES: dict[tuple[str, str, str], dict[int, tuple[Tile, ...]]] = {
    ("expert_ffn_fwd", "16-bit", "sm_90"): {
        64: ((128, 128, 8, 2, 128), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        128: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        256: ((128, 64, 8, 1), (128, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 1)),
    },
    ("expert_ffn_fwd", "16-bit", "sm_80"): {
        64: ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        256: ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2), (32, 32, 8, 2)),
    },
    ("expert_ffn_fwd", "16-bit", "gfx942"): {
        64: ((64, 128, 4, 1), (64, 128, 4, 1), (64, 128, 4, 1), (64, 128, 4, 1)),
        128: ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        256: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    },
    ("expert_ffn_fwd", "fp32", "gfx942"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        256: ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    },
    ("expert_ffn_fwd", "fp32", "any"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((32, 16, 8, 1, 255), (32, 16, 8, 1, 255), (16, 16, 8, 1), (16, 16, 8, 1, 168)),
        256: ((16, 16, 8, 1, 168), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("expert_ffn_dx", "16-bit", "sm_90"): {
        64: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        128: ((64, 32, 4, 1, 168), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        256: ((64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    },
    ("expert_ffn_dx", "16-bit", "sm_80"): {
        64: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1, 255)),
        128: ((64, 16, 8, 1), (32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1), (64, 16, 8, 1), (16, 32, 8, 1)),
    },
    ("expert_ffn_dx", "16-bit", "gfx942"): {
        64: ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        128: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        256: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    },
    ("expert_ffn_dx", "fp32", "gfx942"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    ("expert_ffn_dx", "fp32", "any"): {
        64: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1, 128)),
        256: ((16, 16, 8, 1, 128), (16, 16, 8, 1, 128), (16, 16, 8, 1), (16, 16, 8, 1, 168)),
    },
    ("expert_ffn_dw", "16-bit", "sm_90"): {
        64: ((64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    },
    ("expert_ffn_dw", "16-bit", "sm_80"): {
        64: ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
    },
    ("expert_ffn_dw", "16-bit", "gfx942"): {
        64: ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
    },
}
# Float64 is for checks.
SMALLEST: Tile = (16, 16, 4, 1, 255)

# The grouped products: (operation, kind of dtype, architecture or "any") -> experts with so many
# rows, rounded up to a power of two between 16 and 128 -> tile. "product" is one sum that is stored
# as it is, "activated" one with an epilogue, "gated" two sums.
GEMM_TILES: dict[tuple[str, str, str], dict[int, TileConfig]] = {
    ("product", "16-bit", "sm_90"): {
        128: TileConfig(128, 128, 32, 4, 4),
        64: TileConfig(64, 128, 64, 4, 3),
        32: TileConfig(32, 128, 64, 4, 3, 255),
        16: TileConfig(16, 128, 64, 4, 3, 128),
    },
    ("activated", "16-bit", "sm_90"): {
        128: TileConfig(128, 128, 64, 8, 3),
        64: TileConfig(64, 128, 64, 4, 3),
        32: TileConfig(32, 128, 64, 4, 3, 255),
        16: TileConfig(16, 128, 64, 4, 3, 128),
    },
    ("gated", "16-bit", "sm_90"): {
        128: TileConfig(128, 64, 32, 4, 4),
        64: TileConfig(64, 64, 64, 4, 3),
        32: TileConfig(32, 64, 64, 4, 3),
        16: TileConfig(16, 64, 64, 4, 3),
    },
    ("dhidden", "16-bit", "sm_90"): {
        128: TileConfig(64, 64, 64, 4, 4),
        64: TileConfig(64, 64, 64, 4, 3),
        32: TileConfig(32, 64, 64, 4, 3, 168),
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
    ("activated with dropout", "16-bit", "any"): {
        128: TileConfig(128, 64, 32, 8, 3),
        64: TileConfig(64, 64, 32, 8, 3),
        32: TileConfig(32, 64, 32, 4, 3, 128),
        16: TileConfig(16, 64, 32, 4, 3),
    },
    ("gated", "16-bit", "any"): {
        128: TileConfig(128, 64, 32, 8, 3),
        64: TileConfig(64, 64, 32, 4, 3),
        32: TileConfig(32, 64, 32, 4, 3),
        16: TileConfig(16, 64, 32, 4, 3),
    },
    ("dhidden", "16-bit", "any"): {
        128: TileConfig(64, 64, 32, 8, 3, 168),
        64: TileConfig(64, 64, 32, 8, 3, 168),
        32: TileConfig(32, 64, 32, 4, 3),
        16: TileConfig(16, 64, 32, 4, 3),
    },
    # Taller ones spill, whatever their depth and registers.
    ("product", "fp32", "any"): dict.fromkeys((128, 64, 32, 16), TileConfig(32, 64, 32, 8, 2, 128)),
    ("product", "fp64", "any"): dict.fromkeys((128, 64, 32, 16), TileConfig(16, 16, 16, 4, 1)),
}
# What an operation without tiles of its own takes.
GEMM_LIKE = {"activated": "product", "gated": "product", "dhidden": "product"}
GEMM_LIKE |= {"dhidden with extras": "dhidden", "activated with dropout": "activated"}
