"""Our grouped kernels as an experts implementation of Hugging Face's ``transformers``.

::

    from segmoe_kernels.huggingface import register_experts
    register_experts()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="segmoe")
"""

from typing import Any

import torch
from torch import Tensor, nn

from segmoe_kernels import functional
from segmoe_kernels import validation as check
from segmoe_kernels.dense_ffn import activation_of
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
    if not isinstance(name, str):
        check.fail_type("register_experts", "name", "be a str", type(name).__name__)
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
        ValueError: for experts that our kernels don't compute: an activation other than GELU, SiLU
            or ReLU, a gate of their own, or a norm behind.
    """
    weights, activation = _weights_of(self)
    num_experts = weights.up_proj.shape[0]
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


def _weights_of(experts: Any) -> tuple[FFNWeights, str]:
    kind = type(experts).__name__
    activation = activation_of(experts.act_fn)
    if activation is None:
        rule = "activate by GELU, SiLU or ReLU"
        check.fail_value("experts_forward", kind, rule, type(experts.act_fn).__name__)
    if getattr(experts, "has_post_expert_norm", False):
        check.fail_value("experts_forward", kind, "have no norm behind the experts", "one")
    gated, biased = getattr(experts, "has_gate", True), getattr(experts, "has_bias", False)

    def matrix(name: str) -> Tensor:
        weight: Tensor = getattr(experts, name)
        return weight.transpose(1, 2) if getattr(experts, "is_transposed", False) else weight

    down, down_bias = matrix("down_proj"), experts.down_proj_bias if biased else None
    if not gated:
        up_bias = experts.up_proj_bias if biased else None
        return FFNWeights(matrix("up_proj"), down, None, up_bias, None, down_bias), activation
    own = getattr(type(experts), "_apply_gate", None)
    if own is not None and own.__module__ != "transformers.integrations.moe":
        rule = "gate by act(gate) * up"
        check.fail_value("experts_forward", kind, rule, f"a gate of its own in {own.__module__}")
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
