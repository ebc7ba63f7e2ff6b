"""How this package calls its ``autograd.Function``s, and what keeps autocast out of them."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_unwrap: Any = torch._C._functorch.unwrap_if_dead

__all__ = ["apply", "autocast_is_on", "is_followed", "no_autocast"]


def apply(function: type[torch.autograd.Function], *args: Any, followed: bool = True) -> Any:
    """``function.apply(*args)``, every parameter of ``forward`` given.

    PyTorch's own binds args to the signature in every call, as long as a small kernel runs; that
    serves defaults, which are not used here. Transforms of torch.func and compilers get PyTorch's.
    What is not ``followed``, as `is_followed` says, runs ``forward`` alone.
    """
    if torch.compiler.is_compiling():
        # Of what is not followed it counts the parameters, which may be ``*args``.
        return function.apply(*args) if followed else function.forward(*args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # What is left of tensors that a transform has wrapped, and somebody kept.
    given = [_unwrap(arg) if isinstance(arg, Tensor) else arg for arg in args]
    if followed:
        return super(torch.autograd.Function, function).apply(*given)  # type: ignore[misc]
    return function.forward(*given)


def is_followed(*args: Any) -> bool:
    """Whether autograd follows what is made of tensors, backward or forward."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for arg in args:
            if arg is not None and arg.requires_grad:
                return True
    return False


def autocast_is_on(device_type: str) -> bool:
    """Whether ``torch.autocast`` holds for a kind of device."""
    # The meta device has no autocast; what says so, Dynamo traces only from torch 2.12 on.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast; entering torch's for nothing costs a small layer."""
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
