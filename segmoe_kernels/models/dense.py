"""What is known of other models' dense FFNs: their linear maps, activation and dropout."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.models.adapters import put_inside

SHAPES: tuple[Mapping[str, str], ...] = (
    # Llama and its relatives.
    {"up": "up_proj", "gate": "gate_proj", "down": "down_proj", "activation": "act_fn"},
    # T5 1.1.
    {"up": "wi_1", "gate": "wi_0", "down": "wo", "activation": "act", "dropout": "dropout"},
    # T5, Chronos-Bolt, Chronos-2.
    {"up": "wi", "down": "wo", "activation": "act", "dropout": "dropout"},
    # uni2ts: Moirai.
    {"up": "fc1", "gate": "fc_gate", "down": "fc2", "activation": "activation",
     "dropout": "dropout1"},
    {"up": "fc1", "down": "fc2", "activation": "activation", "dropout": "dropout1"},
    # PatchTSMixer.
    {"up": "fc1", "down": "fc2", "activation": "gelu", "dropout": "dropout1"},
    # Hugging Face's TimeSeriesTransformer, Informer, Autoformer and all else that is like BART.
    {"up": "fc1", "down": "fc2", "activation": "activation_fn", "dropout": "activation_dropout"},
    # TimesFM: 2.5 in transformers, 2.5 and 3 in timesfm, 2 in transformers.
    {"up": "fc1", "down": "fc2", "activation": "activation_fn"},
    {"up": "ff0", "down": "ff1", "activation": "activation"},
    {"up": "gate_proj", "down": "down_proj", "activation": "relu"},
    # Time-Series-Library and neuralforecast: encoder and decoder layers, also Autoformer's,
    # FEDformer's and TimeXer's; Pyraformer; MultiPatchFormer.
    {"up": "conv1", "down": "conv2", "activation": "activation", "dropout": "dropout"},
    {"up": "w_1", "down": "w_2", "activation": "gelu", "dropout": "dropout"},
    {"up": "linear_1", "down": "linear_2", "activation": "activation"},
)  # fmt: skip
"""FFNs by the names of their parts, as ``parts`` of `replace_ffn` says them; the first fits."""

MIXTURES = {"MoEFeedForward"}
"""Classes that are swapped with all their ``experts``: those of Moirai-MoE."""

UNDERSTOOD = (
    "be a torch.nn.TransformerEncoderLayer, a Sequential of Linear, activation (GELU, ReLU, SiLU), "
    "perhaps Dropout, and Linear, a module with maps of the names that docs/swapping.md lists, or "
    "what parts describes"
)

_MAPS = ("up", "gate", "down")
_DROPOUTS = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout}
_DROPOUTS |= {F.dropout1d, F.dropout2d, F.dropout3d}


class DenseFFN(NamedTuple):
    """What `replace_ffn` knows of a dense FFN."""

    up: nn.Linear | nn.Conv1d
    down: nn.Linear | nn.Conv1d
    gate: nn.Linear | nn.Conv1d | None
    activation: str
    dropout: float
    # The names of these in their module, where it is not of a class with a place for each.
    parts: Mapping[str, str] | None = None
    # Whether the module's forward does more, so that experts go where its maps are.
    inside: bool = False
    # The FFNs of a mixture, of which the first is described above.
    experts: tuple["DenseFFN", ...] = ()

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
        own = module.linear1, module.linear2, None, module.activation, module.dropout
        return _describe(*own)
    if isinstance(module, nn.Sequential):
        return _read_sequential(module)
    if type(module).__name__ in MIXTURES:
        return _read_mixture(module)
    found = (_read_parts(module, shape) for shape in SHAPES)
    return next((dense for dense in found if dense is not None), None) or _hint(module)


def _read_parts(module: nn.Module, parts: Mapping[str, str]) -> DenseFFN | str | None:
    """Find the parts by their names: maps, and what is a child, an attribute or a known word."""
    named = dict(module.named_modules())
    maps = [named.get(parts[part]) for part in _MAPS if part in parts]
    if any(child is None or child is module for child in maps):
        return None
    own: dict[str, Any] = {part: named[parts[part]] for part in _MAPS if part in parts}
    name = parts["activation"]
    function = named.get(name, getattr(module, name, name if name in ACTIVATIONS else None))
    dropout = None
    if "dropout" in parts:
        dropout = named.get(parts["dropout"], getattr(module, parts["dropout"], None))
    if function is None or ("dropout" in parts and dropout is None):
        return None
    dense = _describe(own["up"], own["down"], own.get("gate"), function, dropout)
    return dense._replace(parts=parts) if isinstance(dense, DenseFFN) else dense


def _read_mixture(module: Any) -> DenseFFN | str | None:
    """Describe a mixture of experts by these."""
    read = [read_ffn(expert) for expert in module.experts]
    experts = [
        dense if dense is None or isinstance(dense, str) else settle(expert, dense)
        for expert, dense in zip(module.experts, read, strict=True)
    ]
    known = tuple(dense for dense in experts if isinstance(dense, DenseFFN))
    if not known or len(known) < len(experts):
        return None
    return known[0]._replace(experts=known, parts=None, inside=False)


def _read_sequential(module: nn.Sequential) -> DenseFFN | str | None:
    kinds = [type(part).__name__ for part in module]
    parts = [part for part in module if not isinstance(part, nn.Identity)]
    if len(parts) > 3 and type(parts[-1]) is nn.Dropout:
        parts.pop()
    if len(parts) < 3 or not _size(parts[0]) or _size(parts[0]) != _size(parts[-1])[::-1]:
        return None
    if type(module) is not nn.Sequential:
        return _extends(nn.Sequential)
    inside = len(parts) == 4 and type(parts[2]) is nn.Dropout
    dropout = parts.pop(2) if inside else None
    if len(parts) != 3:
        return f"has other parts than Linear, activation, Dropout and Linear: {kinds}"
    return _describe(parts[0], parts[2], None, parts[1], dropout)


def _hint(module: nn.Module) -> str | None:
    """Say how a module may be described whose children could make an FFN."""
    children = dict(module.named_children())
    sizes = {name: _size(child) for name, child in children.items() if _size(child)}
    others = [child for name, child in children.items() if name not in sizes]
    if any(re.match("q|k_|key|v_|value", name) for name in sizes):
        return None  # attention
    alone = all(next(child.parameters(), None) is None for child in others)
    for up, (narrow, wide) in sizes.items():
        for down, size in sizes.items():
            numbered = re.fullmatch(r"\D+1", up) and down == f"{up[:-1]}2"
            if size == (wide, narrow) and narrow < wide and (alone or numbered):
                return f"needs parts={{'up': {up!r}, 'down': {down!r}, 'activation': ...}}"
    return None


def _extends(kind: type) -> str:
    return f"extends {kind.__name__}, so its forward may do more"


def _size(module: Any) -> tuple[int, ...]:
    """``(in, out)`` of a linear map of any class."""
    if isinstance(module, nn.Conv1d):
        return (module.in_channels, module.out_channels)
    if type(module).__module__ == "transformers.pytorch_utils":  # Conv1D
        return tuple(module.weight.shape)
    sizes: list[Any] = [getattr(module, n, None) for n in ("in_features", "out_features")]
    return () if None in sizes else tuple(sizes)


def _describe(up: Any, down: Any, gate: Any, function: Any, dropout: Any) -> DenseFFN | str | None:
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
    if type(dropout) in {nn.Dropout, nn.Identity, type(None)}:
        dropout = getattr(dropout, "p", 0.0)
    elif isinstance(dropout, nn.Module):
        return f"has a {type(dropout).__name__} for its dropout, which must be exactly nn.Dropout"
    return DenseFFN(up, down, gate, activation, float(dropout))


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


class _Attention(nn.Module):
    """In place of an attention, whose arguments and formula don't matter."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Reverse the width of the first tensor."""
        x = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return x.flip(-1) / 2, None


class _Described(nn.Module):
    """What was read of an FFN, in its place."""

    def __init__(self, dense: DenseFFN) -> None:
        super().__init__()
        self.dense, self.shapes = dense, list[tuple[int, ...]]()

    def forward(self, x: Tensor) -> Tensor:
        """Compute it, with relu for its dropout, and remember the shape of the rows."""
        self.shapes.append(tuple(x.shape))
        return self.dense(x, torch.relu if self.training and self.dense.dropout else None)


class _Both(nn.Module):
    """A module and what was read from it, on the same weights."""

    def __init__(self, module: nn.Module, dense: DenseFFN) -> None:
        super().__init__()
        self.module, self.described = module, _Described(dense)

    def forward(self, x: Tensor) -> tuple[Any, Any]:
        """What the module computes, and what it does with its description in its place."""
        dense = self.described.dense
        if not dense.inside:
            return self.module(x), self.described(x)
        parameters = inspect.signature(self.module.forward).parameters.values()
        needed = [
            p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        rows = [x] * max(1, len(needed))
        before = self.module(*rows)
        with _restored(self.module):
            put_inside(self.module, dense.linears(), self.described)
            return before, self.module(*rows)


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Give every module its children back."""
    children = [(part, dict(part._modules)) for part in module.modules()]
    try:
        yield
    finally:
        for part, own in children:
            part._modules.clear()
            part._modules.update(own)


class _Drop(TorchFunctionMode):
    """Relu in place of dropout in training."""

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            return func(*args, **kwargs)
        given = {**dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
        drops = given.get("training", True) and given.get("p", 0.5) > 0
        return given["input"].relu() if drops else given["input"]


def settle(module: nn.Module, dense: DenseFFN, inside: bool | None = None) -> DenseFFN | str:
    """Whether experts go in place of a module or inside; or how it differs from what was read.

    Only what takes nothing but rows may be replaced as a whole; ``inside`` says which, else both
    are tried.
    """
    if isinstance(module, nn.TransformerEncoderLayer) or dense.experts:
        return dense
    if "forward" in vars(module):
        return f"has a forward set on an instance: of {type(module).__name__}"
    alone = len(inspect.signature(module.forward).parameters) == 1
    ways = [inside] if inside is not None else [False, True] if alone else [True]
    reasons = []
    for way in ways:
        reason = _difference(module, dense._replace(inside=way))
        if reason is None:
            return dense._replace(inside=way)
        reasons.append(reason)
    return reasons[0]


def _difference(module: nn.Module, dense: DenseFFN) -> str | None:
    """Say how a module's own forward differs from what was read of it, on random weights and rows.

    The weights are drawn in float64 on the CPU, for modules of any dtype, on any device.
    In training mode a dropout is tried with relu in its place, so that its place is seen.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    both = _Both(module, dense)
    # Forward must not see the fake tensors of a mode in which a model is only planned.
    with (
        evaluating(both), _restored(module), unset_fake_temporarily(), torch.device("cpu"),
        torch.random.fork_rng([]),
    ):  # fmt: skip
        for part in list(module.modules()) if dense.inside else ():
            for name in part._modules:
                if re.search("(^|_)(attn|attention)$", name):
                    part._modules[name] = _Attention()
        shapes = {name: tuple(value.shape) for name, value in both.named_parameters()}
        values = {n: draw(*shape) / max(1, shape[-1]) ** 0.5 for n, shape in shapes.items()}
        for name, buffer in both.named_buffers():
            kind = torch.float64 if buffer.is_floating_point() else buffer.dtype
            values[name] = buffer.detach().to("cpu", kind, copy=True)
        # From small rows to large ones, as a clamp shows in large ones alone.
        scale = torch.logspace(-1, 2, 4, dtype=torch.float64, device="cpu").view(2, 2, 1)
        x = scale * draw(2, 2, dense.up.weight.shape[1])
        for training in (False, True):
            for part in both.modules():
                part.training = training
            try:
                with _Drop():
                    outputs = functional_call(both, values, (x,))
            except Exception as error:
                return f"can't be tried on (B, T, D) rows: {type(error).__name__}: {error}"
            if not dense.inside and getattr(outputs[0], "shape", None) != x.shape:
                return "returns something else than (..., T, D)"
            if not _close(*outputs):
                when = " in training" if training else ""
                return f"computes something else{when} than its parts say"
    if set(both.described.shapes) != {tuple(x.shape)}:
        return f"gives its FFN other rows than (B, T, D), of shape {both.described.shapes[:1]}"
    return None


def _close(actual: Any, expected: Any) -> bool:
    """Whether all tensors of two outputs agree, row by row."""
    pairs = [[x for x in tree_leaves(out) if isinstance(x, Tensor)] for out in (actual, expected)]
    return all(
        bool(((one - other).abs().amax(-1) <= 1e-6 * other.abs().amax(-1)).all())
        for one, other in zip(*pairs, strict=True)
    )
