"""What is known of other models' dense FFNs: their linear maps, activation and dropout."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["UNDERSTOOD", "DenseFFN", "activation_of", "read_ffn"]

UNDERSTOOD = (
    "be a torch.nn.TransformerEncoderLayer, a Sequential of Linear, activation (GELU, ReLU, SiLU), "
    "perhaps Dropout, and Linear, a module of gate_proj, up_proj, down_proj and act_fn, or an "
    "encoder layer of attention, conv1, conv2, norm1, norm2, dropout and activation"
)

# Names of the activations that Hugging Face and torch use, as classes or functions.
_ACTIVATIONS = {
    "relu": "relu",
    "ReLU": "relu",
    "silu": "silu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "gelu": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


class DenseFFN(NamedTuple):
    """What `replace_ffn` knows of a dense FFN."""

    up: nn.Linear | nn.Conv1d
    down: nn.Linear | nn.Conv1d
    gate: nn.Linear | None
    activation: str
    dropout: float
    behind: nn.Module | None  # a dropout on its output


def activation_of(function: Any) -> str | None:
    """Our name of an activation module or function; None for one that no kernel computes."""
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    if function is F.relu or function is torch.relu:
        return "relu"
    if isinstance(function, nn.Module):
        return _ACTIVATIONS.get(type(function).__name__)
    return _ACTIVATIONS.get(str(getattr(function, "__name__", "")))


def read_ffn(module: nn.Module) -> DenseFFN | None:
    """Understand a dense FFN, or return None."""
    if type(module) is nn.TransformerEncoderLayer:
        own = module.linear1, module.linear2, None, module.activation, _rate(module.dropout), None
        return _describe(*own)
    if isinstance(module, nn.Sequential):
        parts = [part for part in module if not isinstance(part, nn.Identity)]
        behind = parts.pop() if len(parts) > 3 and isinstance(parts[-1], nn.Dropout) else None
        inside = len(parts) == 4 and isinstance(parts[2], nn.Dropout)
        dropout = _rate(parts.pop(2)) if inside else 0.0
        if len(parts) != 3:
            return None
        return _describe(parts[0], parts[2], None, parts[1], dropout, behind)
    children = dict(module.named_children())
    function = getattr(module, "activation", None)
    if children.keys() - {"activation"} == _CONVOLUTIONAL:
        dropout = _rate(module.dropout)
        return _describe(module.conv1, module.conv2, None, function, dropout, None)
    if children.keys() - {"act_fn"} == {"up_proj", "gate_proj", "down_proj"}:
        function = getattr(module, "act_fn", None)
        gate = module.gate_proj
        return _describe(module.up_proj, module.down_proj, gate, function, 0.0, None)
    return None


# Children of the encoder layer in Time-Series-Library, in neuralforecast and elsewhere.
_CONVOLUTIONAL = {"attention", "conv1", "conv2", "norm1", "norm2", "dropout"}


def _rate(dropout: Any) -> float:
    return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0


def _describe(
    up: Any, down: Any, gate: Any, function: Any, dropout: float, behind: nn.Module | None
) -> DenseFFN | None:
    """Check that the parts make an FFN that `SegMoE` computes."""
    activation = activation_of(function)
    linears = [up, down] if gate is None else [up, down, gate]
    if activation is None or not all(_is_linear(part) for part in linears):
        return None
    width, hidden = up.weight.shape[1], up.weight.shape[0]
    fits = down.weight.shape[:2] == (width, hidden)
    if gate is not None:
        fits = fits and gate.weight.shape[:2] == (hidden, width)
    return DenseFFN(up, down, gate, activation, dropout, behind) if fits else None


def _is_linear(module: Any) -> bool:
    """Whether it is a linear map of each step, and no subclass, which may do more."""
    if type(module) is nn.Conv1d:
        one = module.kernel_size == (1,) and module.stride == (1,) and module.groups == 1
        return one and module.padding in {(0,), "valid", "same"}
    return type(module) is nn.Linear
