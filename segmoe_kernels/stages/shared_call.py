"""What both plans of `shared` launch with: one call's tensors, and where its gradients go."""

from collections.abc import Sequence

import triton
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.launch import accumulator, accumulator_dtype, input_precision, padded
from segmoe_kernels._triton.tile_table import TileConfig
from segmoe_kernels.routing import FFNWeights
from segmoe_kernels.stages.shared_backward_kernels import shared_reduce_kernel


class SharedCall:
    """One call's tensors and what the launches derive from them."""

    def __init__(
        self,
        x: Tensor,
        weights: FFNWeights,
        shared_gate: Tensor,
        padding_mask: Tensor | None,
        seed: Tensor | None,
        plan: str,
        segment_size: int,
        activation: str,
        dropout: float,
    ) -> None:
        self.x, self.weights, self.shared_gate = x, weights, shared_gate
        self.padding_mask, self.seed = padding_mask, seed
        self.plan, self.segment_size, self.dropout = plan, segment_size, dropout
        self.batch, self.length, self.d_model = x.shape
        self.hidden, self.width = weights.up_proj.shape
        self.segments_per_sequence = -(-self.length // segment_size)
        self.num_rows = self.batch * self.segments_per_sequence
        self.gated = weights.gate_proj is not None
        self.sizes = (self.num_rows, self.segments_per_sequence, self.length)
        self.places = {"D": self.d_model, "SEGMENT_SIZE": segment_size}
        self.activation = {"ACTIVATION": activation}
        self.acc = {"ACC": accumulator(x.dtype)}
        self.numerics = {**self.acc, "PRECISION": input_precision(x.dtype)}

    @property
    def is_rows(self) -> bool:
        """Whether x holds the rows already, one behind the other."""
        whole = self.length % self.segment_size == 0 and self.padding_mask is None
        return whole and self.x.is_contiguous()

    def new_hidden(self) -> Tensor:
        """Room for a hidden layer."""
        return self.x.new_empty(self.num_rows, self.hidden)

    def new_scalars(self, *shape: int) -> Tensor:
        """Room for sums, in the accumulator's dtype."""
        return self.x.new_empty(shape, dtype=accumulator_dtype(self.x.dtype))

    def gate_stride(self) -> int:
        """Outer stride of the gate's projection, 0 without one."""
        return 0 if self.weights.gate_proj is None else self.weights.gate_proj.stride(0)


def tile_options(tile: TileConfig) -> dict[str, int]:
    """Keywords of a product's launch."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        **tile.options(),
    }


def tile_grid(num_rows: int, columns: int, tile: TileConfig) -> tuple[int]:
    """One program for each tile of a product; refuses what a launch can't count."""
    # Kernels count rows in 32 bits, those of a partial tile included.
    check.check_programs("shared_combine", num_rows + tile.block_m)
    programs = triton.cdiv(num_rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    check.check_programs("shared_combine", programs)
    return (programs,)


def pass_block(columns: int) -> tuple[int, int]:
    """Rows and columns of a program that computes on every element once."""
    block_n = min(padded(columns), 256)
    return 4096 // block_n, block_n


class Gradients:
    """Where the gradients go; None for what nobody wants."""

    def __init__(self, found: Sequence[Tensor], need: Sequence[bool]) -> None:
        self.found = list(found)
        wanted = [g if n else None for g, n in zip(found, need, strict=True)]
        self.x, self.up_proj, self.down_proj, self.gate_proj = wanted[:4]
        self.up_bias, self.gate_bias, self.down_bias, self.shared_gate = wanted[4:]

    def bias_partials(self, call: SharedCall, slots: int) -> Tensor | None:
        """Slots for the partial sums of the hidden layer's bias gradients."""
        if self.up_bias is None and self.gate_bias is None:
            return None
        return call.new_scalars(slots, call.hidden * (2 if call.gated else 1))

    def reduce_bias(self, call: SharedCall, partials: Tensor | None) -> None:
        """Add up what `bias_partials` holds."""
        if partials is None:
            return
        outputs = [(self.up_bias, call.hidden)]
        if call.gated:
            outputs.append((self.gate_bias, call.hidden))
        reduce_shares(partials, outputs, block_r=32)


def reduce_shares(
    partials: Tensor, outputs: Sequence[tuple[Tensor | None, int]], block_r: int
) -> None:
    """Add up partial sums into outputs, which lie one behind the other in a slot."""
    outputs = [*outputs, *[(None, 0)] * (5 - len(outputs))]
    block = 1024 // block_r
    grid = (triton.cdiv(partials.shape[1], block),)
    shared_reduce_kernel[grid](
        partials,
        *(out for out, _ in outputs),
        *partials.shape,
        *(size for _, size in outputs),
        ACC=accumulator(partials.dtype),
        BLOCK_R=block_r,
        BLOCK=block,
        num_warps=4,
    )
