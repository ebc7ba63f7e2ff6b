"""The definition of correct: the stages of `functional` in plain PyTorch, and the CPU backend.

Everything is differentiable twice, works in float64 and under ``torch.compile(fullgraph=True)``,
and nothing waits for the device while it is traced. Semantics: ``MoESegment`` of the official code
(evortigosa/segmoe_forecast, model/MoE.py) and arXiv 2601.21641; differences are in `SegMoE`.
"""

import contextlib
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from segmoe_kernels import exported
from segmoe_kernels.composed_ffn import (
    ACTIVATION_FUNCTIONS,
    crop,
    dense_ffn,
    segments,
    valid_steps,
)
from segmoe_kernels.grouped_ffn import composed_ffn, grouped_ffn
from segmoe_kernels.routing import FFNWeights, Permutation, RouterOutput, Routing

__all__ = ["combine", "expert_ffn", "grouped_gemm", "permute", "route", "seg_moe"]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the router computes in: float32, or float64 where x is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(x: Tensor, valid: Tensor | None, pooling: str) -> Tensor:
    """Summarise each segment over its real steps; a segment without one gives zeros.

    Args:
        x: (B, J, P, D), zero where not valid.
        valid: (B, J, P) bool; "concat" does without.
        pooling: "concat" (P steps side by side, missing ones 0), "mean", "max", "first", "last".

    Returns:
        (B, J, P * D) for "concat", else (B, J, D); a mean is float32 at least, the others x's.
    """
    if pooling == "concat":
        return rearrange(x, "b j p d -> b j (p d)")
    assert valid is not None, pooling
    if pooling == "mean":
        dtype = accumulator_dtype(x.dtype)
        count = valid.sum(-1, keepdim=True).clamp_min(1)
        return x.sum(2, dtype=dtype) / count.to(dtype)
    if pooling == "max":
        # One step takes the gradient of a tie: the rule of torch.max over a dimension.
        best = x.masked_fill(~valid[..., None], -torch.inf).max(2).values
        return torch.where(valid.any(-1)[..., None], best, 0)
    steps = torch.arange(valid.shape[-1], device=x.device)
    if pooling == "first":
        step = torch.where(valid, steps, valid.shape[-1] - 1).amin(-1)
    else:
        step = torch.where(valid, steps, 0).amax(-1)
    chosen = (steps == step[..., None])[..., None]
    return torch.where(chosen, x, 0).sum(2)


def _autocast_is_on(device_type: str) -> bool:
    # The meta device has no autocast; what says so, Dynamo traces only from torch 2.12 on.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    # Entering the context for nothing costs a small layer.
    if _autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


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
    accumulate = accumulator_dtype(x.dtype)
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
    with _no_autocast(x.device.type):
        pooled = rearrange(pooled, "b j w -> (b j) w").to(accumulate)
        router_logits = pooled @ router_weight.to(accumulate).t()
        if routed is not None:
            router_logits = torch.where(routed, router_logits, 0)
        scaled = router_logits
        if router_temperature != 1:
            scaled = scaled / router_temperature
        router_probs = torch.softmax(scaled, dim=-1)
    router_probs = F.dropout(router_probs, router_dropout)
    if routed is not None:
        router_probs = torch.where(routed, router_probs, 0)
    # The lower index comes first among equals: a promise of max and of a stable sort, not of topk.
    if top_k == 1:
        topk_weights, topk_ids = router_probs.max(-1, keepdim=True)
    else:
        if torch.compiler.is_exporting():
            topk_ids = exported.choose(router_probs.detach(), top_k)
        else:
            order = torch.sort(router_probs.detach(), dim=-1, descending=True, stable=True).indices
            topk_ids = order[:, :top_k]
        topk_weights = router_probs.gather(-1, topk_ids)
    if top_k > 1 if renormalize is None else renormalize:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True).clamp_min(1e-6)
    if routed is not None:
        topk_ids = torch.where(routed, topk_ids, -1)
    return RouterOutput(router_logits, router_probs, topk_weights, topk_ids.int())


def permute(topk_ids: Tensor, num_experts: int) -> Permutation:
    """Stage 2: group the slots by expert, stable. See `functional.permute`."""
    if torch.compiler.is_exporting():
        return exported.permute(topk_ids, num_experts)
    ids = topk_ids.reshape(-1)
    ids = torch.where((ids < 0) | (ids > num_experts), num_experts, ids)
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
        return y if activation is None else ACTIVATION_FUNCTIONS[activation](y)
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
    sorted_to_slot, expert_offsets = permutation.sorted_to_slot, permutation.expert_offsets
    options: dict[str, Any] = {"segment_size": steps, "activation": activation}
    if torch.compiler.is_exporting():
        inputs = (x, topk_weights, experts, permutation, real)
        out = exported.expert_ffn(*inputs, **options, dropout=dropout)
    else:
        out = composed_ffn(
            x,
            topk_weights,
            experts,
            sorted_to_slot,
            permutation.slot_to_sorted,
            expert_offsets,
            real,
            **options,
            dropout=dropout,
        )
    if expert_scope == "segment":
        out = crop(rearrange(out, "k b j (p d) -> k b (j p) d", d=d_model), 2, length)
        if padding_mask is not None:
            out = out.masked_fill(~padding_mask[..., None], 0)
    return out


def routed_experts(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    *,
    segment_size: int,
    top_k: int,
    pooling: str = "concat",
    expert_scope: str = "token",
    activation: str = "gelu",
    dropout: float = 0.0,
    router_dropout: float = 0.0,
    router_temperature: float = 1.0,
    renormalize: bool | None = None,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, RouterOutput, Tensor]:
    """Stages 1 to 3 in order; the experts run in the dtype of their weights.

    Returns:
        ``(expert_out, routed, expert_counts)``: the weighted outputs, (top_k, B, T, D), or
        (1, B, T, D) where a plan has summed them; RouterOutput; (E,) int32.
    """
    routed = route(
        x,
        router_weight,
        segment_size=segment_size,
        top_k=top_k,
        pooling=pooling,
        router_temperature=router_temperature,
        router_dropout=router_dropout,
        renormalize=renormalize,
        router_start=router_start,
        padding_mask=padding_mask,
    )
    permutation = permute(routed.topk_ids, router_weight.shape[0])
    expert_out = expert_ffn(
        x.to(experts.up_proj.dtype),
        routed.topk_weights,
        permutation,
        experts,
        segment_size=segment_size,
        expert_scope=expert_scope,
        activation=activation,
        dropout=dropout,
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
    """The shared path before its gate: dense GEMMs, which PyTorch does best on every device.

    Args:
        x: (B, T, D).
        weights: FFN of width ``segment_size * D``.
        shared_gate: (1, segment_size * D).
        segment_size: steps that one row of the FFN sees; 1 for a token-wise shared expert.
        activation: see `functional.expert_ffn`.
        dropout: probability, after the activation.
        padding_mask: (B, T) bool or None.

    Returns:
        ``(shared_out (B, J, P * D), shared_gate_logits (B, J))``, not yet cropped or masked.
    """
    rows = rearrange(segments(x, segment_size, padding_mask), "b j p d -> b j (p d)")
    gate_logits = F.linear(rows, shared_gate).squeeze(-1)
    return dense_ffn(rows, weights, activation, dropout), gate_logits


def combine(
    expert_out: Tensor,
    shared_out: Tensor | None = None,
    shared_gate_logits: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Stage 4: sum over the slots, add the gated shared path. See `functional.combine`."""
    y = expert_out.squeeze(0) if expert_out.shape[0] == 1 else expert_out.sum(0)
    if shared_out is not None and shared_gate_logits is not None:
        steps = shared_out.shape[-1] // y.shape[-1]
        gate = torch.sigmoid(shared_gate_logits)
        gate = crop(repeat(gate, "b j -> b (j p) 1", p=steps), 1, y.shape[1])
        shared = crop(rearrange(shared_out, "b j (p d) -> b (j p) d", p=steps), 1, y.shape[1])
        if padding_mask is not None:
            shared = shared.masked_fill(~padding_mask[..., None], 0)
        y = torch.addcmul(y, gate, shared)
    return y


def shared_combine(
    expert_out: Tensor,
    x: Tensor,
    shared: FFNWeights,
    shared_gate: Tensor,
    *,
    segment_size: int,
    activation: str = "gelu",
    dropout: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Stage 4 with a shared expert: `shared_expert`, then `combine`.

    Args:
        expert_out: (top_k, B, T, D), already weighted, 0 where masked.
        x: (B, T, D).
        shared: FFN of width ``segment_size * D``.
        shared_gate: (1, segment_size * D).
        segment_size: steps that one row of the FFN sees; 1 for a token-wise shared expert.
        activation: see `functional.expert_ffn`.
        dropout: probability, after the activation.
        padding_mask: (B, T) bool or None.

    Returns:
        (B, T, D), dtype of expert_out.
    """
    shared_out, gate_logits = shared_expert(
        x,
        shared,
        shared_gate,
        segment_size=segment_size,
        activation=activation,
        dropout=dropout,
        padding_mask=padding_mask,
    )
    return combine(expert_out, shared_out, gate_logits, padding_mask=padding_mask)


def autocast_weights(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    shared: FFNWeights | None,
    shared_gate: Tensor | None,
) -> tuple[Tensor, FFNWeights, FFNWeights | None, Tensor | None, torch.dtype]:
    """Weights as ``torch.autocast`` wants them, and the dtype that products run in.

    The router stays in the dtype of x; without autocast, or in float64, nothing changes.
    """
    kind = x.device.type
    if not _autocast_is_on(kind) or x.dtype == torch.float64:
        return router_weight, experts, shared, shared_gate, x.dtype
    dtype = torch.get_autocast_dtype(kind)
    shared = None if shared is None else shared.to(dtype)
    shared_gate = None if shared_gate is None else shared_gate.to(dtype)
    return router_weight.to(x.dtype), experts.to(dtype), shared, shared_gate, dtype


def run_stages(
    stages: Any,
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    shared: FFNWeights | None,
    shared_gate: Tensor | None,
    compute_dtype: torch.dtype,
    *,
    segment_size: int,
    expert_scope: str,
    in_proj: tuple[Tensor, Tensor | None] | None,
    out_proj: tuple[Tensor, Tensor | None] | None,
    padding_mask: Tensor | None,
    activation: str,
    dropout: float,
    **router: Any,
) -> tuple[Tensor, Routing]:
    """Run the layer on the stages of one backend, in order.

    Args:
        stages: the module whose `routed_experts`, `shared_combine` and `combine` run.
        x: (..., T, D).
        router_weight: from `autocast_weights`, as the next four.
        experts: weights stacked over E.
        shared: weights of the shared expert or None.
        shared_gate: its gate's weight or None.
        compute_dtype: of the products.
        segment_size: P.
        expert_scope: see `functional.seg_moe`, as for all that follow.
        in_proj: see there.
        out_proj: see there.
        padding_mask: see there.
        activation: see there.
        dropout: see there.
        **router: the router's options.

    Returns:
        ``(y, routing)``.
    """
    batch_shape, (length, d_model) = x.shape[:-2], x.shape[-2:]
    batch = math.prod(batch_shape)  # not numel(), which export would make a constant
    sequences = x.reshape(batch, length, d_model)
    mask = None if padding_mask is None else padding_mask.reshape(batch, length)
    tokens, real, steps = sequences, mask, segment_size
    projected = expert_scope == "projected" and in_proj is not None and out_proj is not None
    if projected:
        # A projected segment is one token of width D: the rest of the layer sees P = 1.
        rows = segments(sequences, segment_size, mask).flatten(-2)
        # Back from the autocast dtype: the router sees x's.
        tokens = F.linear(rows, *in_proj).to(x.dtype)  # type: ignore[misc]  # not None
        real = None if mask is None else valid_steps(sequences, segment_size, mask).any(-1)
        steps, expert_scope = 1, "token"
    expert_out, routed, expert_counts = stages.routed_experts(
        tokens,
        router_weight,
        experts,
        segment_size=steps,
        expert_scope=expert_scope,
        activation=activation,
        dropout=dropout,
        padding_mask=real,
        **router,
    )
    if shared is not None and shared_gate is not None:
        y = stages.shared_combine(
            expert_out,
            tokens.to(compute_dtype),
            shared,
            shared_gate,
            segment_size=shared.up_proj.shape[-1] // d_model,
            activation=activation,
            dropout=dropout,
            padding_mask=real,
        )
    else:
        y = stages.combine(expert_out, None, None, padding_mask=real)
    if projected:
        y = F.linear(y.to(tokens.dtype), *out_proj)  # type: ignore[misc]  # not None
        y = crop(rearrange(y, "b j (p d) -> b (j p) d", p=segment_size), 1, length)
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
    routing = Routing(
        routed.router_logits,
        routed.router_probs,
        routed.topk_weights,
        routed.topk_ids,
        expert_counts,
    )
    # Some ways to crop leave a view.
    return y.to(x.dtype).contiguous().reshape(x.shape), routing


def seg_moe(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    *,
    segment_size: int,
    top_k: int = 1,
    pooling: str = "concat",
    expert_scope: str = "token",
    shared: FFNWeights | None = None,
    shared_gate: Tensor | None = None,
    in_proj: tuple[Tensor, Tensor | None] | None = None,
    out_proj: tuple[Tensor, Tensor | None] | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    router_dropout: float = 0.0,
    router_temperature: float = 1.0,
    renormalize: bool | None = None,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """The whole layer in plain PyTorch, unchecked. See `functional.seg_moe`."""
    return run_stages(
        sys.modules[__name__],
        x,
        *autocast_weights(x, router_weight, experts, shared, shared_gate),
        segment_size=segment_size,
        expert_scope=expert_scope,
        in_proj=in_proj,
        out_proj=out_proj,
        padding_mask=padding_mask,
        activation=activation,
        dropout=dropout,
        top_k=top_k,
        pooling=pooling,
        router_dropout=router_dropout,
        router_temperature=router_temperature,
        renormalize=renormalize,
        router_start=router_start,
    )
