"""Launches that Triton has prepared before go to its launcher directly.

`JITFunction.run` specialises a kernel on its arguments in every launch: their types, and whether a
number is 1 or divided by 16, and a pointer aligned. That takes as long as a small kernel. Here a
launch that is alike in all of these takes the compiled kernel that `JITFunction.run` gave before.
"""

from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# The largest number that Triton passes in 32 bits.
_MAX_INT32 = 2**31 - 1
# Of each kernel. Lengths that change with every batch make no new ones.
_MOST_PREPARED = 256
# What replaces it, as those do that catch launches, sees all of them.
_RUN = JITFunction.run


class Kernel(JITFunction):  # type: ignore[misc]  # Triton has no types
    """A kernel whose constants are given by name, behind all other arguments."""

    def __init__(self, fn: Any, **options: Any) -> None:
        super().__init__(fn, **options)
        self.prepared: dict[Any, Any] = {}
        self.of_the_batch = [param.do_not_specialize for param in self.params]
        self.num_arguments = sum(not param.is_constexpr for param in self.params)
        # What stands for constants, of which the launcher takes none.
        self.constants = (None,) * (len(self.params) - self.num_arguments)

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        """Launch, as `JITFunction.run` does."""
        hooks = knobs.runtime
        plain = (
            JITFunction.run is _RUN
            and not warmup
            and len(args) == self.num_arguments
            and not self.pre_run_hooks
            and not hooks.launch_enter_hook.calls
            and not hooks.launch_exit_hook.calls
            and getattr(hooks, "add_stages_inspection_hook", None) is None  # not in Triton 3.5
        )
        pointers: list[int] = []
        key = self._key(args, kwargs, pointers) if plain else None
        aligned = 0
        for pointer in pointers:
            aligned |= pointer
        if key is None or aligned & 15:
            return super().run(*args, grid=grid, warmup=warmup, **kwargs)
        known = self.prepared.get(key)
        if known is None:
            compiled = super().run(*args, grid=grid, warmup=warmup, **kwargs)
            if len(self.prepared) >= _MOST_PREPARED:
                self.prepared.clear()
            self.prepared[key] = compiled
            return compiled
        stream = driver.active.get_current_stream(key[0])
        known.run(
            *(*grid, 1, 1)[:3],
            stream,
            known.function,
            known.packed_metadata,
            None,
            None,
            None,
            *args,
            *self.constants,
        )
        return known

    def _key(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], pointers: list[int]
    ) -> tuple[Any, ...]:
        """All that a compiled kernel depends on, if pointers, which are added, are aligned."""
        key = [driver.active.get_current_device(), *kwargs, *kwargs.values()]
        key += (knobs.runtime.debug, getattr(knobs.compilation, "instrumentation_mode", None))
        for value, of_the_batch in zip(args, self.of_the_batch, strict=False):
            if of_the_batch:
                key.append(value <= _MAX_INT32)
            else:
                _describe(value, key, pointers)
        return tuple(key)


def _describe(value: Any, key: list[Any], pointers: list[int]) -> None:
    kind = type(value)
    if kind is int:
        # 0, 1 and negative ones for themselves; else whether 16 divides it, and whether it is wide.
        key.append(value if value < 2 else (2 if value & 15 else 3) + 2 * (value > _MAX_INT32))
    elif value is None or kind is float:
        key.append(kind)
    elif kind is Tensor or kind is nn.Parameter or isinstance(value, Tensor):
        key.append(value.dtype)
        pointers.append(value.data_ptr())
    elif isinstance(value, tuple):
        key += (kind, len(value))
        for part in value:
            _describe(part, key, pointers)
    else:
        key += (kind, value)


def prepared_jit(**options: Any) -> Any:
    """`triton.jit`, for kernels that are launched.

    Triton's interpreter has its own; on ROCm kernels depend on the size of tensors, too.
    """

    def decorate(function: Any) -> Any:
        if knobs.runtime.interpret or torch.version.hip is not None:
            return triton.jit(function, **options)
        return Kernel(function, **options)

    return decorate
