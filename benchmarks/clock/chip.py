"""The chip: programs that SMs hold, waves, HBM and L2; from a launch to its modelled time."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.clock import sass, sm
from benchmarks.clock.capture import Capture, KernelLaunch, OperatorCall
from benchmarks.clock.machine import H200, Machine
from benchmarks.clock.work import Work, work_of
from benchmarks.shapes import Shape

# Kernels that an operator launches where it isn't one (memory): a radix sort has a histogram and
# eight passes; a count of few values has a least and a largest, a histogram and a sum.
_LAUNCHES = {"sort": 9, "bincount": 4, "topk": 1, "cumsum": 1}
# Bytes that a radix sort of 64-bit keys with 64-bit values moves for each element.
_SORT_BYTES = 8 * 32
# A kernel of one wave of PyTorch's, start to end (memory).
_LEAST_US = 1.5


@dataclass(frozen=True)
class Time:
    """Modelled time of one launch, without the launch itself.

    Attributes:
        name: of the kernel, or ``aten.`` and the operator.
        us: microseconds.
        launches: that it takes.
        programs: of the kernel.
        resident: programs on an SM at once.
        bound: what bounds it: a pipe, "latency", "hbm" or "l2".
        parts: microseconds by resource: "sm", "hbm", "l2"; the share of time that each pipe of an
            SM is held, under its name.
        kernel: compiled, or None.
    """

    name: str
    us: float
    launches: int = 1
    programs: int = 0
    resident: int = 0
    bound: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    kernel: sass.Kernel | None = None


@dataclass(frozen=True)
class LayerTime:
    """Modelled times of a layer.

    Attributes:
        forward: of each launch.
        backward: likewise.
    """

    forward: list[Time]
    backward: list[Time]

    def us(self, which: str, launch_us: float = 1.0) -> float:
        """Microseconds of "forward", "backward" or "both".

        Args:
            which: pass.
            launch_us: what a launch adds: 1 in a CUDA graph, 2 without (memory).
        """
        times = {"forward": self.forward, "backward": self.backward}
        chosen = self.forward + self.backward if which == "both" else times[which]
        return sum(t.us + launch_us * t.launches for t in chosen)


def resident_programs(kernel: sass.Kernel, machine: Machine = H200) -> int:
    """Programs of a kernel that an SM holds at once."""
    registers = math.ceil(kernel.registers / 8) * 8 * 32 * kernel.num_warps
    shared = kernel.shared_bytes + machine.reserved_shared_bytes
    return max(
        1,
        min(
            machine.registers // registers,
            machine.shared_bytes // shared,
            machine.max_warps // kernel.num_warps,
            machine.max_programs,
        ),
    )


def time_kernel(launch: KernelLaunch, work: Work, machine: Machine = H200) -> Time:
    """Model one launch.

    Args:
        launch: of a kernel.
        work: what it does.
        machine: where.

    Raises:
        ValueError: if the compiled kernel has a loop that work doesn't name.
    """
    kernel = launch.kernel
    resident = resident_programs(kernel, machine)
    in_l2 = sum(launch.tensors.values()) <= machine.l2_bytes
    missing = frozenset(
        name for name, size in launch.tensors.items() if not in_l2 and size > machine.l2_bytes / 4
    )
    levels = {
        loop.name: dict.fromkeys(() if loop.name in work.rereads else missing, "dram")
        | dict.fromkeys(work.in_l1, "l1")
        for loop in kernel.root.walk()
    }

    def side_by_side(which: int, together: int) -> sm.Run:
        return sm.run(kernel, together, machine, levels, work.programs[which].trips)

    def seconds(which: int, together: int) -> float:
        return (machine.start + side_by_side(which, together).clocks) / machine.clock_hz

    on_sm = _makespan([p.count for p in work.programs], resident, machine, seconds)
    together = min(resident, math.ceil(sum(p.count for p in work.programs) / machine.num_sms))
    taken = side_by_side(0, max(1, together))
    busy = {pipe: held / taken.clocks for pipe, held in taken.busy.items()}
    l2_rate = machine.l2_swizzled_rate if work.swizzled else machine.l2_rate
    hbm = 0.0 if in_l2 else work.hbm_bytes / machine.hbm_rate
    l2 = work.l2_bytes / l2_rate
    parts = {"sm": on_sm * 1e6, "hbm": hbm * 1e6, "l2": l2 * 1e6, **busy}
    pipe = max(busy, key=busy.__getitem__)
    bound = "hbm" if hbm >= max(on_sm, l2) else "l2" if l2 > on_sm else pipe
    if bound == pipe and busy[pipe] < 0.6:
        bound = "latency"
    return Time(
        launch.name,
        max(on_sm, hbm, l2) * 1e6,
        1,
        sum(p.count for p in work.programs),
        resident,
        bound,
        parts,
        kernel,
    )


def _makespan(
    counts: list[int], resident: int, machine: Machine, seconds: Callable[[int, int], float]
) -> float:
    """When the last program ends: in waves, or with kinds of programs one after another."""
    slots = machine.num_sms * resident

    def together(count: int) -> int:
        return max(1, min(resident, math.ceil(count / machine.num_sms)))

    if len(counts) == 1:
        full, rest = divmod(counts[0], slots)
        time = full * seconds(0, resident) if full else 0.0
        return time + (seconds(0, together(rest)) if rest else 0.0)
    side_by_side = together(sum(counts))
    free = [0.0] * min(slots, sum(counts))
    for which, count in enumerate(counts):
        each = seconds(which, side_by_side)
        for _ in range(count):
            heapq.heappush(free, heapq.heappop(free) + each)
    return max(free)


def time_call(call: OperatorCall, machine: Machine = H200) -> Time:
    """Model a PyTorch operator: bytes at the same share of HBM as kernels, products by FLOPs."""
    moved = float(call.read + call.written)
    if call.name == "sort":
        moved = call.elements * _SORT_BYTES
    from_l2 = moved <= machine.l2_bytes
    hbm = moved / (machine.l2_rate if from_l2 else machine.hbm_rate) * 1e6
    product = call.flops / machine.dense_rate * 1e6
    launches = _LAUNCHES.get(call.name, 1)
    us = max(hbm, product, _LEAST_US * (launches if call.name == "sort" else 1))
    bound = "tensor" if product > hbm else "latency" if us > hbm else "hbm"
    return Time(f"aten.{call.name}", us, launches, bound=bound, parts={"hbm": hbm})


def time_launch(call: KernelLaunch | OperatorCall, shape: Shape, machine: Machine = H200) -> Time:
    """Model one launch of a capture."""
    if isinstance(call, OperatorCall):
        return time_call(call, machine)
    return time_kernel(call, work_of(call, shape), machine)


def time_layer(capture: Capture, machine: Machine = H200) -> LayerTime:
    """Model every launch of a capture."""
    passes = (capture.forward, capture.backward)
    return LayerTime(*([time_launch(c, capture.shape, machine) for c in p] for p in passes))
