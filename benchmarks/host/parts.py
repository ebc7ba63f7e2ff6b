"""Where the microseconds of a call go: exclusive times of its parts, less what the timers take."""

import functools
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver

from benchmarks.host.calls import Case, calls_of
from segmoe_kernels import SegMoE, autograd, functional, options, pipeline, validation
from segmoe_kernels._triton import launch, tape, tiles
from segmoe_kernels._triton.kernels import Kernel

__all__ = ["profile"]

_now = time.perf_counter_ns


class Timers:
    """Wraps functions; each call's time, less that of wrapped calls inside it, goes to its part."""

    def __init__(self) -> None:
        self.nanoseconds: Counter[str] = Counter()
        self.times: Counter[str] = Counter()
        self._inside = [0]
        # What a wrapper adds to its own time, and to that of its caller.
        self._own = self._callers = 0
        self._calibrate()

    def clear(self) -> None:
        """Forget what was timed."""
        self.nanoseconds.clear()
        self.times.clear()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0)
            start = _now()
            try:
                return function(*args, **kwargs)
            finally:
                taken = _now() - start
                self.nanoseconds[part] += taken - self._inside.pop() - self._own
                self.times[part] += 1
                self._inside[-1] += taken + self._callers

        return timed

    def _calibrate(self) -> None:
        def nothing() -> None:
            pass

        def least(function: Callable[[], None]) -> float:
            found = []
            for _ in range(200):
                start = _now()
                for _ in range(100):
                    function()
                found.append((_now() - start) / 100)
            return min(found)

        wrapped = self.wrap("", nothing)
        plain, outside = least(nothing), least(wrapped)
        inside = self.nanoseconds[""] / self.times[""]
        self._own = round(min(inside, outside) - plain)
        self._callers = round(outside - plain) - self._own
        self.clear()


def _everywhere(timers: Timers, part: str, functions: Iterable[Callable[..., Any]]) -> None:
    """Time functions under every name that the package's modules have for them."""
    wrapped = {id(function): timers.wrap(part, function) for function in functions}
    for name, module in list(sys.modules.items()):
        if name.startswith("segmoe_kernels"):
            for attribute, value in list(vars(module).items()):
                if id(value) in wrapped:
                    setattr(module, attribute, wrapped[id(value)])


def _method(timers: Timers, part: str, owner: Any, *names: str) -> None:
    for name in names:
        setattr(owner, name, timers.wrap(part, getattr(owner, name)))


def _functions_of(module: Any) -> list[Callable[..., Any]]:
    mine = (value for value in vars(module).values() if callable(value))
    return [f for f in mine if getattr(f, "__module__", "") == module.__name__]


def _operators(timers: Timers) -> None:
    """Time operators and their bodies; before any is defined."""
    define = launch.define_operator

    def timed(name: str, implementation: Callable[..., Any], *rest: Any, **options_: Any) -> Any:
        body = timers.wrap("operators: bodies", implementation)
        return timers.wrap("operators: calls", define(name, body, *rest, **options_))

    launch.define_operator = timed
    guard = launch.device_guard
    part = "device guard"

    class Guard:
        def __init__(self, x: torch.Tensor) -> None:
            self.guard = timers.wrap(part, guard)(x)

        def __enter__(self) -> None:
            timers.wrap(part, self.guard.__enter__)()

        def __exit__(self, *args: object) -> None:
            timers.wrap(part, self.guard.__exit__)(*args)

    launch.device_guard = Guard


def _install(timers: Timers) -> None:
    _operators(timers)
    _triton(timers)
    from segmoe_kernels import stages  # noqa: F401  operators and kernels are made at import

    checks = (*_functions_of(validation), options.check_layer)
    _everywhere(timers, "checks", checks)
    _everywhere(timers, "backend, autocast", (functional.backend_stages, pipeline.autocast_weights))
    tables = [f for f in _functions_of(tiles) if not isinstance(f, type)]
    _everywhere(timers, "tiles", tables)
    numbers = (launch.padded, launch.accumulator, launch.accumulator_dtype, launch.input_precision)
    _everywhere(timers, "cdiv, padded, dtypes", numbers)
    _method(timers, "cdiv, padded, dtypes", triton, "cdiv", "next_power_of_2")
    _method(timers, "allocations", torch.Tensor, "new_empty")
    _method(timers, "allocations", torch, "empty", "empty_like", "empty_strided")
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith("segmoe_kernels.stages"):
            _function(timers, function)
    _everywhere(timers, "autograd.Function.apply", (autograd.apply,))
    _method(timers, "autograd's engine", torch.autograd, "grad")
    _method(timers, "layer, pipeline", SegMoE, "__call__")
    _everywhere(timers, "key of the call", (options.call_key,))


def _function(timers: Timers, function: Any) -> None:
    for name in ("setup_context", "backward"):
        part = f"autograd.Function.{name}"
        setattr(function, name, staticmethod(timers.wrap(part, getattr(function, name))))


def _triton(timers: Timers) -> None:
    _method(timers, "tapes: keys", tape, "_key")
    _method(timers, "tapes: played", tape.Tape, "play")
    _method(timers, "launches: Python", Kernel, "run")
    _method(timers, "Triton: launcher, Python", driver.CudaLauncher, "__call__")
    utils = triton.runtime.driver.active.utils
    if hasattr(utils, "launch"):  # before Triton 3.7 each kernel has its own
        _method(timers, "Triton: launcher, C", utils, "launch")


def profile(
    case: Case, dtype: torch.dtype, key: tuple[str, str], *, calls: int
) -> list[tuple[str, int, float]]:
    """Time one of a case's functions by part; what it replaces stays replaced in this process.

    Args:
        case: whose layer is called.
        dtype: of it.
        key: of `calls.calls_of`'s functions.
        calls: at least 2.

    Returns:
        ``(part, times in a call, us)``, the largest first; us are the lower quartile over calls.
    """
    timers = Timers()
    _install(timers)
    functions, _ = calls_of(case, dtype, key[:1])
    call = timers.wrap("the caller", functions[key])
    for _ in range(20):
        call()
    gc.collect()
    gc.disable()
    found: dict[str, list[float]] = {}
    try:
        for _ in range(calls):
            timers.clear()
            call()
            for part, taken in timers.nanoseconds.items():
                found.setdefault(part, []).append(taken / 1e3)
    finally:
        gc.enable()
    rows = [
        (part, timers.times[part], statistics.quantiles(us, n=4)[0]) for part, us in found.items()
    ]
    return sorted(rows, key=lambda row: -row[2])
