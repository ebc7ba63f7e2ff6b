"""Weights through tensor descriptors: hardware (TMA) copies a tile, not threads by address.

Opt-in, by the environment variable SEGMOE_DESCRIPTORS=on. Hopper's other users of Triton report 6
to 9 % on products as wide as those of language models; Triton itself has open faults there
(triton-lang/triton #9439, #10474, #11735), so pointers are the default.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.tile_table import TileConfig, architecture

CHOICES = ("off", "on")
# "sm_120" also stands for GPUs that have no TMA.
WITH_TMA = ("sm_90", "sm_100")
# TMA takes addresses and strides that are multiples of it, in bytes.
ALIGNMENT = 16


def wanted() -> bool:
    """Say whether SEGMOE_DESCRIPTORS asks for descriptors, on a GPU that has them.

    Raises:
        ValueError: if SEGMOE_DESCRIPTORS is not one of `CHOICES`.
    """
    choice = os.environ.get("SEGMOE_DESCRIPTORS", "off")
    check.check_choice("descriptors", "SEGMOE_DESCRIPTORS", choice, CHOICES)
    return choice == "on" and architecture() in WITH_TMA


def _fits(weight: Tensor) -> bool:
    """Whether a descriptor can describe (E, rows, columns) whose columns are contiguous."""
    size = weight.element_size()
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and weight.numel() > 0
        and weight.stride(2) == 1
        and weight.data_ptr() % ALIGNMENT == 0
        and all(s > 0 and s * size % ALIGNMENT == 0 for s in weight.stride()[:2])
    )


def weight_operand(weight: Tensor | None, tile: TileConfig) -> tuple[Any, str]:
    """Return what a kernel is given for a weight, and how `load_weight` reads it.

    Args:
        weight: (E, N, K) by strides, or None.
        tile: block_n and block_k are those of a tile.

    Returns:
        A descriptor and "n k" or "k n", the order in which a tile lies in memory; or the weight
        itself and "strided" where descriptors are off or can't describe it.
    """
    if weight is None or not wanted():
        return weight, "strided"
    for matrix, block, layout in (
        (weight, [1, tile.block_n, tile.block_k], "n k"),
        (weight.transpose(1, 2), [1, tile.block_k, tile.block_n], "k n"),
    ):
        if _fits(matrix):
            return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], block), layout
    return weight, "strided"


@triton.jit
def load_weight(
    weight,  # pointer or descriptor to (E, N, K)
    expert,
    first_n,
    first_k,
    N: tl.constexpr,
    K: tl.constexpr,
    stride_e,
    stride_n,
    stride_k,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the tile (BLOCK_K, BLOCK_N) of an expert's matrix, transposed; 0 outside of it."""
    if LAYOUT == "n k":
        tile = weight.load([expert, first_n, first_k])
        return tl.trans(tl.reshape(tile, (BLOCK_N, BLOCK_K)))
    elif LAYOUT == "k n":  # noqa: RET505  the branches are compile-time
        tile = weight.load([expert, first_k, first_n])
        return tl.reshape(tile, (BLOCK_K, BLOCK_N))
    else:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        offs_k = first_k + tl.arange(0, BLOCK_K)
        offs = expert.to(tl.int64) * stride_e + offs_k[:, None] * stride_k
        mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        return tl.load(weight + offs + offs_n[None, :] * stride_n, mask=mask, other=0.0)
