"""Count what the layer moves, computes and launches, on a machine without a GPU.

Kernels run in Triton's interpreter, where every load, store and ``tl.dot`` is seen. Counted for
each kernel: launches, programs, bytes requested by loads and stores (masks respected), distinct
bytes among them (each address once a launch), atomics, and the FLOPs of every ``tl.dot``, padding
included. PyTorch operators that run between the kernels, or inside a registered operator, are
counted as ``aten.<name>``: one launch each, their inputs and outputs, the FLOPs of their products.
Views, empty allocations and operators on no element are free.

The meter knows no cache: what DRAM moves lies between the distinct and the requested bytes::

    with TrafficMeter() as meter:
        layer(x).backward(dy)
    print(meter.table())
"""

import bisect
import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

# Triton decides at its first import whether it interprets.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime import interpreter

from benchmarks.aten import distinct_bytes, read_arguments, tensors_of, touches

_Method = Callable[..., Any]


@dataclasses.dataclass
class KernelCount:
    """What all launches of one kernel, or all calls of one PyTorch operator, add up to."""

    launches: int = 0
    programs: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    distinct_bytes: int = 0
    atomic_ops: int = 0
    dot_flops: int = 0

    @property
    def requested_bytes(self) -> int:
        """Bytes that loads and stores ask for, before any cache."""
        return self.load_bytes + self.store_bytes

    def __add__(self, other: "KernelCount") -> "KernelCount":
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return KernelCount(*(a + b for a, b in zip(ours, theirs, strict=True)))


class _Touched:
    """Which elements of its arguments one launch has touched."""

    def __init__(self, arguments: Any) -> None:
        storages = {}
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        self._starts = sorted(storages)
        self._sizes = [storages[start] for start in self._starts]
        self._marks: dict[tuple[int, int], np.ndarray] = {}

    def add(self, addresses: np.ndarray, itemsize: int) -> None:
        """Mark the elements at these addresses.

        Raises:
            RuntimeError: if one of them lies in no argument of the kernel.
        """
        while addresses.size:
            at = bisect.bisect_right(self._starts, int(addresses.min())) - 1
            if at < 0 or addresses.min() >= self._starts[at] + self._sizes[at]:
                raise RuntimeError("the kernel touches memory outside its arguments.")
            start, size = self._starts[at], self._sizes[at]
            here = addresses < start + size
            if (at, itemsize) not in self._marks:
                self._marks[at, itemsize] = np.zeros(-(-size // itemsize), dtype=bool)
            self._marks[at, itemsize][(addresses[here] - start) // itemsize] = True
            addresses = addresses[~here]

    def distinct_bytes(self) -> int:
        """Bytes touched, each element once."""
        return sum(int(mark.sum()) * size for (_, size), mark in self._marks.items())


@dataclasses.dataclass
class _Launch:
    count: KernelCount
    loads: _Touched
    stores: _Touched


class _AtenCounter(TorchDispatchMode):
    """Counts the PyTorch operators that run outside the kernels."""

    def __init__(self, meter: "TrafficMeter") -> None:
        super().__init__()
        self._meter = meter

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            # What a registered operator is made of counts, so its kernel runs under this mode.
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        outputs = tensors_of(out)
        inputs = tensors_of(read_arguments(func, args, kwargs))
        if self._meter.in_kernel or not touches(func, inputs, outputs):
            return out
        count = KernelCount(launches=1)
        count.load_bytes = sum(t.numel() * t.element_size() for t in inputs)
        count.store_bytes = sum(t.numel() * t.element_size() for t in outputs)
        count.distinct_bytes = sum(distinct_bytes(t) for t in (*inputs, *outputs))
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket]
            count.dot_flops = flops(*args, **kwargs, out_val=out)
        self._meter.kernels[f"aten.{name}"] += count
        return out


class TrafficMeter:
    """Context manager that counts every kernel and PyTorch operator that runs inside it.

    Args:
        distinct: also count distinct bytes, which takes a quarter of the time.

    Attributes:
        kernels: what each kernel, by name, and each ``aten.<name>`` adds up to.

    Raises:
        RuntimeError: on entry, if triton was imported without TRITON_INTERPRET=1.
    """

    def __init__(self, *, distinct: bool = True) -> None:
        self.kernels: dict[str, KernelCount] = defaultdict(KernelCount)
        self._distinct = distinct
        self._launches: list[_Launch] = []
        self._aten = _AtenCounter(self)
        self._saved: list[tuple[type, str, _Method]] = []

    @property
    def in_kernel(self) -> bool:
        """Whether a kernel is running."""
        return bool(self._launches)

    def __enter__(self) -> "TrafficMeter":
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("TrafficMeter needs TRITON_INTERPRET=1 before triton is imported.")
        builder = interpreter.InterpreterBuilder
        self._replace(builder, "create_masked_load", self._load)
        self._replace(builder, "create_masked_store", self._store)
        self._replace(builder, "create_dot", self._dot)
        self._replace(builder, "create_atomic_rmw", self._atomic_rmw)
        self._replace(builder, "create_atomic_cas", self._atomic_cas)
        self._replace(builder, "set_grid_idx", self._program)
        self._replace(interpreter.GridExecutor, "__call__", self._launch)
        self._aten.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._aten.__exit__(*error)
        while self._saved:
            setattr(*self._saved.pop())

    def _replace(self, owner: type, name: str, method: _Method) -> None:
        """Make owner's method call ours, which gets the original first."""
        original = getattr(owner, name)
        self._saved.append((owner, name, original))

        def replacement(instance: Any, *args: Any, **kwargs: Any) -> Any:
            return method(original, instance, *args, **kwargs)

        setattr(owner, name, replacement)

    def _launch(self, original: _Method, executor: Any, *args: Any, **kwargs: Any) -> Any:
        count = KernelCount(launches=1)
        tensors = (args, kwargs)
        launch = _Launch(count, _Touched(tensors), _Touched(tensors))
        self._launches.append(launch)
        try:
            return original(executor, *args, **kwargs)
        finally:
            self._launches.pop()
            count.distinct_bytes = launch.loads.distinct_bytes() + launch.stores.distinct_bytes()
            self.kernels[getattr(executor.fn, "__name__", str(executor.fn))] += count

    def _touch(self, ptrs: Any, mask: Any, *, store: bool) -> None:
        if not self._launches:
            return
        launch = self._launches[-1]
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        hit = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        size = int(hit.sum()) * itemsize
        if store:
            launch.count.store_bytes += size
        else:
            launch.count.load_bytes += size
        if self._distinct:
            (launch.stores if store else launch.loads).add(
                ptrs.data[hit].astype(np.int64), itemsize
            )

    def _load(self, original: _Method, builder: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        self._touch(ptrs, mask, store=False)
        return original(builder, ptrs, mask, *args)

    def _store(
        self, original: _Method, builder: Any, ptrs: Any, value: Any, mask: Any, *args: Any
    ) -> Any:
        self._touch(ptrs, mask, store=True)
        return original(builder, ptrs, value, mask, *args)

    def _dot(self, original: _Method, builder: Any, lhs: Any, rhs: Any, *args: Any) -> Any:
        if self._launches:
            # (..., M, K) x (..., K, N)
            products = lhs.data.size * rhs.data.shape[-1]
            self._launches[-1].count.dot_flops += 2 * products
        return original(builder, lhs, rhs, *args)

    def _atomic_rmw(
        self,
        original: _Method,
        builder: Any,
        operation: Any,
        ptr: Any,
        value: Any,
        mask: Any,
        *args: Any,
    ) -> Any:
        if self._launches:
            hits = np.broadcast_to(mask.data, ptr.data.shape)
            self._launches[-1].count.atomic_ops += int(hits.sum())
        return original(builder, operation, ptr, value, mask, *args)

    def _atomic_cas(self, original: _Method, builder: Any, ptr: Any, *args: Any) -> Any:
        if self._launches:
            self._launches[-1].count.atomic_ops += int(np.size(ptr.data))
        return original(builder, ptr, *args)

    def _program(self, original: _Method, builder: Any, *args: Any) -> Any:
        if self._launches:
            self._launches[-1].count.programs += 1
        return original(builder, *args)

    def total(self) -> KernelCount:
        """Everything added up."""
        return sum(self.kernels.values(), KernelCount())

    def table(self) -> str:
        """One line for each kernel, and the total."""
        lines = [
            f"{'kernel':<32}{'launches':>9}{'programs':>9}{'load MB':>10}{'store MB':>10}"
            f"{'distinct MB':>12}{'atomics':>8}{'dot GFLOP':>10}"
        ]
        for name, count in (*self.kernels.items(), ("TOTAL", self.total())):
            lines.append(
                f"{name[:31]:<32}{count.launches:>9}{count.programs:>9}"
                f"{count.load_bytes / 1e6:>10.3f}{count.store_bytes / 1e6:>10.3f}"
                f"{count.distinct_bytes / 1e6:>12.3f}{count.atomic_ops:>8}"
                f"{count.dot_flops / 1e9:>10.4f}"
            )
        return "\n".join(lines)
