"""What the stages hand to each other: routing decisions, the permutation, expert weights.

Shape letters as in ``segmoe_kernels``: B batch, T time steps, P segment_size, J segments of one
sequence (``ceil(T / P)``), S segments in the batch (``B * J``), D d_model, F d_ff, E num_experts,
R routed rows (``S * top_k``).
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FFNWeights", "LayerWeights", "Permutation", "RouterOutput", "Routing"]


class FFNWeights(NamedTuple):
    """Parameters of one FFN, or of E of them stacked in front; the last dimension contracts.

    A plain FFN is ``down(act(up(x)))``, a gated one ``down(act(gate(x)) * up(x))``.
    Outer strides are free, so a fused ``gate_up_proj (E, 2F, D)`` is passed as two views.

    Attributes:
        up_proj: (E, F, D) or (F, D).
        down_proj: (E, D, F) or (D, F).
        gate_proj: shape of up_proj, or None.
        up_proj_bias: (E, F) or (F,), or None.
        gate_proj_bias: shape of up_proj_bias, or None.
        down_proj_bias: (E, D) or (D,), or None.
    """

    up_proj: Tensor
    down_proj: Tensor
    gate_proj: Tensor | None = None
    up_proj_bias: Tensor | None = None
    gate_proj_bias: Tensor | None = None
    down_proj_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "FFNWeights":
        """The same weights in another dtype."""
        tensors = [None if w is None else w.to(dtype) for w in self]
        return FFNWeights(*tensors)  # type: ignore[arg-type]  # up and down are never None


class LayerWeights(NamedTuple):
    """All tensors of a layer; shapes are those of `functional.seg_moe`.

    Attributes:
        router_weight: of the router.
        experts: stacked over E.
        shared: of the shared expert, or None.
        shared_gate: of the shared gate, or None.
        in_proj: weight and bias, or None.
        out_proj: weight and bias, or None.
        router_start: what a causal router sees before the first segment, or None.
    """

    router_weight: Tensor
    experts: FFNWeights
    shared: FFNWeights | None = None
    shared_gate: Tensor | None = None
    in_proj: tuple[Tensor, Tensor | None] | None = None
    out_proj: tuple[Tensor, Tensor | None] | None = None
    router_start: Tensor | None = None


class RouterOutput(NamedTuple):
    """What the router says about each segment.

    Worked example, two segments, ``E = 3``, ``top_k = 2``, the second segment fully masked::

        router_probs = [[0.5, 0.2, 0.3], [0, 0, 0]]
        topk_ids     = [[0, 2], [-1, -1]]
        topk_weights = [[0.625, 0.375], [0, 0]]      # 0.5 / 0.8, 0.3 / 0.8

    Attributes:
        router_logits: (S, E) float32 (float64 where x is). Before the temperature.
        router_probs: (S, E), same dtype. After the temperature, softmax and router dropout.
        topk_weights: (S, top_k), same dtype.
        topk_ids: (S, top_k) int32, -1 where the segment has no real step.
        block_counts: (blocks * (E + 1),) int32, or None from the reference. Slots of each expert,
            and of none, in each run of segments that one program routed; saves `permute` a pass.
    """

    router_logits: Tensor
    router_probs: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    block_counts: Tensor | None = None


class Permutation(NamedTuple):
    """Slots (``segment * top_k + choice``) grouped by expert, stable inside a group.

    Worked example, ``top_k = 1``, ``E = 3``, ``topk_ids = [2, 0, -1, 2]``::

        expert_counts  = [1, 0, 2]
        expert_offsets = [0, 1, 1, 3]        # rows of e are [offsets[e], offsets[e + 1])
        sorted_to_slot = [1, 0, 3, 2]        # slots without an expert come last
        slot_to_sorted = [1, 0, 3, 2]

    Invariants: the two maps are inverse to each other; ``expert_offsets = [0] + cumsum(counts)``.

    Attributes:
        sorted_to_slot: (R,) int32.
        slot_to_sorted: (R,) int32.
        expert_offsets: (E + 1,) int32.
        expert_counts: (E,) int32.
    """

    sorted_to_slot: Tensor
    slot_to_sorted: Tensor
    expert_offsets: Tensor
    expert_counts: Tensor


class Routing(NamedTuple):
    """The routing of one call of the layer, as ``forward_with_routing`` returns it.

    Attributes:
        router_logits: (S, E) float32 (float64 where x is). Before the temperature.
        router_probs: (S, E), same dtype. After the temperature, softmax and router dropout.
        topk_weights: (S, top_k), same dtype.
        topk_ids: (S, top_k) int32, -1 where the segment has no real step.
        expert_counts: (E,) int32. Slots routed to each expert.
    """

    router_logits: Tensor
    router_probs: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    expert_counts: Tensor
