"""Auxiliary losses of the router, as pure functions, and their injection through autograd."""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels.autograd import apply
from segmoe_kernels.routing import Routing

__all__ = ["inject_loss", "load_balancing_loss", "router_z_loss"]


def _as_sequence(function: str, routings: Any) -> Sequence[Routing]:
    if isinstance(routings, Routing):
        return [routings]
    layers = list(routings) if isinstance(routings, Iterable) else []
    if not layers or not all(isinstance(layer, Routing) for layer in layers):
        kind = type(routings).__name__
        got = [type(layer).__name__ for layer in layers] or f"{kind} without one"
        check.fail_type(function, "routings", "be a Routing or a sequence of at least one", got)
    return layers


def load_balancing_loss(
    routings: Routing | Sequence[Routing], *, normalization: str = "global"
) -> Tensor:
    """Switch load balancing, ``E * sum_e f_e * P_e``, over the routed segments.

    ``f_e`` is the share of expert e in the choices, ``P_e`` the mean of its probability (after
    router dropout). The gradient flows through ``P_e`` only; perfectly balanced routing gives 1.

    Args:
        routings: of one layer, or of several with the same number of experts, such as
            `stats.collect_routings` gives.
        normalization: "global" pools the segments of all layers before ``f * P``: one loss for
            the whole model (official). "per_layer" is the mean of the layers' own losses. "switch"
            pools as "global" does and has ``f_e = count / segments``, which sums to top_k
            (Hugging Face, Time-MoE; balanced routing gives top_k).

    Returns:
        () float32 (float64 where the routing is). Zero where nothing was routed.

    Raises:
        TypeError: if routings are not Routing objects.
        ValueError: for an unknown option, or layers with different numbers of experts.

    Source: Fedus et al. 2022 (arXiv 2101.03961), equations 4 to 6; utils/LoadBalancingLoss.py of
    evortigosa/segmoe_forecast.
    """
    layers = _as_sequence("load_balancing_loss", routings)
    choices = ("global", "per_layer", "switch")
    check.check_choice("load_balancing_loss", "normalization", normalization, choices)
    sizes = {layer.router_probs.shape[1] for layer in layers}
    if len(sizes) > 1:
        rule = "have one number of experts"
        check.fail_value("load_balancing_loss", "routings", rule, sorted(sizes))
    like = layers[0].router_probs  # layers of a model may be on several devices
    sums = [layer.router_probs.sum(0).to(like) for layer in layers]
    counts = [layer.expert_counts.to(like) for layer in layers]
    segments = [(layer.topk_ids[:, :1] >= 0).sum().to(like) for layer in layers]
    if normalization != "per_layer":
        sums, counts = [torch.stack(sums).sum(0)], [torch.stack(counts).sum(0)]
        segments = [torch.stack(segments).sum()]
    losses = []
    for prob_sum, count, number in zip(sums, counts, segments, strict=True):
        share = count / (number if normalization == "switch" else count.sum()).clamp_min(1)
        losses.append(prob_sum.shape[0] * (share * prob_sum).sum() / number.clamp_min(1))
    return torch.stack(losses).mean()


def router_z_loss(routings: Routing | Sequence[Routing]) -> Tensor:
    """Mean over the routed segments of ``logsumexp(router_logits) ** 2``; keeps logits small.

    Args:
        routings: see `load_balancing_loss`; segments of all layers count alike.

    Returns:
        () as `load_balancing_loss`, whose TypeError there is, too.

    Source: Zoph et al. 2022 (arXiv 2202.08906), equation 5.
    """
    layers = _as_sequence("router_z_loss", routings)
    like = layers[0].router_logits
    totals, counts = [], []
    for layer in layers:
        routed = (layer.topk_ids >= 0).any(-1)  # False for a layer without experts
        squares = torch.where(routed, torch.logsumexp(layer.router_logits, dim=-1).square(), 0)
        totals.append(squares.sum().to(like))
        counts.append(routed.sum().to(like))
    return torch.stack(totals).sum() / torch.stack(counts).sum().clamp_min(1)


# Scalers by their id, as an operator takes no other object; apart, what has no weak references.
_SCALERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_KEPT_SCALERS: dict[int, Any] = {}


# Opaque to torch.compile, which refuses to trace torch.amp.GradScaler.
@torch.library.custom_op("segmoe_kernels::loss_scale", mutates_args=())
def _loss_scale(like: Tensor, scaler: int) -> Tensor:
    # A copy, as an operator must not return what is kept elsewhere.
    found = _SCALERS.get(scaler)  # whose truth is its own affair
    found = _KEPT_SCALERS[scaler] if found is None else found
    return torch.empty_like(like).copy_(found.scale(torch.ones_like(like)))


@_loss_scale.register_fake
def _(like: Tensor, scaler: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(like)


def check_scaler(function: str, argument: str, scaler: Any) -> Any:
    """Refuse what `scale_loss` can't use; let compiled code find what it can."""
    if isinstance(scaler, Real):
        return check.check_positive(function, argument, scaler)
    if scaler is None:
        return None
    if not callable(getattr(scaler, "scale", None)):
        rule = "be a number, None, or have scale(loss), as torch.amp.GradScaler has"
        check.fail_type(function, argument, rule, type(scaler).__name__)
    if isinstance(scaler, torch.nn.Module):
        rule = "be no module, which would become a part of the layer (wrap its scale in an object)"
        check.fail_type(function, argument, rule, type(scaler).__name__)
    try:
        _SCALERS[id(scaler)] = scaler
    except TypeError:
        _KEPT_SCALERS[id(scaler)] = scaler
    return scaler


def scale_loss(loss: Tensor, scaler: Any) -> Tensor:
    """Scale a loss as the task's is: by a number, None (1) or a linear ``scaler.scale(loss)``."""
    if scaler is None:
        return loss
    if isinstance(scaler, int | float):
        return loss * scaler
    traced = torch.compiler.is_compiling()
    scaled: Tensor = loss * _loss_scale(loss.detach(), id(scaler)) if traced else scaler.scale(loss)
    return scaled


class _InjectLoss(torch.autograd.Function):
    """Pass y through; in backward give ``loss`` the gradient 1. Saves nothing."""

    @staticmethod
    def forward(y: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.loss_dtype, ctx.loss_device = inputs[1].dtype, inputs[1].device

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=ctx.loss_dtype, device=ctx.loss_device)
        return grads[0], one


def inject_loss(y: Tensor, loss: Tensor) -> Tensor:
    """Return y, carrying ``loss``: whatever is made of y, backward adds the gradient of ``loss``.

    So an auxiliary loss needs no return path through models and training loops. The gradient of
    ``loss`` has the scale 1, whatever scale reaches y: with a loss scaler, scale ``loss`` first.

    Args:
        y: any shape.
        loss: ().

    Returns:
        y, same values.

    Raises:
        TypeError: for what is not a tensor of floats.
        ValueError: if loss is not a single number.

    Source: ``MoEAuxLossAutoScaler`` of Megatron-LM.
    """
    check.check_tensor("inject_loss", "y", y)
    check.check_tensor("inject_loss", "loss", loss)
    if loss.ndim:
        check.fail_value("inject_loss", "loss", "have shape ()", tuple(loss.shape))
    out: Tensor = apply(_InjectLoss, y, loss)
    return out
