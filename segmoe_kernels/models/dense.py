"""What is known of other models' dense FFNs: their linear maps, activation and dropout."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from segmoe_kernels.activations import ACTIVATIONS

UNDERSTOOD = (
    "be a torch.nn.TransformerEncoderLayer, a Sequential of Linear, activation (GELU, ReLU, SiLU), "
    "perhaps Dropout, and Linear, a module of gate_proj, up_proj, down_proj and act_fn, an "
    "encoder layer of attention, conv1, conv2, norm1, norm2, dropout and activation, or what "
    "parts describes"
)

# Parts that are modules.
_NAMED = ("up", "down", "gate", "dropout")
# Children of the encoder layer in Time-Series-Library, in neuralforecast and elsewhere.
_CONVOLUTIONAL = {"attention", "conv1", "conv2", "norm1", "norm2", "dropout"}


class DenseFFN(NamedTuple):
    """What `replace_ffn` knows of a dense FFN."""

    up: nn.Linear | nn.Conv1d
    down: nn.Linear | nn.Conv1d
    gate: nn.Linear | None
    activation: str
    dropout: float
    behind: nn.Module | None  # a dropout on its output

    def linears(self) -> dict[str, nn.Linear | nn.Conv1d]:
        """The linear maps by name."""
        parts = {"up": self.up, "gate": self.gate, "down": self.down}
        return {name: part for name, part in parts.items() if part is not None}

    def __call__(self, x: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What is computed, (..., D) to (..., D), with ``drop`` on the hidden layer."""

        def linear(part: nn.Linear | nn.Conv1d, rows: Tensor) -> Tensor:
            # A convolution's last dimension is 1.
            return F.linear(rows, part.weight.flatten(1), part.bias)

        hidden = linear(self.up if self.gate is None else self.gate, x)
        hidden = ACTIVATIONS[self.activation].function(hidden)
        if self.gate is not None:
            hidden = hidden * linear(self.up, x)
        hidden = hidden if drop is None else drop(hidden)
        return linear(self.down, hidden)


def activation_of(function: Any) -> str | None:
    """Our name of an activation module or function; None for one that no kernel computes."""
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    known = function
    if isinstance(function, nn.Module):
        kind = type(function)
        known = kind.__name__ if kind.__module__ == "transformers.activations" else kind
    elif not callable(function):
        return None
    return next((n for n, a in ACTIVATIONS.items() if known in (a.function, *a.aliases)), None)


def read_ffn(module: nn.Module, parts: Mapping[str, str] | None = None) -> DenseFFN | str | None:
    """Describe a dense FFN; or say what a module lacks that looks like one; or return None."""
    if parts is not None:
        return _read_parts(module, parts)
    if isinstance(module, nn.TransformerEncoderLayer):
        if type(module) is not nn.TransformerEncoderLayer:
            return _extends(nn.TransformerEncoderLayer)
        own = module.linear1, module.linear2, None, module.activation, module.dropout, None
        return _describe(*own)
    if isinstance(module, nn.Sequential):
        return _read_sequential(module)
    return _read_children(module, dict(module.named_children()))


def _read_children(module: Any, children: dict[str, nn.Module]) -> DenseFFN | str | None:
    """Know classes by their children; what these compute is tried later."""
    function = getattr(module, "activation", None)
    if children.keys() - {"activation"} == _CONVOLUTIONAL:
        return _describe(module.conv1, module.conv2, None, function, module.dropout, None)
    if children.keys() - {"act_fn"} == {"up_proj", "gate_proj", "down_proj"}:
        function, gate = getattr(module, "act_fn", None), module.gate_proj
        return _describe(module.up_proj, module.down_proj, gate, function, None, None)
    sizes = {name: _size(child) for name, child in children.items() if _size(child)}
    others = [child for name, child in children.items() if name not in sizes]
    if any(re.match("q|k_|key|v_|value", name) for name in sizes):
        return None  # attention
    alone = all(next(child.parameters(), None) is None for child in others)
    for up, (narrow, wide) in sizes.items():
        for down, size in sizes.items():
            if size != (wide, narrow) or narrow >= wide:
                continue
            if alone:
                return f"needs parts={{'up': {up!r}, 'down': {down!r}, 'activation': ...}}"
            if re.fullmatch(r"\D+1", up) and down == f"{up[:-1]}2":
                return f"computes {up!r} and {down!r} in a forward of more: make them a module"
    return None


def _read_sequential(module: nn.Sequential) -> DenseFFN | str | None:
    kinds = [type(part).__name__ for part in module]
    parts = [part for part in module if not isinstance(part, nn.Identity)]
    behind = parts.pop() if len(parts) > 3 and type(parts[-1]) is nn.Dropout else None
    if len(parts) < 3 or not _size(parts[0]) or _size(parts[0]) != _size(parts[-1])[::-1]:
        return None
    if type(module) is not nn.Sequential:
        return _extends(nn.Sequential)
    inside = len(parts) == 4 and type(parts[2]) is nn.Dropout
    dropout = parts.pop(2) if inside else None
    if len(parts) != 3:
        return f"has other parts than Linear, activation, Dropout and Linear: {kinds}"
    return _describe(parts[0], parts[2], None, parts[1], dropout, behind)


def _read_parts(module: nn.Module, parts: Mapping[str, str]) -> DenseFFN | str | None:
    """Find the parts by their names; what else has weights or drops out would be lost."""
    named = dict(module.named_modules())
    if any(named.get(name, module) is module for part, name in parts.items() if part in _NAMED):
        return None
    own = {part: named[name] for part, name in parts.items() if part in _NAMED}
    for name, child in named.items():
        weights = next(child.parameters(recurse=False), None) is not None
        if (weights or _rate(child) > 0) and not any(child is part for part in own.values()):
            return f"has beside its parts {name or 'weights of its own'!r}, which would be lost"
    name = parts["activation"]
    function = named.get(name, getattr(module, name, name if name in ACTIVATIONS else None))
    dropout = own.get("dropout")
    return _describe(own["up"], own["down"], own.get("gate"), function, dropout, None)


def _extends(kind: type) -> str:
    return f"extends {kind.__name__}, so its forward may do more"


def _rate(dropout: Any) -> float:
    return float(dropout.p) if isinstance(dropout, _DropoutNd) else 0.0


def _size(module: Any) -> tuple[int, ...]:
    """``(in, out)`` of a linear map of any class."""
    if isinstance(module, nn.Conv1d):
        return (module.in_channels, module.out_channels)
    if type(module).__module__ == "transformers.pytorch_utils":  # Conv1D
        return tuple(module.weight.shape)
    sizes: list[Any] = [getattr(module, n, None) for n in ("in_features", "out_features")]
    return () if None in sizes else tuple(sizes)


def _describe(
    up: Any, down: Any, gate: Any, function: Any, dropout: Any, behind: nn.Module | None
) -> DenseFFN | str | None:
    """Check that the parts make an FFN that `SegMoE` computes."""
    activation = function if isinstance(function, str) else activation_of(function)
    linears = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
    size = _size(up)
    if not size or _size(down) != size[::-1] or (gate is not None and _size(gate) != size):
        return None
    for name, part in linears.items():
        if not _is_linear(part):
            kind = f"{type(part).__module__}.{type(part).__name__}"
            return f"has a {name} that is no plain Linear: {kind} of {type(part.weight).__name__}"
    if activation is None:
        kind = getattr(function, "__name__", type(function).__name__)
        return f"has an activation other than GELU, ReLU and SiLU of torch or transformers: {kind}"
    if dropout is not None and type(dropout) not in {nn.Dropout, nn.Identity}:
        return f"has a {type(dropout).__name__} for its dropout, which must be exactly nn.Dropout"
    return DenseFFN(up, down, gate, activation, _rate(dropout), behind)


def _is_linear(module: Any) -> bool:
    """Whether it is a linear map of each step, and no subclass or packed weight."""
    if type(module) not in {nn.Linear, nn.Conv1d} or is_traceable_wrapper_subclass(module.weight):
        return False
    if type(module) is nn.Conv1d:
        one = module.kernel_size == (1,) and module.stride == (1,) and module.groups == 1
        return one and module.padding in {(0,), "valid", "same"}
    return True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Both(nn.Module):
    """A module and what was read from it, on the same weights."""

    def __init__(self, module: nn.Module, dense: DenseFFN) -> None:
        super().__init__()
        self.module, self.dense = module, dense

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        """What the module computes, and what its description does."""
        drop = torch.relu if self.training and self.dense.dropout else None
        layer: Any = self.module
        if isinstance(self.dense.up, nn.Conv1d):
            attended = layer.norm1(x + layer.dropout(layer.attention(x)[0]))
            y = layer.dropout(self.dense(attended, drop))
            return layer(x)[0], layer.norm2(attended + y)
        y = self.dense(x, drop)
        return layer(x), y if self.dense.behind is None else self.dense.behind(y)


class _Attention(nn.Module):
    """In place of an attention, whose arguments and formula don't matter."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Reverse the width."""
        return x.flip(-1) / 2, None


def difference(module: nn.Module, dense: DenseFFN) -> str | None:
    """Say how a module's own forward differs from what was read of it, on random weights and rows.

    The weights are drawn in float64 on the CPU, for modules of any dtype, on any device.
    In training mode a dropout is tried with relu in its place, so that its place is seen.
    """
    if type(module) is nn.TransformerEncoderLayer:
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    with ExitStack() as after:
        if isinstance(dense.up, nn.Conv1d):
            after.callback(module._modules.__setitem__, "attention", module._modules["attention"])
            module._modules["attention"] = _Attention()
        for child in module.modules():
            if _rate(child):
                hook = child.register_forward_hook(_drop)
                after.callback(hook.remove)
        both = _Both(module, dense)
        after.enter_context(evaluating(both))
        after.enter_context(torch.random.fork_rng(devices=[]))
        # Forward must not see the fake tensors of a mode in which a model is only planned.
        after.enter_context(unset_fake_temporarily())
        shapes = {name: tuple(value.shape) for name, value in both.named_parameters()}
        values = {n: draw(*shape) / max(1, shape[-1]) ** 0.5 for n, shape in shapes.items()}
        values |= {n: buffer.detach().double().cpu() for n, buffer in both.named_buffers()}
        # From small rows to large ones, as a clamp shows in large ones alone.
        scale = torch.logspace(-1, 2, 4, dtype=torch.float64, device="cpu").view(2, 2, 1)
        x = scale * draw(2, 2, dense.up.weight.shape[1])
        for training in (False, True):
            for part in both.modules():
                part.training = training
            try:
                actual, expected = functional_call(both, values, (x,))
            except Exception as error:
                return f"can't be tried on (B, T, D) rows: {type(error).__name__}: {error}"
            if not isinstance(actual, Tensor) or actual.shape != expected.shape:
                return "returns something else than (..., T, D)"
            apart = (actual - expected).abs().amax(-1)
            if not bool((apart <= 1e-6 * expected.abs().amax(-1)).all()):
                when = " in training" if training else ""
                return f"computes something else{when} than its parts say"
    return None


def _drop(dropout: nn.Module, args: tuple[Tensor], _: Tensor) -> Tensor:
    return args[0].relu() if dropout.training else args[0]
