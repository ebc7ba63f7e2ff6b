"""Operators past PyTorch's dispatcher, which takes time even where nobody listens to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from segmoe_kernels._triton.prepared import LISTENER

__all__ = ["is_heard", "undispatched"]

_VALUES = {type(None), bool, int, float, str, list, tuple}


def undispatched(operator: Callable[..., Any], body: Callable[..., Any]) -> Callable[..., Any]:
    """The operator as eager code calls it.

    Args:
        operator: registered with PyTorch.
        body: what it runs for tensors of a CPU or GPU.

    Returns:
        A function of the operator's arguments, in order.
    """

    def call(*args: Any) -> Any:
        return operator(*args) if is_heard(args) else body(*args)

    return call


def is_heard(args: tuple[Any, ...]) -> bool:
    """Whether something between a call and its kernels has a say: compilers, modes, autograd."""
    if torch.compiler.is_compiling():
        return True
    if LISTENER.recorder is not None:  # it wants PyTorch's operators, not ours
        return False
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    if not (args[0].is_cuda or args[0].is_cpu):
        return True
    recorded = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is nn.Parameter:
            if recorded and arg.requires_grad:
                return True
        elif kind not in _VALUES:  # another class of tensors
            return True
    return False
