"""Every launch of a layer, forward and backward, caught on CPU tensors: nothing runs.

Kernels are caught as `codegen` does. PyTorch operators between them are noted with their bytes;
those on many elements are not computed either: their results are empty tensors of the right shape.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from benchmarks import aten, codegen
from benchmarks.clock import sass
from benchmarks.clock.compiled import compiled
from benchmarks.shapes import Shape
from segmoe_kernels import SegMoE
from segmoe_kernels._triton import tiles as table

# Operators on at most so many elements run: others could be asked for what they compute.
_SMALL = 4096
_ALIASES = {"_unsafe_view", "alias"}


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a Triton kernel.

    Attributes:
        launch: what the compiler needs.
        grid: programs along each axis.
        scalars: numbers among the arguments, by name.
        tensors: distinct bytes of the tensors among the arguments, by name.
    """

    launch: codegen.Launch
    grid: tuple[int, ...]
    scalars: dict[str, int | float]
    tensors: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.launch.function.__name__)

    def __getitem__(self, name: str) -> Any:
        """A constant or a scalar argument; None for an absent tensor."""
        constants = self.launch.constants
        return constants[name] if name in constants else self.scalars[name]

    def given(self, name: str) -> bool:
        """Whether an optional tensor was there."""
        return name in self.tensors

    @property
    def kernel(self) -> sass.Kernel:
        """It, compiled."""
        return compiled(self.launch)

    def changed(self, **values: Any) -> "KernelLaunch":
        """The same launch with other tile sizes, options or numbers; `work` counts its programs.

        Args:
            **values: of constants (``BLOCK_M``), of scalar arguments (``num_splits``) and
                ``num_warps``, ``num_stages``, ``maxnreg`` (0 for none).

        Raises:
            ValueError: for a name that the launch doesn't have.
        """
        options, constants = dict(self.launch.options), dict(self.launch.constants)
        attributes, scalars = dict(self.launch.attributes), dict(self.scalars)
        for name, value in values.items():
            if name in {"num_warps", "num_stages", "maxnreg"}:
                options[name] = value
                if not value:
                    del options[name]
            elif name in constants:
                constants[name] = value
            elif name in scalars:
                scalars[name] = value
                place = self.launch.paths[name]
                attributes.pop(place, None)
                if value % 16 == 0:
                    attributes[place] = [["tt.divisibility", 16]]
            else:
                known = ", ".join([*constants, *scalars, "num_warps", "num_stages", "maxnreg"])
                raise ValueError(f"{self.name} has no {name!r}; it has {known}")
        launch = dataclasses.replace(
            self.launch, constants=constants, options=options, attributes=attributes
        )
        return dataclasses.replace(self, launch=launch, scalars=scalars)


@dataclass(frozen=True)
class OperatorCall:
    """One PyTorch operator.

    Attributes:
        name: without namespace and overload.
        read: bytes of the inputs, each element once.
        written: bytes of the outputs.
        flops: of a product, else 0.
        elements: of the largest output.
        output: shape of the largest output.
    """

    name: str
    read: int
    written: int
    flops: int
    elements: int
    output: tuple[int, ...]


@dataclass
class Capture:
    """What a layer launched, in order.

    Attributes:
        shape: of the call.
        forward: launches.
        backward: launches.
    """

    shape: Shape
    forward: list[KernelLaunch | OperatorCall] = field(default_factory=list)
    backward: list[KernelLaunch | OperatorCall] = field(default_factory=list)

    def kernels(self, name: str) -> list[KernelLaunch]:
        """The launches of one kernel, with or without ``_kernel`` at its end."""
        wanted = name.removesuffix("_kernel").strip("_")
        return [
            call
            for call in (*self.forward, *self.backward)
            if isinstance(call, KernelLaunch)
            and call.name.removesuffix("_kernel").strip("_") == wanted
        ]


class _Operators(TorchDispatchMode):
    """Notes the operators and lets none run that would touch many elements."""

    def __init__(self, note: Callable[[OperatorCall], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            # What a registered operator launches counts, so its kernel runs under this mode.
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        name = func._overloadpacket.__name__
        if func.is_view or name in aten.FREE | _ALIASES:
            return func(*args, **kwargs)
        out = _without_running(func, name, args, kwargs)
        inputs = aten.tensors_of(aten.read_arguments(func, args, kwargs))
        outputs = aten.tensors_of(out)
        if not aten.touches(func, inputs, outputs):
            return out
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        largest = max(outputs, key=Tensor.numel)
        self._note(
            OperatorCall(
                name,
                sum(aten.distinct_bytes(t) for t in inputs),
                sum(aten.distinct_bytes(t) for t in outputs),
                flops,
                largest.numel(),
                tuple(largest.shape),
            )
        )
        return out


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Let no PyTorch operator touch many elements."""
    with _Operators(lambda _call: None):
        yield


def _without_running(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = aten.tensors_of((args, kwargs))
    if name == "bincount":
        (length,) = (v for v in (*args, *kwargs.values()) if isinstance(v, int))
        return torch.empty(length, dtype=torch.int64)
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    if all(t.numel() <= _SMALL for t in tensors) and tensors:
        return func(*args, **kwargs)
    meta_args, meta_kwargs = tree_map_only(
        Tensor,
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"),
        (args, kwargs),
    )
    if "device" in meta_kwargs:
        meta_kwargs["device"] = "meta"
    out = func(*meta_args, **meta_kwargs)
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), out
    )


@contextmanager
def caught(note: Callable[[KernelLaunch], None]) -> Iterator[None]:
    """Hand every kernel launch to ``note`` instead of a GPU."""
    real = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        launch = codegen.catch(self, args, dict(kwargs))
        values = {n: v for n, _, v in codegen.named_arguments(self, args, kwargs)}
        grid = kwargs["grid"](values) if callable(kwargs["grid"]) else kwargs["grid"]
        scalars = {
            n: v
            for n, v in values.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
        tensors = {n: aten.distinct_bytes(v) for n, v in values.items() if isinstance(v, Tensor)}
        note(KernelLaunch(launch, tuple(int(g) for g in grid), scalars, tensors))

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = real


def capture_calls(
    shape: Shape, module: torch.nn.Module, dtype: torch.dtype, *, backward: bool = True
) -> Capture:
    """Call a module on ``(B, T, D)`` and note what it launches.

    Args:
        shape: of x and of the layer that module is.
        module: on the CPU; its parameters require gradients.
        dtype: of x.
        backward: run the backward too.
    """
    found = Capture(shape)
    calls = found.forward
    size = (shape.batch, shape.length, shape.d_model)

    def note(call: KernelLaunch | OperatorCall) -> None:
        calls.append(call)

    with (
        codegen.pretend_triton_runs("sm_90"),
        caught(note),
        _Operators(note),
    ):
        x = torch.empty(size, dtype=dtype).requires_grad_(backward)
        y = module(x)
        calls = found.backward
        if backward:
            y.backward(torch.empty(size, dtype=y.dtype))
    return found


def capture_layer(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tiles: Mapping[str, Mapping[str, int]] | None = None,
    backward: bool = True,
    **options: Any,
) -> Capture:
    """Catch what a layer of this package launches.

    Args:
        shape: of the layer and its input.
        dtype: of both.
        tiles: function of `tiles` -> fields of its answers to change, such as
            ``{"expert_ffn_dw_tile": {"block_m": 64, "num_warps": 4}}``; what follows from a tile,
            such as the number of splits, changes with it.
        backward: run the backward too.
        **options: of `SegMoE`; without a shared expert unless they say so.
    """
    layer = make_layer(shape, dtype, backend="triton", **options)
    with _other_tiles(tiles or {}):
        return capture_calls(shape, layer, dtype, backward=backward)


@contextmanager
def _other_tiles(tiles: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Change answers of the table wherever they are asked for."""
    with ExitStack() as stack:
        for name, fields in tiles.items():
            shipped = getattr(table, name)

            def answer(
                *args: Any, _shipped: Any = shipped, _fields: Any = fields, **kw: Any
            ) -> Any:
                return _shipped(*args, **kw)._replace(**_fields)

            for module in [*sys.modules.values()]:
                if getattr(module, name, None) is shipped:
                    stack.enter_context(mock.patch.object(module, name, answer))
        yield


def make_layer(shape: Shape, dtype: torch.dtype, **options: Any) -> SegMoE:
    """A layer of a shape; nothing initialises its parameters."""
    settings = {"shared_expert": None, **options}
    with nothing_runs():
        return SegMoE(
            shape.d_model,
            shape.d_ff,
            shape.num_experts,
            top_k=shape.top_k,
            segment_size=shape.segment_size,
            dtype=dtype,
            **settings,
        )
