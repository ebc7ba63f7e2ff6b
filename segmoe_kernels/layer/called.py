"""The layer around linear maps that are more than their weights: PyTorch calls them.

An adapter, a quantised map, a subclass or a hook does something where it is called. So where one of
the shared expert, the shared gate or the projections is of that kind, or the shared gate has a
bias, all of these are called, and the backend's stages run what is between them.
"""

import math
from collections.abc import Callable
from functools import partial

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
    """As `functional.run_layer`; shared expert, shared gate and projections are called.

    ``run`` runs router and experts, whose weights alone are given.
    """
    options = _checked(x, weights, options, shared, shared_gate, in_proj, out_proj)
    length, d_model = x.shape[-2:]
    segment_size = options.segment_size
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


def _checked(
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    shared: FeedForward | None,
    shared_gate: nn.Module | None,
    in_proj: nn.Module | None,
    out_proj: nn.Module | None,
) -> Options:
    """Refuse modules that don't fit x and each other; what `Options.checked` gives."""
    fail = partial(check.fail_value, "SegMoE.forward")
    # On these the stages run locally, which a module can't.
    if any(hasattr(w, "device_mesh") for w in (x, weights.router_weight, weights.experts.up_proj)):
        rule = "have plain torch.nn.Linear modules where tensors are DTensors"
        fail("layer", rule, "a subclass, an adapter, a hook or a shared_gate with a bias")
    named = {"shared_gate": shared_gate, "in_proj": in_proj, "out_proj": out_proj}
    for name, part in named.items():
        check.check_linear("SegMoE.forward", name, part, x)
    options = options.checked("SegMoE.forward")
    narrow, wide = x.shape[-1], x.shape[-1] * (options.segment_size if in_proj is None else 1)
    if (shared is None) != (shared_gate is None):
        fail("shared_expert", "come with shared_gate", "only one of them")
    if shared is not None and shared.d_model not in {narrow, wide}:
        rule = f"have a width of {narrow} (token) or {wide} (segment)"
        fail("shared_expert", rule, shared.d_model)
    if shared is not None and shared.d_model != narrow and weights.router_start is not None:
        rule = f"have width {narrow} (token) in a causal layer: a wider one sees later steps"
        fail("shared_expert", rule, shared.d_model)
    return options
