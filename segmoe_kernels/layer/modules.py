"""The modules that hold the parameters of `SegMoE`: router, experts, and one dense FFN.

`SegMoE` calls them, as any module is called, so that hooks, parametrisations, adapters and sharding
of one of them work. They compute nothing: ``module(x, function)`` calls ``function(x, weights)``,
which runs the layer, and returns what that returns. So the layer runs *inside* these calls: FSDP2
gathers a module's weights before its call and frees them behind it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.routing import FFNWeights

__all__ = ["Experts", "FeedForward", "SegmentRouter"]


def call_around(
    parts: Sequence[nn.Module], x: Tensor, function: Callable[..., Any], *found: Any
) -> Any:
    """Call ``function(x, *weights)`` inside calls of all parts, with each one's weights."""
    if not parts:
        return function(x, *found)
    return parts[0](x, lambda x, own: call_around(parts[1:], x, function, *found, own))


def is_plain(linear: nn.Module | None) -> bool:
    """Whether reading a linear map's weights says all of it: no subclass, adapter or hook."""
    if linear is None:
        return True
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    hooked = hooked or linear._backward_hooks or linear._backward_pre_hooks
    # Other libraries' tensors may be quantised.
    return not hooked and check.is_torchs_own(linear.weight)


def _xavier_uniform_(weight: Tensor) -> None:
    """Xavier over the last two dimensions: each expert has the fan of its own matrix."""
    bound = math.sqrt(6.0 / (weight.shape[-1] + weight.shape[-2]))
    nn.init.uniform_(weight, -bound, bound)


class SegmentRouter(nn.Module):
    """Holds ``weight (E, W)`` and, for causal models, ``start (W,)``; W is the pooled width.

    Args:
        width: W.
        num_experts: E.
        causal: whether there is a start vector.
        factory: device and dtype of the parameters.
    """

    def __init__(
        self, width: int, num_experts: int, *, causal: bool = False, **factory: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width, **factory))
        self.start = nn.Parameter(torch.empty(width, **factory)) if causal else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the weight; the start vector looks like a normalised segment."""
        _xavier_uniform_(self.weight)
        if self.start is not None:
            nn.init.normal_(self.start)

    def forward(self, x: Tensor, function: Callable[..., Any]) -> Any:
        """Return ``function(x, (weight, start))``."""
        return function(x, (self.weight, self.start))

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        width, causal = self.weight.shape[1], self.start is not None
        return f"width={width}, num_experts={self.weight.shape[0]}, causal={causal}"


class Experts(nn.Module):
    """E FFNs stacked: ``up_proj (E, F, D)``, ``down_proj (E, D, F)``, optional gate and biases.

    Args:
        num_experts: E.
        d_model: D, width of a row.
        d_ff: F, width of the hidden layer.
        gated: whether there is a gate.
        bias: whether there are biases.
        factory: device and dtype of the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        *,
        gated: bool = False,
        bias: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, **factory))

        self.up_proj = parameter(d_ff, d_model)
        self.gate_proj = parameter(d_ff, d_model) if gated else None
        self.down_proj = parameter(d_model, d_ff)
        self.up_proj_bias = parameter(d_ff) if bias else None
        self.gate_proj_bias = parameter(d_ff) if bias and gated else None
        self.down_proj_bias = parameter(d_model) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for each expert on its own, zero biases (official initialisation)."""
        for parameter in self.parameters():
            if parameter.ndim == 3:
                _xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def weights(self) -> FFNWeights:
        """The parameters as the functions take them."""
        return FFNWeights(
            self.up_proj,
            self.down_proj,
            self.gate_proj,
            self.up_proj_bias,
            self.gate_proj_bias,
            self.down_proj_bias,
        )

    def forward(self, x: Tensor, function: Callable[..., Any]) -> Any:
        """Return ``function(x, weights)``."""
        return function(x, self.weights())

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        _, d_ff, d_model = self.up_proj.shape
        gated, bias = self.gate_proj is not None, self.up_proj_bias is not None
        return (
            f"num_experts={self.num_experts}, d_model={d_model}, d_ff={d_ff}, "
            f"gated={gated}, bias={bias}"
        )


class FeedForward(nn.Module):
    """One FFN held as `nn.Linear` modules: the shared expert, or the whole layer at E = 0.

    Args:
        d_model: width of a row.
        d_ff: width of the hidden layer.
        gated: whether there is a gate.
        bias: whether there are biases.
        factory: device and dtype of the parameters.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, gated: bool = False, bias: bool = False, **factory: Any
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias, **factory)
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias, **factory) if gated else None
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights, zero biases (official initialisation)."""
        for module in (self.up_proj, self.gate_proj, self.down_proj):
            if module is not None:
                reset_linear(module)

    def weights(self) -> FFNWeights:
        """The parameters as the functions take them."""
        gate = self.gate_proj
        return FFNWeights(
            self.up_proj.weight,
            self.down_proj.weight,
            None if gate is None else gate.weight,
            self.up_proj.bias,
            None if gate is None else gate.bias,
            self.down_proj.bias,
        )

    def forward(self, x: Tensor, function: Callable[..., Any]) -> Any:
        """Return ``function(x, self)``, as weights alone are not all of some linear maps."""
        return function(x, self)

    def is_plain(self) -> bool:
        """Whether its weights are all of it."""
        return all(is_plain(part) for part in (self.up_proj, self.gate_proj, self.down_proj))

    def run(self, rows: Tensor, activation: str, dropout: float) -> Tensor:
        """Compute `reference.experts.dense_ffn` by calls of the linear maps."""
        for name, part in self.named_children():
            check.check_linear("SegMoE.forward", f"shared_expert.{name}", part, rows)
        function = ACTIVATIONS[activation].function
        hidden = self.up_proj(rows)
        if self.gate_proj is None:
            hidden = function(hidden)
        else:
            hidden = function(self.gate_proj(rows)) * hidden
        out: Tensor = self.down_proj(F.dropout(hidden, dropout))
        return out


def reset_linear(linear: nn.Linear) -> None:
    """Xavier weight, zero bias (official initialisation)."""
    _xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
