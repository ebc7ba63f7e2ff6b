"""Launches that Triton has prepared before go to its launcher directly.

`JITFunction.run` specialises a kernel on its arguments in every launch: their types, and whether a
number is 1 or divided by 16, and a pointer aligned. That takes as long as a small kernel. Here a
launch that is alike in all of these takes the compiled kernel that `JITFunction.run` gave before.
"""

import threading
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


class Listener(threading.local):
    """Who writes down this thread's launches, a `tape.Recorder`."""

    recorder: Any = None


LISTENER = Listener()


def is_watched() -> bool:
    """Whether somebody has to see launches, or to change what is compiled for them."""
    runtime, compilation = knobs.runtime, knobs.compilation
    return bool(
        JITFunction.run is not _RUN
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)  # not in Triton 3.5
        or getattr(compilation, "instrumentation_mode", None)
    )


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
        plain = not warmup and len(args) == self.num_arguments
        plain = plain and not self.pre_run_hooks and not is_watched()
        pointers: list[int] = []
        key = self._key(args, kwargs, pointers) if plain else None
        aligned = 0
        for pointer in pointers:
            aligned |= pointer
        known = self.prepared.get(key) if key is not None and not aligned & 15 else None
        if known is not None:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            known.run(*launch_arguments(known, grid, stream), *args, *self.constants)
        else:
            known = super().run(*args, grid=grid, warmup=warmup, **kwargs)
            if key is not None and not aligned & 15:
                if len(self.prepared) >= _MOST_PREPARED:
                    self.prepared.clear()
                self.prepared[key] = known
        if LISTENER.recorder is not None:
            LISTENER.recorder.launched(self, known, grid, args)
        return known

    def _key(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], pointers: list[int]
    ) -> tuple[Any, ...]:
        """All that a compiled kernel depends on, if pointers, which are added, are aligned."""
        key = [driver.active.get_current_device(), *kwargs, *kwargs.values()]
        for value, of_the_batch in zip(args, self.of_the_batch, strict=False):
            if of_the_batch:
                key.append(value <= _MAX_INT32)
            else:
                _describe(value, key, pointers)
        return tuple(key)


def launch_arguments(compiled: Any, grid: tuple[int, ...], stream: int) -> tuple[Any, ...]:
    """What Triton's launchers take before a kernel's own arguments; the last are hooks."""
    blocks = (*grid, 1, 1)[:3]
    return (*blocks, stream, compiled.function, compiled.packed_metadata, None, None, None)


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
