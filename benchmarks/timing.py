"""The one timer of functions in turns: interleaved rounds, caches flushed, and CUDA graphs.

Protocol: every function is called a few times; then, in each round, every function once, every
other round in reverse order, so that drift of the clocks meets all of them alike. Before each call
on a GPU a buffer of twice the L2 cache is overwritten. Times are of device events around the call;
the device is idle when a call is issued, so an eager time holds what the host needs beyond the
flush. On a CPU each call follows one that does not count, which finds the caches and the allocator
as another function left them. There it is the wall clock, or with one thread (OMP_NUM_THREADS=1)
the process's own time, to which other processes on the machine add little.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.common import on_gpu

WARMUP_CALLS = 3
Name = TypeVar("Name")


@dataclass(frozen=True)
class Timing:
    """Times of one function, over all rounds.

    Attributes:
        times_ms: one for each round, in order.
    """

    times_ms: tuple[float, ...]

    def quartiles(self) -> tuple[float, float, float]:
        """Return the lower quartile, the median and the upper quartile, in ms."""
        low, median, high = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return low, median, high

    def ratio(self, other: "Timing") -> float:
        """Median of ``self / other``, round by round: drift of the machine cancels."""
        pairs = zip(self.times_ms, other.times_ms, strict=True)
        return statistics.median(a / b for a, b in pairs)

    def least_ratio(self, other: "Timing") -> float:
        """Least over least: what is left where other processes disturb most of the rounds."""
        return min(self.times_ms) / min(other.times_ms)


class Clock:
    """Times one call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer: torch.Tensor | None = None
        self._now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        if on_gpu(device):
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def flushes(self) -> bool:
        """Whether caches are flushed before each call."""
        return self._buffer is not None

    def flush(self) -> None:
        """Overwrite the caches of a GPU; what is enqueued next follows it."""
        if self._buffer is not None:
            self._buffer.zero_()

    def wait(self) -> None:
        """Wait for the device."""
        if self._buffer is not None:
            torch.cuda.synchronize(self.device)

    def time_ms(self, function: Callable[[], object]) -> float:
        """Call it; on a CPU once more before."""
        if self._buffer is None:
            function()
            start = self._now()
            function()
            return 1e3 * (self._now() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        self.flush()
        first.record()
        function()
        last.record()
        self.wait()
        return float(first.elapsed_time(last))


def time_interleaved(
    functions: Mapping[Name, Callable[[], object]],
    clock: Clock,
    *,
    budget_s: float,
    least_rounds: int = 10,
    most_rounds: int = 200,
) -> dict[Name, Timing]:
    """Time functions in turns.

    Args:
        functions: what to time, by name.
        clock: of the device they run on.
        budget_s: of the timed calls together, as far as least_rounds lets it.
        least_rounds: calls of each that are timed at any rate; at least 2.
        most_rounds: calls of each that are enough.

    Returns:
        A Timing for each name.
    """
    times: dict[Name, list[float]] = {name: [] for name in functions}
    cost_s = 0.0
    for function in functions.values():
        for _ in range(WARMUP_CALLS):
            start = time.perf_counter()
            clock.time_ms(function)
        cost_s += time.perf_counter() - start
    rounds = min(most_rounds, max(least_rounds, int(budget_s / max(cost_s, 1e-9))))
    for index in range(rounds):
        for name in list(functions)[:: 1 if index % 2 else -1]:
            times[name].append(clock.time_ms(functions[name]))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture a call into a CUDA graph.

    Args:
        function: of fixed tensors; waits for the host nowhere.

    Returns:
        ``(replay, what the captured call returned)``; the tensors are filled by a replay.

    Raises:
        RuntimeError: from PyTorch, where the call can't be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def summary(timing: Timing) -> dict[str, float | int]:
    """Quartiles and spread of a Timing, for a row."""
    low, median, high = timing.quartiles()
    return {
        "time_median_ms": median,
        "time_q1_ms": low,
        "time_q3_ms": high,
        "time_least_ms": min(timing.times_ms),
        "time_mean_ms": statistics.fmean(timing.times_ms),
        "rounds": len(timing.times_ms),
    }
