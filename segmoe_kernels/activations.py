"""The activations of a hidden layer: what PyTorch computes, and what is the same elsewhere.

The kernels' forms of the same names are in `segmoe_kernels._triton.activations`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation"]


class Activation(NamedTuple):
    """One activation.

    Attributes:
        function: what it computes, element by element.
        aliases: functions, module classes and names of classes in ``transformers.activations`` that
            compute the same. A class of the same name elsewhere may compute something else.
    """

    function: Callable[[Tensor], Tensor]
    aliases: tuple[Any, ...] = ()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, ("GELUActivation",)),
    "gelu_tanh": Activation(
        _gelu_tanh, ("NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh")
    ),
    "silu": Activation(F.silu, (nn.SiLU, "SiLUActivation")),
    "relu": Activation(F.relu, (nn.ReLU, torch.relu)),
}
