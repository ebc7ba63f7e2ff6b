"""Our grouped kernels as an experts implementation of Hugging Face's ``transformers``.

::

    from segmoe_kernels.models.huggingface import register_experts
    register_experts()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="segmoe")
"""

from typing import Any

import torch
from torch import Tensor, nn

from segmoe_kernels import functional
from segmoe_kernels import validation as check
from segmoe_kernels.models.dense import activation_of
from segmoe_kernels.routing import FFNWeights

__all__ = ["experts_forward", "register_experts"]


def register_experts(name: str = "segmoe") -> None:
    """Make ``experts_implementation=name`` run `experts_forward`.

    Args:
        name: what configurations call it.

    Raises:
        ImportError: without transformers >= 5.
        TypeError: if name is not a string.
    """
    check.check_string("register_experts", "name", name)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        message = "register_experts needs Hugging Face's experts interface: transformers >= 5"
        raise ImportError(message) from error
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts of a Hugging Face module on tokens that its router has sent.

    Args:
        self: the experts module, with ``gate_up_proj (E, 2F, D)`` or ``up_proj``, ``down_proj
            (E, D, F)``, ``act_fn``, and the flags that ``use_experts_implementation`` sets.
        hidden_states: (N, D).
        top_k_index: (N, k) integers; what is not in [0, E) belongs to another rank's expert.
        top_k_weights: (N, k).

    Returns:
        (N, D), the choices' outputs times their weights, summed.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for experts that our kernels don't compute: an activation other than GELU, SiLU
            or ReLU, a gate of their own, or a norm behind; and for a wrong shape.
    """
    weights, activation = _weights_of(self)
    num_experts = weights.up_proj.shape[0]
    _check_choices(hidden_states, top_k_index, top_k_weights)
    inside = (top_k_index >= 0) & (top_k_index < num_experts)
    ids = torch.where(inside, top_k_index, -1).int()
    permutation = functional.permute(ids, num_experts)
    # Routing weights are float32 at the least.
    share = top_k_weights.to(torch.promote_types(hidden_states.dtype, torch.float32))
    out = functional.expert_ffn(
        hidden_states[None],
        torch.where(inside, share, 0.0),
        permutation,
        weights,
        segment_size=1,
        activation=activation,
    )
    return functional.combine(out)[0]


def _check_choices(hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> None:
    name = "experts_forward"
    check.check_tensor(name, "hidden_states", hidden_states)
    if hidden_states.ndim != 2:
        rule = "have shape (N, D)"
        check.fail_value(name, "hidden_states", rule, tuple(hidden_states.shape))
    check.check_tensor(name, "top_k_weights", top_k_weights)
    integers = (torch.int32, torch.int64)
    if not isinstance(top_k_index, Tensor) or top_k_index.dtype not in integers:
        got = getattr(top_k_index, "dtype", type(top_k_index).__name__)
        check.fail_type(name, "top_k_index", "have dtype torch.int32 or torch.int64", got)
    if top_k_index.ndim != 2 or top_k_index.shape[0] != hidden_states.shape[0]:
        rule = f"have shape (N={hidden_states.shape[0]}, k)"
        check.fail_value(name, "top_k_index", rule, tuple(top_k_index.shape))
    if top_k_weights.shape != top_k_index.shape:
        rule = f"have shape {tuple(top_k_index.shape)} as top_k_index"
        check.fail_value(name, "top_k_weights", rule, tuple(top_k_weights.shape))


def _weights_of(experts: Any) -> tuple[FFNWeights, str]:
    kind = type(experts).__name__
    gated, biased = getattr(experts, "has_gate", True), getattr(experts, "has_bias", False)
    own = getattr(type(experts), "_apply_gate", None)
    if gated and own is not None and own.__module__ != "transformers.integrations.moe":
        rule = "gate by act(gate) * up"
        check.fail_value("experts_forward", kind, rule, f"a gate of its own in {own.__module__}")
    names = ["act_fn", "gate_up_proj" if gated else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names[1:] if biased]
    if missing := [name for name in names if not hasattr(experts, name)]:
        rule = f"have {', '.join(names)}"
        check.fail_value("experts_forward", kind, rule, f"none of the name {missing[0]}")
    activation = activation_of(experts.act_fn)
    if activation is None:
        rule = "activate by GELU, SiLU or ReLU"
        got = getattr(experts.act_fn, "__name__", type(experts.act_fn).__name__)
        check.fail_value("experts_forward", kind, rule, got)
    if getattr(experts, "has_post_expert_norm", False):
        check.fail_value("experts_forward", kind, "have no norm behind the experts", "one")

    def matrix(name: str) -> Tensor:
        weight: Tensor = getattr(experts, name)
        return weight.transpose(1, 2) if getattr(experts, "is_transposed", False) else weight

    down, down_bias = matrix("down_proj"), experts.down_proj_bias if biased else None
    if not gated:
        up_bias = experts.up_proj_bias if biased else None
        return FFNWeights(matrix("up_proj"), down, None, up_bias, None, down_bias), activation
    concatenated = getattr(experts, "is_concatenated", True)
    gate, up = _halves(matrix("gate_up_proj"), concatenated=concatenated)
    gate_bias = up_bias = None
    if biased:
        gate_bias, up_bias = _halves(experts.gate_up_proj_bias, concatenated=concatenated)
    return FFNWeights(up, down, gate, up_bias, gate_bias, down_bias), activation


def _halves(fused: Tensor, *, concatenated: bool) -> tuple[Tensor, Tensor]:
    """``(gate, up)`` of a fused projection: one behind the other, or row by row."""
    if concatenated:
        gate, up = fused.chunk(2, dim=1)
        return gate, up
    return fused[:, 0::2], fused[:, 1::2]
