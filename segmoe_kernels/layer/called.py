"""The layer around linear maps that are more than their weights: PyTorch calls them.

An adapter, a quantised map, a subclass or a hook does something where it is called. So where one of
the shared expert, its gate or the projections is of that kind, or the gate has a bias, all of these
are called, and the backend's stages run what is between them.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.functional import combine
from segmoe_kernels.layer.modules import FeedForward
from segmoe_kernels.options import Options
from segmoe_kernels.routing import LayerWeights, Routing
from segmoe_kernels.segments import segments, valid_steps

__all__ = ["run_called"]


def run_called(
    run: Callable[..., tuple[Tensor, Routing]],
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    padding_mask: Tensor | None,
    backend: str,
    shared: FeedForward | None,
    shared_gate: nn.Module | None,
    in_proj: nn.Module | None,
    out_proj: nn.Module | None,
) -> tuple[Tensor, Routing]:
    """As `functional.run_layer`, of whose weights the rest are called.

    Args:
        run: runs router and experts, or what parallel layers have in its place.
        x: (..., T, D).
        weights: of the router and the experts alone.
        options: of the layer.
        padding_mask: (..., T) bool.
        backend: see `functional.resolve_backend`.
        shared: called on rows of ``P * D`` or D columns, or None.
        shared_gate: called on the same rows; gives one column.
        in_proj: called on (B, J, P * D); gives D columns. None but for "projected".
        out_proj: called on (B, J, D); gives ``P * D`` columns.

    Returns:
        ``(y, routing)``.

    Raises:
        TypeError: for a linear map whose weights have another dtype than x, or are sparse.
        ValueError: for one on another device, and for DTensors, on which the stages run locally,
            and a module can't.
    """
    if any(
        hasattr(tensor, "device_mesh")
        for tensor in (x, weights.router_weight, weights.experts.up_proj)
    ):
        rule = "have plain torch.nn.Linear modules where tensors are DTensors"
        check.fail_value(
            "SegMoE.forward",
            "layer",
            rule,
            "a subclass, an adapter, a hook or a shared_gate with a bias",
        )
    named = {"shared_gate": shared_gate, "in_proj": in_proj, "out_proj": out_proj}
    for name, part in named.items():
        check.check_linear("SegMoE.forward", name, part, x)
    options = options.checked("SegMoE.forward")
    if in_proj is not None and options.pooling != "concat":
        rule = "be 'concat' with expert_scope='projected'"
        check.fail_value("SegMoE.forward", "pooling", rule, repr(options.pooling))
    length, d_model = x.shape[-2:]
    segment_size = options.segment_size
    if (shared is None) != (shared_gate is None):
        check.fail_value(
            "SegMoE.forward", "shared_expert", "come with shared_gate", "only one of them"
        )
    widths = (d_model, d_model if in_proj is not None else segment_size * d_model)
    if shared is not None and shared.d_model not in widths:
        rule = f"have a width of {widths[0]} (token) or {widths[1]} (segment)"
        check.fail_value("SegMoE.forward", "shared_expert", rule, shared.d_model)
    if weights.router_start is not None and shared is not None and shared.d_model != d_model:
        rule = f"have width {d_model} (token) in a causal layer: a wider one sees later steps"
        check.fail_value("SegMoE.forward", "shared_expert", rule, shared.d_model)
    tokens = x.reshape(math.prod(x.shape[:-2]), length, d_model)
    mask = real = None if padding_mask is None else padding_mask.reshape(tokens.shape[:2])
    if in_proj is not None:
        rows = segments(tokens, segment_size, mask).flatten(-2)
        real = None if mask is None else valid_steps(tokens, segment_size, mask).any(-1)
        # Back from the autocast dtype: the router sees x's.
        tokens = in_proj(rows).to(x.dtype)
        options = options._replace(segment_size=1, expert_scope="token")
    y, routing = run(tokens, weights, options, real)
    if shared is not None and shared_gate is not None:
        wide = shared.d_model // tokens.shape[-1]
        rows = segments(tokens, wide, real).flatten(-2)
        out = shared.run(rows, options.activation, options.dropout)
        logits = shared_gate(rows).squeeze(-1)
        y = combine(y[None], out.to(y), logits.to(y), padding_mask=real, backend=backend)
    if out_proj is not None:
        y = out_proj(y).unflatten(-1, (segment_size, d_model)).flatten(1, 2)[:, :length]
        y = y.to(x.dtype)
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
    return y.contiguous().reshape(x.shape), routing
