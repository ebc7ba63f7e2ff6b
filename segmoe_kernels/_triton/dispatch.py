"""Operators past PyTorch's dispatcher, which takes time even where nobody listens to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from segmoe_kernels._triton.kernels import LISTENER

__all__ = ["VALUES", "is_heard", "undispatched"]

VALUES = {type(None), bool, int, float, str, list, tuple}


def undispatched(operator: Callable[..., Any], body: Callable[..., Any]) -> Callable[..., Any]:
    """The operator as eager code calls it.

    Args:
        operator: registered with PyTorch.
        body: what it runs for tensors of a CPU or GPU.

    Returns:
        A function of the operator's arguments, in order.
    """

    def call(*args: Any) -> Any:
        return operator(*args) if is_heard(args[0]) or _has_a_say(args) else body(*args)

    return call


def is_heard(x: Tensor) -> bool:
    """Whether something between a call and its kernels has a say: compilers, modes, transforms."""
    if torch.compiler.is_compiling():
        return True
    if LISTENER.recorder is not None:  # it wants PyTorch's operators, not ours
        return False
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or not (x.is_cuda or x.is_cpu)
    )


def _has_a_say(args: tuple[Any, ...]) -> bool:
    """Whether an argument does: another class of tensors, or one that autograd follows."""
    recorded = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is nn.Parameter:
            if recorded and arg.requires_grad:
                return True
        elif kind not in VALUES:
            return True
    return False
