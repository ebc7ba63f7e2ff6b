"""What the reference does otherwise in an exported program, to hold only what every runtime has.

`grouped_ffn` runs an operator of this package in a program, which a saved one would find
only where the package is imported, and other runtimes have no stable sort. Here each expert runs on
the rows that chose it, found by ``nonzero``: the same FLOPs, in a graph that grows with the number
of experts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from segmoe_kernels.reference.experts import dense_ffn
from segmoe_kernels.routing import FFNWeights, Permutation
from segmoe_kernels.segments import crop, segments


def choose(probs: Tensor, top_k: int) -> Tensor:
    """`reference.choose`."""
    chosen: list[Tensor] = []
    for _ in range(top_k):
        if chosen:
            probs = probs.scatter(-1, chosen[-1], -torch.inf)
        chosen.append(probs.argmax(-1, keepdim=True))  # the first of equals: a promise of argmax
    return torch.cat(chosen, -1)


def permute(topk_ids: Tensor, num_experts: int) -> Permutation:
    """`reference.permute`."""
    ids = topk_ids.reshape(-1).long()
    ids = torch.where(ids < 0, num_experts, ids)
    slots = torch.arange(ids.shape[0], device=ids.device)
    sorted_to_slot = torch.sort(ids * ids.shape[0] + slots).indices
    slot_to_sorted = slots.scatter(0, sorted_to_slot, slots)
    experts = torch.arange(num_experts + 1, device=ids.device)
    expert_offsets = (ids < experts[:, None]).sum(-1, dtype=torch.int32)
    counts = expert_offsets.diff()
    return Permutation(sorted_to_slot.int(), slot_to_sorted.int(), expert_offsets, counts)


def _by_expert(
    out: Tensor, positions: Tensor, expert_offsets: Tensor, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Fill the rows of out by ``run(expert, index of its rows)``; others stay as they are."""
    owner = (positions[:, None] >= expert_offsets[1:]).sum(-1)
    for expert in range(expert_offsets.shape[0] - 1):
        mine = (owner == expert).nonzero().squeeze(-1)
        out = out.index_put((mine,), run(expert, mine))
    return out


def grouped_linear(a: Tensor, b: Tensor, bias: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """`reference.grouped_gemm` without an activation."""

    def run(expert: int, rows: Tensor) -> Tensor:
        return F.linear(a[rows], b[expert], None if bias is None else bias[expert])

    positions = torch.arange(a.shape[0], device=a.device)
    return _by_expert(a.new_zeros(a.shape[0], b.shape[1]), positions, expert_offsets, run)


def expert_ffn(
    x: Tensor,
    topk_weights: Tensor,
    experts: FFNWeights,
    permutation: Permutation,
    padding_mask: Tensor | None,
    segment_size: int,
    activation: str,
    dropout: float,
) -> Tensor:
    """`experts.composed_ffn`."""
    top_k = topk_weights.shape[-1]
    rows = segments(x, segment_size, padding_mask).flatten(0, 1)
    weights = topk_weights.flatten().to(x.dtype)

    def run(expert: int, slots: Tensor) -> Tensor:
        others = (None if w is None else w[expert] for w in experts[2:])
        own = FFNWeights(experts.up_proj[expert], experts.down_proj[expert], *others)
        out = dense_ffn(rows[slots // top_k], own, activation, dropout)
        return out * weights[slots, None, None]

    out = rows.new_zeros(permutation.slot_to_sorted.shape[0], *rows.shape[1:])
    out = _by_expert(out, permutation.slot_to_sorted, permutation.expert_offsets, run)
    out = rearrange(out, "(b j k) p d -> k b (j p) d", b=x.shape[0], k=top_k)
    out = crop(out, 2, x.shape[1])
    return out if padding_mask is None else out.masked_fill(~padding_mask[..., None], 0)
