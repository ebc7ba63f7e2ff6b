"""The definition of correct: the stages of `functional` in plain PyTorch, and the CPU backend.

Everything is differentiable twice, works in float64 and under ``torch.compile(fullgraph=True)``,
and nothing waits for the device while it is traced. Semantics: ``MoESegment`` of the official code
(evortigosa/segmoe_forecast, model/MoE.py) and arXiv 2601.21641; differences are in `SegMoE`.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.autograd import no_autocast
from segmoe_kernels.options import Options
from segmoe_kernels.pipeline import autocast_weights, run_stages
from segmoe_kernels.reference import exported
from segmoe_kernels.reference.experts import composed_ffn, dense_ffn, grouped_ffn
from segmoe_kernels.routing import FFNWeights, LayerWeights, Permutation, RouterOutput, Routing
from segmoe_kernels.segments import crop, segments, valid_steps

__all__ = ["combine", "expert_ffn", "grouped_gemm", "permute", "route", "seg_moe"]


def pool(x: Tensor, valid: Tensor | None, pooling: str) -> Tensor:
    """Summarise each segment over its real steps; a segment without one gives zeros.

    x is (B, J, P, D), 0 where ``valid`` (B, J, P) is not; "concat", which gives (B, J, P * D), does
    without. The others give (B, J, D), the mean in float32 at least.
    """
    if pooling == "concat":
        return x.flatten(2)
    assert valid is not None, pooling
    if pooling == "mean":
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.sum(2, dtype=dtype) / valid.sum(-1, keepdim=True).clamp_min(1).to(dtype)
    if pooling == "max":
        # One step takes the gradient of a tie: the rule of torch.max over a dimension.
        best = x.masked_fill(~valid[..., None], -torch.inf).max(2).values
        return torch.where(valid.any(-1)[..., None], best, 0)
    steps = torch.arange(valid.shape[-1], device=x.device)
    if pooling == "first":
        step = torch.where(valid, steps, valid.shape[-1] - 1).amin(-1)
    else:
        assert pooling == "last", pooling
        step = torch.where(valid, steps, 0).amax(-1)
    chosen = (steps == step[..., None])[..., None]
    return torch.where(chosen, x, 0).sum(2)


def route(
    x: Tensor,
    router_weight: Tensor,
    *,
    segment_size: int,
    top_k: int,
    pooling: str = "concat",
    router_temperature: float = 1.0,
    router_dropout: float = 0.0,
    renormalize: bool | None = None,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> RouterOutput:
    """Stage 1: pool each segment and choose its experts. See `functional.route`."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    valid = None
    if padding_mask is not None or pooling != "concat":
        valid = valid_steps(x, segment_size, padding_mask)
    pooled = pool(segments(x, segment_size, padding_mask), valid, pooling)
    if router_start is not None:
        start = repeat(router_start, "w -> b 1 w", b=x.shape[0])
        pooled = crop(torch.cat([start, pooled], dim=1), 1, pooled.shape[1])
    # The tail of a batch without a mask always has a real step: nothing to blank then.
    routed = None
    if padding_mask is not None and valid is not None:
        routed = rearrange(valid.any(-1), "b j -> (b j) 1")
    with no_autocast(x.device.type):
        pooled = pooled.flatten(0, 1).to(accumulate)
        router_logits = pooled @ router_weight.to(accumulate).t()
        if routed is not None:
            router_logits = torch.where(routed, router_logits, 0)
        scaled = router_logits if router_temperature == 1 else router_logits / router_temperature
        router_probs = torch.softmax(scaled, dim=-1)
    router_probs = F.dropout(router_probs, router_dropout) if router_dropout else router_probs
    if routed is not None:
        router_probs = torch.where(routed, router_probs, 0)
    # The lower index comes first among equals: a promise of max and of a stable sort, not of topk.
    if top_k == 1:
        topk_weights, topk_ids = router_probs.max(-1, keepdim=True)
    else:
        topk_ids = choose(router_probs.detach(), top_k)
        topk_weights = router_probs.gather(-1, topk_ids)
    if top_k > 1 if renormalize is None else renormalize:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True).clamp_min(1e-6)
    if routed is not None:
        topk_ids = torch.where(routed, topk_ids, -1)
    return RouterOutput(router_logits, router_probs, topk_weights, topk_ids.int())


def choose(probs: Tensor, top_k: int) -> Tensor:
    """Indices of the largest probabilities, (S, top_k), the lower first among equals."""
    if torch.compiler.is_exporting():
        return exported.choose(probs, top_k)
    return torch.sort(probs, dim=-1, descending=True, stable=True).indices[:, :top_k]


def permute(topk_ids: Tensor, num_experts: int) -> Permutation:
    """Stage 2: group the slots by expert, stable. See `functional.permute`."""
    if torch.compiler.is_exporting():
        return exported.permute(topk_ids, num_experts)
    # Behind the experts comes what is none: the remainder of -1 is E.
    ids = topk_ids.reshape(-1).clamp(-1, num_experts) % (num_experts + 1)
    sorted_ids, sorted_to_slot = torch.sort(ids, stable=True)
    slots = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    slot_to_sorted = slots.scatter(0, sorted_to_slot, slots)
    experts = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    expert_offsets = torch.searchsorted(sorted_ids, experts, out_int32=True)
    return Permutation(sorted_to_slot.int(), slot_to_sorted, expert_offsets, expert_offsets.diff())


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Stage 3': rows of expert e times its matrix. See `functional.grouped_gemm`."""
    if torch.compiler.is_exporting():
        y = exported.grouped_linear(x, weight, bias, expert_offsets)
        return y if activation is None else ACTIVATIONS[activation].function(y)
    weights = (weight, None, None, bias, None, None)
    return grouped_ffn(x, weights, None, expert_offsets, activation)


def expert_ffn(
    x: Tensor,
    topk_weights: Tensor,
    permutation: Permutation,
    experts: FFNWeights,
    *,
    segment_size: int,
    expert_scope: str = "token",
    activation: str = "gelu",
    dropout: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Stage 3: each slot's expert, times the slot's weight. See `functional.expert_ffn`."""
    length, d_model = x.shape[1:]
    if expert_scope == "segment":
        # A segment is one step of width P * D.
        x = segments(x, segment_size, padding_mask).flatten(2)
    real = None if expert_scope == "segment" else padding_mask
    steps = segment_size if expert_scope == "token" else 1
    run = exported.expert_ffn if torch.compiler.is_exporting() else composed_ffn
    out = run(x, topk_weights, experts, permutation, real, steps, activation, dropout)
    if expert_scope == "segment":
        out = crop(rearrange(out, "k b j (p d) -> k b (j p) d", d=d_model), 2, length)
        if padding_mask is not None:
            out = out.masked_fill(~padding_mask[..., None], 0)
    return out


def routed_experts(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    options: Options,
    *,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, RouterOutput, Tensor]:
    """Stages 1 to 3 in order. See `pipeline.Stages`."""
    start, mask = router_start, padding_mask
    routed = route(x, router_weight, **options.of_router(), router_start=start, padding_mask=mask)
    permutation = permute(routed.topk_ids, router_weight.shape[0])
    expert_out = expert_ffn(
        x.to(experts.up_proj.dtype),
        routed.topk_weights,
        permutation,
        experts,
        **options.of_experts(),
        padding_mask=padding_mask,
    )
    return expert_out, routed, permutation.expert_counts


def shared_expert(
    x: Tensor,
    weights: FFNWeights,
    shared_gate: Tensor,
    *,
    segment_size: int,
    activation: str = "gelu",
    dropout: float = 0.0,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The shared path: dense GEMMs, which PyTorch does best on every device.

    A row of the FFN sees ``segment_size`` steps of x (B, T, D): 1 for a token-wise shared expert.
    Returns ``(shared_out (B, J, P * D), shared_gate_logits (B, J))``, not yet cropped or masked.
    """
    rows = rearrange(segments(x, segment_size, padding_mask), "b j p d -> b j (p d)")
    logits = F.linear(rows, shared_gate).squeeze(-1)
    return dense_ffn(rows, weights, activation, dropout), logits


def combine(
    expert_out: Tensor,
    shared_out: Tensor | None = None,
    shared_gate_logits: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Stage 4: sum over the choices, add the shared path. See `functional.combine`."""
    y = expert_out.squeeze(0) if expert_out.shape[0] == 1 else expert_out.sum(0)
    if shared_out is not None and shared_gate_logits is not None:
        steps = shared_out.shape[-1] // y.shape[-1]
        opened = repeat(torch.sigmoid(shared_gate_logits), "b j -> b (j p) 1", p=steps)
        shared = crop(rearrange(shared_out, "b j (p d) -> b (j p) d", p=steps), 1, y.shape[1])
        if padding_mask is not None:
            shared = shared.masked_fill(~padding_mask[..., None], 0)
        y = torch.addcmul(y, crop(opened, 1, y.shape[1]), shared)
    return y


def shared_combine(
    expert_out: Tensor,
    x: Tensor,
    shared: FFNWeights,
    shared_gate: Tensor,
    *,
    padding_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Stage 4 with a shared expert: `shared_expert`, whose options these are, then `combine`."""
    out, logits = shared_expert(x, shared, shared_gate, padding_mask=padding_mask, **options)
    return combine(expert_out, out, logits, padding_mask=padding_mask)


def seg_moe(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    *,
    padding_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Routing]:
    """The whole layer in plain PyTorch, unchecked. See `functional.seg_moe` for the others."""
    tensors = {name: others.pop(name) for name in LayerWeights._fields if name in others}
    weights, _ = autocast_weights(x, LayerWeights(router_weight, experts, **tensors))
    return run_stages(sys.modules[__name__], x, weights, Options(**others), padding_mask)
