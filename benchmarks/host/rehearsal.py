"""A GPU for a dress rehearsal: kernels are compiled and launched on the `stub`, nothing computes.

With GPU_REHEARSAL in the environment `benchmarks` installs it at its first import, and every script
here finds a GPU named "rehearsal". GPU_REHEARSAL=dry compiles and launches nothing either. Its
memory is zero and stays so: of PyTorch's operators only those run that ask for values. So all
checks hold, and say nothing; sizes may be the real ones, for memory that nobody touches takes no
room. Events take the wall clock of the host.
"""

import ctypes
import os
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.host import stub

__all__ = ["VARIABLE", "install"]

VARIABLE = "GPU_REHEARSAL"
NAME = "rehearsal"
# Allocations of so many bytes come from the system; smaller ones may have been used.
_FRESH = 1 << 20
_M_MMAP_THRESHOLD = -3
# Operators that answer with values, or with a size that depends on them.
_ASKS = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "nonzero"}
_COMPARES = {"eq", "ne", "lt", "le", "gt", "ge"}
_FEW = 1 << 20


def install() -> None:
    """Put it in the place of CUDA, for this process."""
    stub.install()
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _FRESH >> 4)
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch.profiler
    from triton.runtime.autotuner import Autotuner

    torch.cuda._initialized = True
    torch.profiler.profile = _Profile  # type: ignore[misc,assignment]
    Autotuner._bench = _every_config
    for name, value in _cuda().items():
        setattr(torch.cuda, name, value)
    _admit(torch)


def _admit(torch: Any) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from segmoe_kernels import functional

    resolve = functional.resolve_backend

    class OnCPU(TorchFunctionMode):
        """Reads "cuda" as the CPU."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.cuda:
                return args[0]
            kwargs = {key: _place(value, torch) for key, value in (kwargs or {}).items()}
            return func(*(_place(value, torch) for value in args), **kwargs)

    class Zeros(TorchDispatchMode):
        """Answers with zeros."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "segmoe_kernels":
                with self:
                    return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
            return _answer(torch, func, args, kwargs or {})

    def on_gpu(backend: str, x: Any) -> str:
        return "triton" if backend == "auto" else resolve(backend, x)

    functional.resolve_backend = on_gpu
    if os.environ.get(VARIABLE) == "dry":
        _launch_nothing()
    OnCPU().__enter__()
    Zeros().__enter__()


def _launch_nothing() -> None:
    """Compile no kernel either."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    def run(self: Any, *_: Any, **__: Any) -> None:
        knobs.runtime.launch_enter_hook(SimpleNamespace(get=lambda: {"name": self.__name__}))

    JITFunction.run = run


def _place(value: Any, torch: Any) -> Any:
    given = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if given else value


def _answer(torch: Any, func: Any, args: Any, kwargs: Any) -> Any:
    from torch.utils._pytree import tree_map_only

    from benchmarks import aten

    if func.namespace != "aten":
        return func(*args, **kwargs)
    name = func._overloadpacket.__name__
    given = aten.tensors_of((args, kwargs))
    counts = bool(given) and all(tensor.numel() == 1 for tensor in given)  # steps of an optimizer
    small = name in _COMPARES and args[0].numel() <= _FEW
    marks = name == "scatter_" and not args[0].is_floating_point()  # of one_hot
    if "empty" in name:
        return _zeroed(func(*args, **kwargs))
    if func.is_view or counts or small or marks or name in _ASKS | aten.FREE:
        return func(*args, **kwargs)
    if func._schema.is_mutable:
        return kwargs.get("out", args[0] if func._schema.returns else None)

    def described(x: Any) -> Any:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    meta_args, meta_kwargs = tree_map_only(torch.Tensor, described, (args, kwargs))
    if "device" in meta_kwargs:
        meta_kwargs["device"] = torch.device("meta")
    try:
        out = func(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError):
        return func(*args, **kwargs)

    def real(x: Any) -> Any:
        return _zeroed(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype))

    return tree_map_only(torch.Tensor, real, out)


def _zeroed(out: Any) -> Any:
    """Whole numbers are asked for; what the system has just given is zero already."""
    used = not out.is_floating_point() or out.untyped_storage().nbytes() < _FRESH
    return out.zero_() if used and out.device.type == "cpu" else out


def _every_config(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
    """Launch what a search for tiles would time."""
    self.fn.run(*args, **meta, **config.all_kwargs())
    return [1.0, 1.0, 1.0]


class _Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "_Event") -> float:
        return 1e3 * (other.at - self.at)


class _Profile:
    """Notes launches in `torch.profiler`'s place; each takes a microsecond."""

    def __init__(self, **_: Any) -> None:
        self.launches: Counter[str] = Counter()

    def _note(self, launch: Any) -> None:
        self.launches[launch.get()["name"]] += 1

    def __enter__(self) -> "_Profile":
        from triton import knobs

        knobs.runtime.launch_enter_hook.add(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        from triton import knobs

        knobs.runtime.launch_enter_hook.remove(self._note)

    def key_averages(self) -> list[Any]:
        """One event for each kernel."""
        cuda = {"device_type": "DeviceType.CUDA"}
        return [
            SimpleNamespace(key=name, count=count, self_device_time_total=float(count), **cuda)
            for name, count in self.launches.items()
        ]


def _cuda() -> dict[str, Any]:
    """What stands in `torch.cuda`."""
    properties = SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        total_memory=139 << 30,
        L2_cache_size=60 << 20,
        multi_processor_count=132,
    )

    def answering(value: Any, *names: str) -> dict[str, Any]:
        # A function each: dynamo looks them up by identity.
        return {name: (lambda *_, _value=value, **__: _value) for name in names}

    return {
        **answering(True, "is_available"),
        **answering(False, "is_current_stream_capturing"),
        **answering(1, "device_count"),
        **answering(NAME, "get_device_name"),
        **answering((9, 0), "get_device_capability"),
        **answering(properties, "get_device_properties"),
        "Event": _Event,
        "Stream": mock.MagicMock,
        "stream": mock.MagicMock(),
        "current_stream": mock.MagicMock(),
        "CUDAGraph": mock.MagicMock,
        "graph": mock.MagicMock(),
        **answering(0, "memory_allocated", "max_memory_allocated", "memory_reserved"),
        **answering(None, "synchronize", "empty_cache", "reset_peak_memory_stats"),
        **answering(None, "manual_seed_all", "manual_seed", "set_sync_debug_mode"),
    }
