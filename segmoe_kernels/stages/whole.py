"""All stages as one step of autograd, whose two passes are played back (`tape`).

Backward: the experts' shares of dx and of the routing weights' gradients, one for each choice and
step, are summed in the passes that the router's backward makes anyway.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segmoe_kernels._triton.launch import draw_seed, step_flags, within_reach
from segmoe_kernels._triton.tape import taped
from segmoe_kernels.autograd import apply, is_followed
from segmoe_kernels.options import Options
from segmoe_kernels.routing import FFNWeights, LayerWeights, RouterOutput, Routing
from segmoe_kernels.stages.combine import combine_fwd
from segmoe_kernels.stages.experts import expert_ffn_bwd, expert_ffn_fwd
from segmoe_kernels.stages.experts.launch import by_choice, rows_contiguous
from segmoe_kernels.stages.permute import permute
from segmoe_kernels.stages.route import route_bwd, route_fwd, router_options
from segmoe_kernels.stages.shared import shared_bwd, shared_fwd

# Tensors that are given: x, router's weight and start, mask, two seeds, experts, shared expert, its
# gate and seed, and what the choices are where the experts don't run here.
_NUM_TENSORS = 21
_EXPERTS, _SHARED = slice(6, 12), slice(12, 19)


def _tokens(x: Tensor, up_proj: Tensor, top_k: int) -> Tensor:
    """What the experts see: x in their dtype, once for each of several choices."""
    x = x.to(up_proj.dtype)
    return x if top_k == 1 else x.expand(top_k, *x.shape)


def _laid_out(given: Sequence[Any]) -> tuple[Any, ...]:
    """The routed part's tensors as kernels read them; other strides are copied in both passes."""
    x, router_weight, router_start, mask, *seeds = given[:6]
    start = None if router_start is None else router_start.contiguous()
    weights = rows_contiguous(FFNWeights(*given[_EXPERTS]))
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, within_reach(router_weight), start, step_flags(mask, x.dtype), *seeds, *weights


def _of_shared(given: Sequence[Any]) -> tuple[Any, ...]:
    """What `shared_fwd` is given."""
    return given[0], given[3], *given[12:20]


def _routed_fwd(given: Sequence[Any], router: Any, scope: Any) -> tuple[Tensor, ...]:
    """Choices, logits, probs, their weights, ids and counts, and what backward needs besides."""
    x, router_weight, router_start, mask, router_seed, seed, *weights = _laid_out(given)
    logits, probs, topk_weights, topk_ids, counts = route_fwd(
        x, router_weight, router_start, mask, router_seed, *router
    )
    order = permute(topk_ids, router_weight.shape[0], counts)
    sorted_to_slot, offsets = order.sorted_to_slot, order.expert_offsets
    out, *hidden = expert_ffn_fwd(
        *(_tokens(x, weights[0], router[1]), topk_weights, sorted_to_slot, offsets),
        *(*weights, mask, seed, *scope),
    )
    shown = (out, logits, probs, topk_weights, topk_ids, order.expert_counts)
    if not scope[-1]:
        return shown
    # One dimension is for what is not kept.
    return *shown, sorted_to_slot, offsets, *(t for t in hidden if t.ndim == 2)


def _routed_bwd(
    given: Sequence[Any], router: Any, scope: Any, need: Any, grads: Any, kept: Any
) -> list[Tensor | None]:
    """Gradients of x, the router's weight and start, and the experts' weights."""
    x, router_weight, router_start, mask, router_seed, seed, *weights = _laid_out(given)
    dout, dlogits, dprobs, dtopk_weights = grads
    logits, topk_weights, topk_ids, sorted_to_slot, offsets, *hidden = kept
    hidden += [x.new_empty(0)] * (2 - len(hidden))
    need_dx, need_drouter, need_dw = need[0], need[1] or need[2], any(need[_EXPERTS])
    dslots = drows = None
    dweights: list[Tensor | None] = [None] * 6
    if dout is not None:
        tokens = _tokens(x, weights[0], router[1])
        needs = (need_dx, need_dx or need_drouter, need_dw)
        dslots, drows, *found = expert_ffn_bwd(
            *(tokens, topk_weights, sorted_to_slot, offsets, *weights, mask, seed),
            *(dout, *hidden, *scope[:-1], *needs),
        )
        dslots = by_choice(dslots).to(x.dtype) if need_dx else None
        if need_dw:
            dweights = [None if w is None else found.pop(0) for w in weights]
    if not need_dx and not need_drouter:
        return [None, None, None, *dweights]
    dx, drouter, dstart = route_bwd(
        *(x, router_weight, router_start, mask, router_seed, logits, topk_ids),
        *(dtopk_weights, drows, dprobs, dlogits, dslots),
        *(router[0], *router[2:], need_dx, need_drouter),
    )
    return [dx if need_dx else None, drouter, dstart, *dweights]


@taped
def _whole_fwd(*given: Any) -> tuple[Tensor, ...]:
    """Outputs of `_Whole`, of its arguments."""
    out, router, scope, last = given[_NUM_TENSORS - 1 :]
    kept: list[Tensor] = []
    if router is not None:
        out, *kept = _routed_fwd(given, router, scope)
    if last is None:
        return out, *kept
    if given[12] is None:
        return combine_fwd(out, None, None, step_flags(given[3], out.dtype)), *kept
    y, *more = shared_fwd(by_choice(out), _of_shared(given), last[1:])
    return y, *kept, *more


@taped
def _whole_bwd(*given: Any) -> tuple[Tensor | None, ...]:
    """Gradients of `_Whole`'s tensors."""
    router, scope, last, need, dy, *grads = given[_NUM_TENSORS - 1 :][:8]
    kept = given[_NUM_TENSORS + 7 :]
    # The shared expert's begin with its gate's logits, (M,); hidden layers have two dimensions.
    least = 0 if router is None else 5
    split = next((i for i, t in enumerate(kept) if i >= least and t.ndim == 1), len(kept))
    found: list[Tensor | None] = [None] * (_NUM_TENSORS - 1)
    dx = None
    if last is not None and dy is not None:
        if split < len(kept) and (need[0] or any(need[_SHARED])):
            needs = (need[0], *need[_SHARED])
            dx, *found[_SHARED] = shared_bwd(dy, _of_shared(given), last[1:], kept[split:], needs)
        dy = dy if last[0] == 1 else dy.expand(last[0], *dy.shape)
    if router is not None:
        routed = _routed_bwd(given, router, scope, need, (dy, *grads), kept[:split])
        found[:3], found[_EXPERTS] = routed[:3], routed[3:]
    if dx is not None:
        found[0] = dx.to(given[0].dtype) if found[0] is None else found[0].add_(dx)
    return *found, by_choice(dy) if need[-1] else None


class _Whole(torch.autograd.Function):
    """Keeps x, the weights, ``4 * (E + 2 * top_k)`` bytes a segment, and the slots' order.

    Wider rows keep the experts' hidden layer before its activation, and so does a shared expert,
    beside its gate's logits and, where that is a copy, x laid out as rows.
    """

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = _whole_fwd(*given)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, router, scope, last = inputs
        ctx.options = router, scope, last
        kept = output[1:]
        differentiable = 1 if router is None else 4
        if router is not None:
            logits, _, topk_weights, topk_ids, _, *rest = kept
            kept = (logits, topk_weights, topk_ids, *rest)
        ctx.mark_non_differentiable(*output[differentiable:])
        # As zeros those of the kept layers would be as large as they are.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shown = grads[:4] if ctx.options[0] is not None else (grads[0], None, None, None)
        if all(d is None for d in shown):
            return (None,) * (_NUM_TENSORS + 3)
        need, saved = ctx.needs_input_grad[:_NUM_TENSORS], ctx.saved_tensors
        tensors, kept = saved[: _NUM_TENSORS - 1], saved[_NUM_TENSORS - 1 :]
        found = _whole_bwd(*tensors, *ctx.options, need, *shown, *kept)
        return *(d if n else None for d, n in zip(found, need, strict=True)), None, None, None


def _run(
    x: Tensor, weights: LayerWeights, options: Options, padding_mask: Tensor | None, *, whole: bool
) -> tuple[Tensor, ...]:
    """Outputs of `_Whole` for stages 1 to 3, or to 4."""
    router_weight, experts, shared, shared_gate, _, _, start = weights
    seeds = draw_seed(options.router_dropout, x), draw_seed(options.dropout, x)
    of_shared: tuple[Tensor | None, ...] = shared or (None,) * 6
    followed = is_followed(x, router_weight, start, *experts, *of_shared, shared_gate)
    # An exported program has no backward; what that needs has another shape at some lengths.
    keep = followed and not torch.compiler.is_exporting()
    concat, top_k = options.expert_scope == "segment", options.top_k
    scope = (options.segment_size, concat, options.activation, options.dropout, keep)
    last: tuple[Any, ...] | None = (top_k,) if whole and top_k > 1 else None
    shared_seed = None
    if shared is not None:
        # A row of the shared expert has as many steps as fit.
        steps = shared.up_proj.shape[-1] // x.shape[-1]
        last = (top_k, steps, options.activation, options.dropout, keep)
        shared_seed = draw_seed(options.dropout, x)
    out: tuple[Tensor, ...] = apply(
        *(_Whole, x, router_weight, start, padding_mask, *seeds, *experts),
        *(*of_shared, shared_gate, shared_seed, None, router_options(options), scope, last),
        followed=followed,
    )
    return out


def whole_layer(
    x: Tensor, weights: LayerWeights, options: Options, padding_mask: Tensor | None
) -> tuple[Tensor, Routing]:
    """Stages 1 to 4 in order, as `pipeline.in_order` runs them."""
    y, logits, probs, topk_weights, topk_ids, counts, *_ = _run(
        x, weights, options, padding_mask, whole=True
    )
    return y, Routing(logits, probs, topk_weights, topk_ids, counts)


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
    weights = LayerWeights(router_weight, experts, router_start=router_start)
    out, *routed, counts = _run(x, weights, options, padding_mask, whole=False)[:6]
    return by_choice(out), RouterOutput(*routed), counts


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
    """Run the shared expert, gate it and add the choices; see `reference.shared_combine`."""
    followed = is_followed(expert_out, x, *shared, shared_gate)
    keep = followed and not torch.compiler.is_exporting()
    last = (expert_out.shape[0], segment_size, activation, dropout, keep)
    nothing = (None,) * 8
    y: Tensor = apply(
        *(_Whole, x, None, None, padding_mask, *nothing, *shared, shared_gate),
        *(draw_seed(dropout, x), expert_out, None, None, last),
        followed=followed,
    )[0]
    return y
