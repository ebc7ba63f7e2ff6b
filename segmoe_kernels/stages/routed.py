"""Stages 1 to 3 as one step of autograd, whose two passes are played back (`tape`).

Backward: the experts' shares of dx and of the routing weights' gradients, one for each choice and
step, are summed in the passes that the router's backward makes anyway.
"""

from typing import Any

import torch
from torch import Tensor

from segmoe_kernels._triton.launch import step_flags, within_reach
from segmoe_kernels._triton.tape import taped
from segmoe_kernels.autograd import apply, is_followed
from segmoe_kernels.options import Options
from segmoe_kernels.routing import FFNWeights, RouterOutput
from segmoe_kernels.stages.experts import expert_ffn_bwd, expert_ffn_fwd
from segmoe_kernels.stages.experts.launch import rows_contiguous
from segmoe_kernels.stages.permute import permute
from segmoe_kernels.stages.route import route_arguments, route_bwd, route_fwd

# Tensors that are given, and how many of the results have gradients.
_NUM_TENSORS, _NUM_DIFFERENTIABLE = 12, 4


def _tokens(x: Tensor, up_proj: Tensor, top_k: int) -> Tensor:
    """What the experts see: x in their dtype, once for each choice."""
    return x.to(up_proj.dtype).expand(top_k, *x.shape)


def _laid_out(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors as kernels read them; what has other strides is copied in both passes."""
    x, router_weight, router_start, mask, *seeds = given[:6]
    start = None if router_start is None else router_start.contiguous()
    weights = rows_contiguous(FFNWeights(*given[6:_NUM_TENSORS]))
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, within_reach(router_weight), start, step_flags(mask, x.dtype), *seeds, *weights


@taped
def _routed_fwd(*given: Any) -> tuple[Tensor, ...]:
    """Outputs of `_Routed`, of its arguments."""
    x, router_weight, router_start, mask, router_seed, seed, *weights = _laid_out(given)
    router, experts = given[_NUM_TENSORS:]
    logits, probs, topk_weights, topk_ids, counts = route_fwd(
        x, router_weight, router_start, mask, router_seed, *router
    )
    order = permute(topk_ids, router_weight.shape[0], counts)
    sorted_to_slot, offsets = order.sorted_to_slot, order.expert_offsets
    out, *hidden = expert_ffn_fwd(
        _tokens(x, weights[0], router[1]),
        topk_weights,
        sorted_to_slot,
        offsets,
        *weights,
        mask,
        seed,
        *experts,
    )
    shown = (out, logits, probs, topk_weights, topk_ids, order.expert_counts)
    if not experts[-1]:
        return shown
    # One dimension is for what is not kept.
    return *shown, sorted_to_slot, offsets, *(t for t in hidden if t.ndim == 2)


@taped
def _routed_bwd(*given: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, the router's weight and start, and the experts' weights."""
    x, router_weight, router_start, mask, router_seed, seed, *weights = _laid_out(given)
    dout, dlogits, dprobs, dtopk_weights, router, experts, need, *kept = given[_NUM_TENSORS:]
    logits, topk_weights, topk_ids, sorted_to_slot, offsets, *hidden = kept
    hidden += [x.new_empty(0)] * (2 - len(hidden))
    need_dx, need_drouter, need_dw = need
    dslots = drows = None
    dweights: list[Tensor | None] = [None] * 6
    if dout is not None:
        tokens = _tokens(x, weights[0], router[1])
        needs = (need_dx, need_dx or need_drouter, need_dw)
        dslots, drows, *found = expert_ffn_bwd(
            *(tokens, topk_weights, sorted_to_slot, offsets, *weights, mask, seed),
            *(dout, *hidden, *experts[:-1], *needs),
        )
        dslots = dslots.to(x.dtype) if need_dx else None
        if need_dw:
            dweights = [None if w is None else found.pop(0) for w in weights]
    if not need_dx and not need_drouter:
        return (None, None, None, *dweights)
    dx, drouter, dstart = route_bwd(
        *(x, router_weight, router_start, mask, router_seed, logits, topk_ids),
        *(dtopk_weights, drows, dprobs, dlogits, dslots),
        *(router[0], *router[2:], need_dx, need_drouter),
    )
    return dx, drouter, None if router_start is None else dstart, *dweights


class _Routed(torch.autograd.Function):
    """Keeps x, the weights, ``4 * (E + 2 * top_k)`` bytes a segment, and the slots' order.

    Wider rows keep the hidden layer before its activation.
    """

    @staticmethod
    def forward(
        x: Tensor,
        router_weight: Tensor,
        router_start: Tensor | None,
        padding_mask: Tensor | None,
        router_seed: Tensor | None,
        seed: Tensor | None,
        up_proj: Tensor,
        down_proj: Tensor,
        gate_proj: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        down_bias: Tensor | None,
        router: tuple[Any, ...],
        experts: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        # The parameters are written out: torch.compile counts them.
        out: tuple[Tensor, ...] = _routed_fwd(
            *(x, router_weight, router_start, padding_mask, router_seed, seed),
            *(up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias),
            *(router, experts),
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, router, experts = inputs
        ctx.options = router, experts
        _, logits, _, topk_weights, topk_ids, _, *kept = output
        ctx.mark_non_differentiable(*output[_NUM_DIFFERENTIABLE:])
        # As zeros those of the kept layers would be as large as they are.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, logits, topk_weights, topk_ids, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = grads[:_NUM_DIFFERENTIABLE]
        if all(d is None for d in given):
            return (None,) * (_NUM_TENSORS + 2)
        need = ctx.needs_input_grad
        needs = (need[0], need[1] or need[2], any(need[6:_NUM_TENSORS]))
        saved = ctx.saved_tensors
        tensors, kept = saved[:_NUM_TENSORS], saved[_NUM_TENSORS:]
        found = _routed_bwd(*tensors, *given, *ctx.options, needs, *kept)
        dx, drouter, dstart, *dweights = found
        dtensors = (dx, drouter, dstart, None, None, None, *dweights)
        wanted = (d if n else None for d, n in zip(dtensors, need, strict=False))
        return *wanted, None, None


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
    *tensors, router = route_arguments(
        x,
        router_weight,
        options.segment_size,
        options.top_k,
        options.pooling,
        options.router_dropout,
        options.router_temperature,
        options.renormalize,
        router_start,
        padding_mask,
    )
    seed = None
    if options.dropout > 0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    keep = is_followed(*tensors, *experts)
    concat = options.expert_scope == "segment"
    scope = (options.segment_size, concat, options.activation, float(options.dropout), keep)
    out, logits, probs, topk_weights, topk_ids, counts, *_ = apply(
        _Routed, *tensors, seed, *experts, router, scope, followed=keep
    )
    return out, RouterOutput(logits, probs, topk_weights, topk_ids), counts
