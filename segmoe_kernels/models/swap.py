"""Segment-wise experts in models that exist: `replace_ffn` and `upcycle`."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import FakeTensor

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.models.adapters import (
    MixtureOfSegments,
    SegMoEEncoderLayer,
    check_masks,
    leave_encoder,
    mixes_steps,
    put,
    put_inside,
    refuse_rows,
)
from segmoe_kernels.models.dense import UNDERSTOOD, DenseFFN, evaluating, read_ffn, settle
from segmoe_kernels.models.official import read_schedule
from segmoe_kernels.models.probe import Probe, check_inputs
from segmoe_kernels.models.recipe import Place, read_recipe, swap_recipe
from segmoe_kernels.models.search import (
    Match,
    decoder_around,
    find_ffns,
    listed,
    obstacle,
    settled_at,
    switch_cache_off,
)

__all__ = ["replace_ffn", "upcycle"]

_LOGGER = logging.getLogger("segmoe_kernels")


# Options that come from the FFN, and have to where its weights are copied.
_FROM_FFN = ("d_model", "d_ff", "activation", "gated", "bias")


def _copy_into(layer: SegMoE, dense: DenseFFN, noise: float) -> None:
    """Make every expert a copy of a dense FFN, plus noise relative to its weights' size."""
    experts = layer.experts
    assert experts is not None  # `_build` looked
    with torch.no_grad():
        for e, ffn in enumerate(dense.experts or [dense] * layer.num_experts):
            for name, linear in ffn.linears().items():
                weight = getattr(experts, f"{name}_proj")[e]
                weight.copy_(linear.weight.flatten(1))  # a convolution's last dimension is 1
                if noise:
                    # Not the standard deviation, which a single weight has none of.
                    scale = noise * weight.square().mean().sqrt()
                    weight.add_(torch.randn_like(weight) * scale)
                bias = getattr(experts, f"{name}_proj_bias")
                if bias is not None:
                    bias[e].zero_() if linear.bias is None else bias[e].copy_(linear.bias)


def _build(
    function: str, dense: DenseFFN, copy: bool, noise: float, options: dict[str, Any]
) -> SegMoE:
    weight = dense.up.weight
    own: dict[str, Any] = {
        "d_model": weight.shape[1],
        "d_ff": weight.shape[0],
        "activation": dense.activation,
        "gated": dense.gate is not None,
        "bias": any(part.bias is not None for part in dense.linears().values()),
        "dropout": dense.dropout,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    if copy:
        # Weights that sum to 1, nothing beside the experts: at first what the dense FFN computes.
        own |= {"renormalize": True, "shared_expert": None}
    layer = SegMoE(**{**own, **options})
    if copy:
        rules = {name: f"be the dense FFN's {own[name]!r} where its" for name in _FROM_FFN}
        rules["expert_scope"] = "be 'token' where"
        for name, rule in rules.items():
            value = getattr(layer, name)
            if value != own.get(name, "token"):
                check.fail_value(function, name, f"{rule} weights are copied", repr(value))
        if layer.num_experts == 0:
            check.fail_value(function, "num_experts", "be at least 1 where weights are copied", 0)
        if dense.experts and layer.num_experts != len(dense.experts):
            rule = f"be the mixture's {len(dense.experts)} where its weights are copied"
            check.fail_value(function, "num_experts", rule, layer.num_experts)
        _copy_into(layer, dense, noise)
        _compare(function, layer, dense, noise, {**own, **options})
    weights = [weight for linear in dense.linears().values() for weight in linear.parameters()]
    # What stands for a frozen FFN is frozen, its router, too.
    return layer.requires_grad_(any(weight.requires_grad for weight in weights))


def _compare(
    function: str, layer: SegMoE, dense: DenseFFN, noise: float, options: dict[str, Any]
) -> None:
    """Send some rows through the experts and the FFN that they were copied from."""
    exact = not noise and options["renormalize"] is True and options["shared_expert"] is None
    exact &= not dense.experts
    weight = dense.up.weight
    if not exact or weight.is_meta or isinstance(weight, FakeTensor):
        return
    rows = torch.linspace(-1, 1, 2 * layer.d_model, dtype=weight.dtype, device=weight.device)
    x = rows.view(1, 2, -1)
    backend, layer.backend = layer.backend, "reference"
    with evaluating(layer):
        expected, actual = dense(x), layer(x)
    layer.backend = backend
    error = (actual - expected).abs().max()
    if not error <= torch.finfo(x.dtype).eps ** 0.5 * expected.abs().max():
        rule = "compute at first what the FFN does"
        check.fail_value(function, "layer", rule, f"a difference of {error.item():.2g}")


def upcycle(ffn: nn.Module, num_experts: int, *, noise: float = 0.0, **options: Any) -> SegMoE:
    """Build a layer whose experts are copies of a dense FFN, to go on training from it.

    With the defaults ``renormalize=True`` and ``shared_expert=None`` and without noise it computes
    what the dense FFN does, whatever the router says. A router of ``top_k=1`` then learns from the
    auxiliary losses alone; ``top_k=2`` learns from the task, too, once the experts differ.

    Args:
        ffn: an FFN that `replace_ffn` understands, without attention, a dropout on its output, or
            hooks; frozen or not as a whole, which the layer then is, too.
        num_experts: E.
        noise: relative size of normal noise on each expert's weights, measured by their root mean
            square, so that the experts part.
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
    dense, kind = read_ffn(ffn), type(ffn).__name__
    if not isinstance(dense, DenseFFN):
        got = kind if dense is None else f"{kind}, which {dense}"
        check.fail_value("upcycle", "ffn", UNDERSTOOD, got)
    if reason := _beside(ffn, dense):
        got = f"{kind}, which {reason}"
        check.fail_value("upcycle", "ffn", "be an FFN with nothing beside it", got)
    layer = _build("upcycle", dense, True, noise, {"num_experts": num_experts, **options})
    return layer.train(ffn.training)


def _beside(ffn: nn.Module, dense: DenseFFN) -> str | None:
    """Say what of a module a `SegMoE` alone would lose."""
    settled = settle(ffn, dense)
    if isinstance(settled, str):
        return settled
    if settled.inside or isinstance(ffn, nn.TransformerEncoderLayer):
        return "does more than its FFN: use replace_ffn(copy_weights=True)"
    return obstacle({"": ffn}, "", settled)


def replace_ffn(
    model: nn.Module,
    *,
    segment_sizes: int | str | Sequence[int] | None = None,
    num_experts: int | None = None,
    match: Match = None,
    parts: Mapping[str, str] | None = None,
    copy_weights: bool = False,
    noise: float = 0.0,
    causal: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> list[str]:
    """Swap the dense FFNs of a model for `SegMoE`, in place.

    Understood are `torch.nn.TransformerEncoderLayer` (it becomes a `SegMoEEncoderLayer`), a
    ``Sequential(Linear, activation, [Dropout,] Linear[, Dropout])`` such as ``ff`` in Hugging
    Face's PatchTST and in neuralforecast's models, modules of ``gate_proj``, ``up_proj``,
    ``down_proj`` and ``act_fn`` such as Llama's MLP, Time-Series-Library's encoder layer (it
    becomes a `TSLibEncoderLayer`), and what ``parts`` describes. Classes are taken exactly, and
    each module is tried on random weights and rows against what was read of it. Width, hidden
    width, activation, gating, biases, dropout, device, dtype and whether it is frozen are those of
    the FFN unless options say otherwise. Either all are swapped or, on an error, none; an FFN that
    must stay is warned about, with the reason. How many parameters the model gains is logged. Swap
    before an optimizer is made, which would go on with the FFN's, and before the model is wrapped.

    Experts of segments look at neighbouring rows, so rows have to be the time steps of a sequence.
    With ``example_inputs`` the model is called before and after: sequences of a batch that did not
    depend on each other, outputs that did not depend on later steps, or on steps that a mask of
    shape (B, T) among the inputs hides, and dimensions whose order or others did not matter have to
    stay so. Use it wherever an example is at hand. Padding reaches experts through
    ``src_key_padding_mask`` of PyTorch's encoder layers alone.

    Args:
        model: changed in place; what it returns keeps its shape.
        segment_sizes: P for all, or one for each FFN in the order of ``model.named_modules()``, as
            a sequence or as text such as "5,5,4,4,3,3".
        num_experts: E.
        match: which modules: a regular expression that matches a module's whole name, or a
            function of name and module; None takes every FFN that is understood.
        parts: describes FFNs of another class by the names of their children: "up", "down" and
            "activation" (a child, an attribute, or a name that `SegMoE` knows), perhaps "gate"
            (its output is activated, not that of "up") and "dropout" (on the hidden layer).
        copy_weights: start each expert from the FFN's weights, see `upcycle`.
        noise: see `upcycle`; 0 without copy_weights.
        causal: see `SegMoE`; None: False, but refused in a decoder, whose experts would see the
            future.
        recipe: of `swap_recipe`, alone: does to the model what was done to the one that it was
            made of, for a checkpoint of that one.
        example_inputs: arguments of the model as a tuple, or as a dict by name; the first tensor
            is (B, T, ...) with at least 2 sequences.
        **options: of `SegMoE`, such as ``top_k`` and ``shared_expert``. ``aux_loss_weight`` and
            ``z_loss_weight`` are divided by the number of layers made by one call, so that the
            losses' sum has the size of the official one; with example_inputs by how often a forward
            calls these, which without it you have to divide by where a layer is called repeatedly.

    Returns:
        Names of the modules that were swapped.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: if nothing matches, a match is not understood, sizes don't fit, a recipe can't
            be followed, or the model would do something else than a model with experts of its time
            steps.
    """
    name = "replace_ffn"
    check.check_module(name, "model", model)
    if recipe is not None:
        given = (segment_sizes, num_experts, match, parts, causal, example_inputs)
        if copy_weights or noise or options or any(value is not None for value in given):
            check.fail_value(name, "recipe", "be the only argument beside the model", "others")
        return _follow(model, recipe)
    check.check_flag(name, "copy_weights", copy_weights)
    check.check_positive(name, "noise", noise, zero=True)
    if noise and not copy_weights:
        check.fail_value(name, "noise", "be 0 without copy_weights=True", noise)
    check.check_flag(name, "causal", causal, optional=True)
    _check_parts(parts)
    if example_inputs is not None:
        check_inputs(example_inputs)
    # By their words, as what is no number is refused later.
    of_steps = bool(causal) or (str(segment_sizes) != "1" and str(num_experts) != "0")
    found, left = find_ffns(model, match, parts, of_steps=of_steps)
    sizes = read_schedule(name, "segment_sizes", segment_sizes, len(found))
    for weight in ("aux_loss_weight", "z_loss_weight"):
        if weight in options:
            check.check_positive(name, weight, options[weight], zero=True)
    options = {"num_experts": num_experts, "causal": bool(causal), **options}
    layers = {
        ffn: _build(name, dense, copy_weights, noise, {"segment_size": size, **options})
        for (ffn, dense), size in zip(found.items(), sizes, strict=True)
    }
    _check_around(model, layers, causal)
    if left:
        warnings.warn(f"segmoe_kernels.{name} left {listed(model, left)}.", stacklevel=2)
    before = sum(parameter.numel() for parameter in model.parameters())
    calls = len(layers)
    if example_inputs is None:
        _apply(model, found, layers)
    else:
        calls = _apply_and_probe(model, found, layers, example_inputs) or calls
    for layer in layers.values():
        layer.aux_loss_weight /= calls
        layer.z_loss_weight /= calls
    _finish(model, layers, dict.fromkeys(layers, causal is False))
    after = sum(parameter.numel() for parameter in model.parameters())
    # A warning, as logging shows no less by default, and a segment-wide shared expert is large.
    _LOGGER.warning(
        "replace_ffn: %d SegMoE in place of FFNs; from %s to %s parameters (%.1f x)",
        *(len(found), f"{before:,}", f"{after:,}", after / before),
    )
    return list(found)


def _follow(model: nn.Module, recipe: Mapping[str, Any]) -> list[str]:
    """Do what a recipe says."""
    name, named = "replace_ffn", dict(model.named_modules())
    found: dict[str, DenseFFN] = {}
    layers: dict[str, SegMoE] = {}
    entries = dict(read_recipe(recipe))
    for ffn, entry in entries.items():
        kind = type(named[ffn]).__name__ if ffn in named else "none"
        if kind != entry["ffn"]:
            check.fail_value(
                name, "recipe", f"fit the model, with a {entry['ffn']} at {ffn!r}", kind
            )
        dense = settled_at(named, ffn, read_ffn(named[ffn], entry["parts"]), entry["inside"])
        if not isinstance(dense, DenseFFN):
            rule = f"be for FFNs that this version understands, at {ffn!r}"
            check.fail_value(name, "recipe", rule, dense or "none")
        found[ffn] = dense
        layers[ffn] = _build(name, dense, False, 0.0, entry["options"])
        width = tuple(dense.up.weight.shape[1:2])
        if (layers[ffn].d_model,) != width:
            rule = f"have d_model={width[0]} at {ffn!r}, as the model"
            check.fail_value(name, "recipe", rule, layers[ffn].d_model)
    _apply(model, found, layers)
    _finish(model, layers, {ffn: entry["may_look_ahead"] for ffn, entry in entries.items()})
    return list(found)


def _check_parts(parts: Any) -> None:
    if parts is None:
        return
    name = "replace_ffn"
    if not isinstance(parts, Mapping) or not all(isinstance(v, str) for v in parts.values()):
        check.fail_type(name, "parts", "be a mapping of names to names", repr(parts))
    needed, known = {"up", "down", "activation"}, {"up", "down", "activation", "gate", "dropout"}
    if not needed <= parts.keys() <= known:
        rule = "have 'up', 'down' and 'activation', perhaps 'gate' and 'dropout'"
        check.fail_value(name, "parts", rule, sorted(map(str, parts)))


def _check_around(model: nn.Module, layers: Mapping[str, SegMoE], causal: bool | None) -> None:
    """Refuse what types and flags tell of rows that may not look ahead."""
    named = dict(model.named_modules())
    for name in (name for name, layer in layers.items() if mixes_steps(layer)):
        if causal is None and (outer := decoder_around(named, name)) is not None:
            rule = f"be True or False for the decoder around {name!r} (False leaks the future)"
            got = f"None for {type(named[outer]).__name__}"
            check.fail_value("replace_ffn", "causal", rule, got)


def _apply(model: nn.Module, found: Mapping[str, DenseFFN], layers: Mapping[str, SegMoE]) -> None:
    """Put layers where FFNs are."""
    named = dict(model.named_modules())
    for name, layer in layers.items():
        old, dense = named[name], found[name]
        layer.train(old.training)
        layer._place = _place(old, dense)
        if isinstance(old, nn.TransformerEncoderLayer):
            _swap_encoder_layer(old, layer)
            continue
        layer.register_forward_pre_hook(partial(refuse_rows, name))
        if dense.inside:
            put_inside(old, dense.linears(), layer)
        else:
            put(model, old, MixtureOfSegments(layer) if dense.experts else layer)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # Its shortcut hands nested tensors to all layers, if only the first can take them.
            swapped = any(isinstance(layer, SegMoEEncoderLayer) for layer in module.layers)
            module.use_nested_tensor &= not swapped


def _place(old: nn.Module, dense: DenseFFN) -> Place:
    below = "seg_moe" if isinstance(old, nn.TransformerEncoderLayer) or dense.experts else ""
    if dense.inside:
        down = next(name for name, part in old.named_modules() if part is dense.down)
        below = f"{down}.seg_moe"
    return Place(type(old).__name__, dense.parts, dense.inside, below)


def _apply_and_probe(
    model: nn.Module, found: Mapping[str, DenseFFN], layers: Mapping[str, SegMoE], inputs: Any
) -> int:
    """Put layers where FFNs are if the model keeps its properties; return how often it calls them.

    Else the model is left as it was.
    """
    probe = Probe(model, inputs)
    state = [(m, m.__class__, {**vars(m), "_modules": {**m._modules}}) for m in model.modules()]

    def restore() -> None:
        for module, kind, own in state:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update({**own, "_modules": {**own["_modules"]}})

    with ExitStack() as undo:
        undo.callback(restore)
        _apply(model, found, layers)
        broken = next(probe.broken(layers), None)
        if broken is not None:
            name, rule = broken
            for one in () if name else layers:
                restore()
                _apply(model, found, {one: layers[one]})
                if rule in {what for _, what in probe.broken({one: layers[one]})}:
                    name = one
                    break
            got = f"experts at {name!r}, which break it" if name else "experts that break it"
            check.fail_value("replace_ffn", "model", rule, got)
        unseen = next(probe.unseen(layers), None)
        if unseen is not None:
            rule = f"send {unseen!r} more than a single row a sequence, and show it in the outputs"
            got = "no change (does a head or branch start at zero? Probe after a first step)"
            check.fail_value("replace_ffn", "example_inputs", rule, got)
        calls = probe.calls(layers)
        undo.pop_all()
    return calls


def _finish(
    model: nn.Module, layers: Mapping[str, SegMoE], may_look_ahead: Mapping[str, bool]
) -> None:
    """Guard what can go wrong in later calls: masks, causal calls, caches; note the recipe."""
    allowed = {layer for name, layer in layers.items() if may_look_ahead[name]}
    for module in model.modules():
        encoder = isinstance(module, nn.TransformerEncoder)
        inside: Any = module.layers if encoder else [module]
        swapped = any(isinstance(layer, SegMoEEncoderLayer) for layer in inside)
        hooks: Any = module._forward_pre_hooks
        if swapped and check_masks not in hooks.values():
            module.register_forward_pre_hook(check_masks, with_kwargs=True)
            if encoder:
                module.register_forward_hook(leave_encoder, always_call=True)
        if isinstance(module, SegMoEEncoderLayer) and module.seg_moe in layers.values():
            module.may_look_ahead = module.seg_moe in allowed
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):  # of Hugging Face
        config.segmoe = swap_recipe(model)
    if any(mixes_steps(layer) for layer in layers.values()):
        switch_cache_off(model)
        if "attention_mask" in inspect.signature(model.forward).parameters:
            message = (
                "segmoe_kernels.replace_ffn: experts don't see the model's attention_mask: what it "
                "hides changes their segments. Pad behind causal experts alone, and pass "
                "example_inputs with a mask that hides steps."
            )
            warnings.warn(message, stacklevel=3)


def _swap_encoder_layer(old: nn.TransformerEncoderLayer, layer: SegMoE) -> None:
    for name in ("linear1", "linear2", "dropout"):
        delattr(old, name)
    # No shortcut for the FFN that was.
    old.activation_relu_or_gelu = 0
    old.__class__ = SegMoEEncoderLayer
    new = cast(SegMoEEncoderLayer, old)
    new.may_look_ahead = True  # till `_finish`, so that a probe may try
    new.seg_moe = layer
