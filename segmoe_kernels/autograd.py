"""How this package calls its ``autograd.Function``s."""

from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers

__all__ = ["apply"]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, every parameter of ``forward`` given.

    PyTorch's own binds args to the signature in every call, as long as a small kernel runs; that
    serves defaults, which are not used here. Transforms of torch.func and compilers get PyTorch's.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
