"""Kernels that tell who writes down their launches, `tape`."""

import threading
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

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
        # What stands for constants, of which the launcher takes none.
        self.constants = (None,) * sum(param.is_constexpr for param in self.params)

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        """Launch, as `JITFunction.run` does."""
        compiled = super().run(*args, grid=grid, warmup=warmup, **kwargs)
        if LISTENER.recorder is not None:
            LISTENER.recorder.launched(self, compiled, grid, args)
        return compiled


def recorded_jit(**options: Any) -> Any:
    """`triton.jit`, for kernels that are launched.

    Triton's interpreter has its own; on ROCm kernels depend on the size of tensors, too.
    """

    def decorate(function: Any) -> Any:
        if knobs.runtime.interpret or torch.version.hip is not None:
            return triton.jit(function, **options)
        return Kernel(function, **options)

    return decorate
