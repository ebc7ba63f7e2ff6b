"""Segment-wise experts in models that exist: `replace_ffn` and `upcycle`."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from segmoe_kernels import validation as check
from segmoe_kernels.adapters import SegMoEEncoderLayer, TSLibEncoderLayer
from segmoe_kernels.convert import segment_schedule
from segmoe_kernels.dense_ffn import UNDERSTOOD, DenseFFN, read_ffn
from segmoe_kernels.layer import SegMoE

__all__ = ["replace_ffn", "upcycle"]


def _options_of(dense: DenseFFN) -> dict[str, Any]:
    linears = [part for part in (dense.up, dense.down, dense.gate) if part is not None]
    return {
        "d_model": dense.up.weight.shape[1],
        "d_ff": dense.up.weight.shape[0],
        "activation": dense.activation,
        "gated": dense.gate is not None,
        "bias": any(part.bias is not None for part in linears),
        "dropout": dense.dropout,
        "device": dense.up.weight.device,
        "dtype": dense.up.weight.dtype,
    }


def _copy_into(layer: SegMoE, dense: DenseFFN, noise: float) -> None:
    """Make every expert a copy of a dense FFN, plus noise of ``noise`` standard deviations."""
    experts = layer.experts
    assert experts is not None  # `_build` looked
    with torch.no_grad():
        for name, linear in (("up", dense.up), ("down", dense.down), ("gate", dense.gate)):
            if linear is None:
                continue
            weight = getattr(experts, f"{name}_proj")
            one = linear.weight.flatten(1)  # a convolution's last dimension is 1
            weight.copy_(one.expand_as(weight))
            if noise:
                weight.add_(torch.randn_like(weight) * (noise * one.std()))
            bias = getattr(experts, f"{name}_proj_bias")
            if bias is not None:
                bias.zero_() if linear.bias is None else bias.copy_(linear.bias.expand_as(bias))


def _build(
    function: str, dense: DenseFFN, copy: bool, noise: float, options: dict[str, Any]
) -> SegMoE:
    own = _options_of(dense)
    if copy:
        # Weights that sum to 1, nothing beside the experts: at first what the dense FFN computes.
        own |= {"renormalize": True, "shared_expert": None}
    layer = SegMoE(**{**own, **options})
    if copy:
        for name in ("d_model", "d_ff", "activation", "gated", "bias"):
            if getattr(layer, name) != own[name]:
                rule = f"be the dense FFN's {own[name]!r} where its weights are copied"
                check.fail_value(function, name, rule, repr(getattr(layer, name)))
        if layer.expert_scope != "token":
            rule = "be 'token' where weights are copied"
            check.fail_value(function, "expert_scope", rule, repr(layer.expert_scope))
        if layer.num_experts == 0:
            check.fail_value(function, "num_experts", "be at least 1 where weights are copied", 0)
        _copy_into(layer, dense, noise)
    return layer


def upcycle(ffn: nn.Module, num_experts: int, *, noise: float = 0.0, **options: Any) -> SegMoE:
    """Build a layer whose experts are copies of a dense FFN, to go on training from it.

    With the defaults ``renormalize=True`` and ``shared_expert=None`` and without noise it computes
    what the dense FFN does, whatever the router says. A router of ``top_k=1`` then learns from the
    auxiliary losses alone; ``top_k=2`` learns from the task, too, once the experts differ.

    Args:
        ffn: what `replace_ffn` understands.
        num_experts: E.
        noise: standard deviations of the weights that are added to each expert, so that they part.
        **options: of `SegMoE`, such as ``segment_size`` and ``top_k``.

    Returns:
        SegMoE on the device, in the dtype and mode of ffn.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: if ffn is not understood, or an option doesn't fit its weights.

    Source: sparse upcycling, arXiv 2212.05055.
    """
    check.check_module("upcycle", "ffn", ffn)
    check.check_positive("upcycle", "noise", noise, zero=True)
    dense = read_ffn(ffn)
    if dense is None:
        check.fail_value("upcycle", "ffn", UNDERSTOOD, type(ffn).__name__)
    layer = _build("upcycle", dense, True, noise, {"num_experts": num_experts, **options})
    return layer.train(ffn.training)


Match = str | Callable[[str, nn.Module], bool] | None


def replace_ffn(
    model: nn.Module,
    *,
    segment_sizes: int | str | Sequence[int],
    num_experts: int,
    match: Match = None,
    copy_weights: bool = False,
    noise: float = 0.0,
    **options: Any,
) -> list[str]:
    """Swap the dense FFNs of a model for `SegMoE`, in place.

    Understood are `torch.nn.TransformerEncoderLayer` (it becomes a `SegMoEEncoderLayer`), a
    ``Sequential(Linear, activation, [Dropout,] Linear[, Dropout])`` such as ``ff`` in Hugging
    Face's PatchTST and in neuralforecast's models, modules of ``gate_proj``, ``up_proj``,
    ``down_proj`` and ``act_fn`` such as Llama's MLP, and Time-Series-Library's encoder layer (it
    becomes a `TSLibEncoderLayer`). Width, hidden width, activation, gating,
    biases, dropout, device and dtype are those of the FFN unless options say otherwise. Either all
    are swapped or, on an error, none.

    Args:
        model: changed in place; what it returns keeps its shape.
        segment_sizes: P for all, or one for each FFN in the order of ``model.named_modules()``, as
            a sequence or as text such as "5,5,4,4,3,3".
        num_experts: E.
        match: which modules: a regular expression that matches a module's whole name, or a
            function of name and module; None takes every FFN that is understood.
        copy_weights: start each expert from the FFN's weights, see `upcycle`.
        noise: see `upcycle`.
        **options: of `SegMoE`, such as ``top_k``, ``aux_loss_weight`` and ``causal`` (which a model
            that must not look ahead needs).

    Returns:
        Names of the modules that were swapped.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: if nothing matches, a match is not understood, or sizes don't fit.
    """
    name = "replace_ffn"
    check.check_module(name, "model", model)
    check.check_flag(name, "copy_weights", copy_weights)
    check.check_positive(name, "noise", noise, zero=True)
    found = _find(model, match)
    sizes = _sizes(segment_sizes, len(found))
    layers = []
    for dense, size in zip(found.values(), sizes, strict=True):
        own = {"num_experts": num_experts, "segment_size": size, **options}
        layers.append(_build(name, dense, copy_weights, noise, own))
    named = dict(model.named_modules())
    for (place, dense), layer in zip(found.items(), layers, strict=True):
        old = named[place]
        layer.train(old.training)
        if isinstance(old, nn.TransformerEncoderLayer):
            _swap_encoder_layer(old, layer)
            continue
        new: nn.Module = layer
        if isinstance(dense.up, nn.Conv1d):
            kept = (getattr(old, part) for part in ("norm1", "norm2", "dropout"))
            new = TSLibEncoderLayer(old.attention, layer, *kept).train(old.training)
        elif dense.behind is not None:
            new = nn.Sequential(layer, dense.behind)
        _put(model, old, new)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # Its shortcut hands nested tensors to all layers, if only the first can take them.
            swapped = any(isinstance(layer, SegMoEEncoderLayer) for layer in module.layers)
            module.use_nested_tensor &= not swapped
    return list(found)


def _find(model: nn.Module, match: Match) -> dict[str, DenseFFN]:
    """Name and description of each FFN to swap."""
    wanted = _predicate(match)
    found: dict[str, DenseFFN] = {}
    taken: list[str] = []
    for place, module in model.named_modules():
        if any(place.startswith(f"{outer}." if outer else "") for outer in taken):
            continue
        if isinstance(module, SegMoE):
            taken.append(place)
            continue
        if wanted is not None and not wanted(place, module):
            continue
        dense = read_ffn(module)
        if dense is not None:
            inside_model = place or isinstance(module, nn.TransformerEncoderLayer)
            if not inside_model:
                rule = "have the FFN inside; upcycle() makes a layer of an FFN alone"
                check.fail_value("replace_ffn", "model", rule, type(module).__name__)
            found[place] = dense
            taken.append(place)
        elif wanted is not None:
            got = f"{type(module).__name__} at {place!r}"
            check.fail_value("replace_ffn", "match", f"select what can {UNDERSTOOD}", got)
    if not found:
        modules = list(itertools.islice((n for n, _ in model.named_modules() if n), 6))
        got = f"modules such as {modules}"
        if match is None:
            check.fail_value("replace_ffn", "model", f"have inside what can {UNDERSTOOD}", got)
        check.fail_value("replace_ffn", "match", "select an FFN", f"{match!r} for {got}")
    return found


def _predicate(match: Any) -> Callable[[str, nn.Module], bool] | None:
    if match is None:
        return None
    if callable(match):
        wanted: Callable[[str, nn.Module], bool] = match
        return wanted
    if not isinstance(match, str):
        rule = "be a regular expression, a function or None"
        check.fail_type("replace_ffn", "match", rule, type(match).__name__)
    try:
        pattern = re.compile(match)
    except re.error as error:
        check.fail_value("replace_ffn", "match", f"be a regular expression ({error})", repr(match))
    return lambda place, _: pattern.fullmatch(place) is not None


def _sizes(segment_sizes: int | str | Sequence[int], count: int) -> list[int]:
    name = "replace_ffn"
    sizes: list[int]
    if isinstance(segment_sizes, str):
        sizes = segment_schedule(segment_sizes, count)
    elif isinstance(segment_sizes, Sequence):
        sizes = [*segment_sizes]
        if len(sizes) not in {1, count}:
            rule = f"have 1 or {count} sizes, one for each FFN"
            check.fail_value(name, "segment_sizes", rule, sizes)
    else:
        sizes = [segment_sizes]
    for size in sizes:
        check.check_integer(name, "segment_sizes", size, 1)
    return sizes * count if len(sizes) == 1 else sizes


def _swap_encoder_layer(old: nn.TransformerEncoderLayer, layer: SegMoE) -> None:
    for name in ("linear1", "linear2", "dropout"):
        delattr(old, name)
    # No shortcut for the FFN that was.
    old.activation_relu_or_gelu = 0
    old.__class__ = SegMoEEncoderLayer
    old.seg_moe = layer


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module everywhere another one is."""
    for parent in list(model.modules()):
        # Not `named_children`, which names a module once.
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
