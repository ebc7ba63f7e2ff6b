"""Checkpoints in and out, and schedules of segment sizes."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.layer import OfficialNames, SegMoE
from segmoe_kernels.layer.modules import is_plain

__all__ = ["load_official", "load_official_layers", "segment_schedule", "to_official"]

# Official names: evortigosa/segmoe_forecast, model/MoE.py. "1." is the place of the FFN in the
# Sequential(Rearrange, FFN, Rearrange) that wraps the experts of MoESegment.
_EXPERT_KEY = re.compile(r"experts\.(\d+)\.(1\.)?(up|gate|down)_proj\.(weight|bias)")
_SHARED_KEY = re.compile(r"shared_expert\.(up|gate|down)_(proj|conv)\.(weight|bias)")
_LEAVES = ("weight", "bias")
# Where a model's layers begin: at their experts, or at the shared one.
_INSIDE_A_MODEL = re.compile(r"(.*?\.)(?:experts\.\d+|shared_expert)\.")
_OTHER_KEYS = {
    "gating.weight": "router.weight",
    "shared_gating.weight": "shared_gate.weight",
    **{f"{part}_proj.{leaf}": f"{part}_proj.{leaf}" for part in ("in", "out") for leaf in _LEAVES},
}
_OUR_KEY = re.compile(
    r"experts\.(up|gate|down)_proj(_bias)?|shared_expert\.(up|gate|down)_proj\.(weight|bias)|"
    + "|".join(map(re.escape, _OTHER_KEYS.values()))
)
# What a state dict can't tell of a layer.
_OPTIONS = ("dropout", "router_dropout", "aux_loss_weight", "z_loss_weight", "backend")
fail_state_dict = partial(check.fail_value, "load_official", "state_dict")


class _Official(NamedTuple):
    """An official layer's tensors under our names, the experts not yet stacked."""

    experts: dict[str, dict[int, Tensor]]  # "up_proj" or "up_proj_bias" -> expert -> tensor
    others: dict[str, Tensor]
    names: OfficialNames


def _swap(name: str, *, gated: bool) -> str:
    """The official gated FFN activates ``up_proj``; ours, like everybody's, ``gate_proj``."""
    return {"up": "gate", "gate": "up"}.get(name, name) if gated else name


def _inside(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """What is under a prefix, without it."""
    check.check_mapping("load_official", "state_dict", state_dict)
    check.check_string("load_official", "prefix", prefix)
    inside = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not inside:
        fail_state_dict(
            f"have keys under prefix={prefix!r}", f"keys such as {sorted(state_dict)[:4]}"
        )
    for key, value in inside.items():
        check.check_type("load_official", f"state_dict[{key!r}]", value, Tensor, "be a tensor")
    return inside


def _sort_keys(inside: Mapping[str, Tensor], prefix: str) -> _Official:
    gated = any(".gate_proj." in key or ".gate_conv." in key for key in inside)
    names = OfficialNames("", "proj")
    experts: dict[str, dict[int, Tensor]] = {}
    others: dict[str, Tensor] = {}
    leftovers = []
    for key, value in inside.items():
        if match := _EXPERT_KEY.fullmatch(key):
            names = names._replace(nested=match[2] or "")
            suffix = "_bias" if match[4] == "bias" else ""
            name = f"{_swap(match[3], gated=gated)}_proj{suffix}"
            experts.setdefault(name, {})[int(match[1])] = value
        elif match := _SHARED_KEY.fullmatch(key):
            if match[2] == "conv" and value.ndim == 3:
                if value.shape[-1] != 1:
                    leftovers.append(key)
                    continue
                value = value[..., 0]  # noqa: PLW2901  a 1x1 convolution is a linear map
            names = names._replace(shared=match[2])
            others[f"shared_expert.{_swap(match[1], gated=gated)}_proj.{match[3]}"] = value
        elif key in _OTHER_KEYS:
            others[_OTHER_KEYS[key]] = value
        else:
            leftovers.append(key)
    if leftovers:
        hint = ""
        if any(".dw_conv." in key or ".pw_conv." in key for key in leftovers):
            hint = " ('dwconv' shared experts mix segments and have no counterpart here)"
        elif layers := {m[1] for key in leftovers if (m := _INSIDE_A_MODEL.match(key))}:
            hint = f" (for one inside a model pass prefix={prefix + min(layers)!r})"
        fail_state_dict(
            f"have only keys of an official Seg-MoE layer{hint}", f"also {sorted(leftovers)}"
        )
    return _Official(experts, others, names)


def _check_values(inside: Mapping[str, Tensor]) -> None:
    """Refuse what no layer computes with."""
    for key, value in inside.items():
        check.check_tensor("load_official", f"state_dict[{key!r}]", value)
    devices = sorted({str(value.device) for value in inside.values()})
    if len(devices) > 1:
        fail_state_dict("have all tensors on one device", devices)


def _stack(experts: dict[str, dict[int, Tensor]]) -> dict[str, Tensor]:
    count = len(experts.get("up_proj", ()))
    stacked = {}
    for name, tensors in experts.items():
        if tensors.keys() != set(range(count)):
            fail_state_dict(
                f"have {name} of every expert 0 to {count - 1}", f"experts {sorted(tensors)}"
            )
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if len(shapes) > 1:
            fail_state_dict(f"have {name} of one shape in every expert", sorted(shapes))
        dtypes = {str(tensor.dtype) for tensor in tensors.values()}
        if len(dtypes) > 1:
            rule = f"have {name} of one dtype in every expert"
            check.fail_type("load_official", "state_dict", rule, sorted(dtypes))
        stacked[f"experts.{name}"] = torch.stack([tensors[e] for e in range(count)])
    return stacked


def load_official(
    state_dict: Mapping[str, Tensor],
    *,
    segment_size: int,
    top_k: int = 1,
    expert_scope: str = "token",
    router_temperature: float = 1.0,
    renormalize: bool | None = None,
    prefix: str = "",
    **options: Any,
) -> SegMoE:
    """Build the layer that computes what an official Seg-MoE layer computes.

    Sizes, biases, gating (gated means SiLU, plain means exact GELU) and the shared expert are
    read off the keys and shapes. The official gated FFN activates ``up_proj``: it becomes our
    ``gate_proj``, and the other way round.

    Args:
        state_dict: of ``MoESegment``, ``MoEFeedForward``, ``MoESegmentV0`` or ``MoESegmentV1``,
            or of a model that has one under ``prefix``.
        segment_size: P.
        top_k: experts per segment; more than there are means all of them (official behaviour).
        expert_scope: "token" (``MoESegment``, ``MoEFeedForward``), "segment" (``MoESegmentV0``)
            or "projected" (``MoESegmentV1``).
        router_temperature: divides the logits.
        renormalize: see `SegMoE`; True for checkpoints trained before 2026-06-28 at top_k = 1.
        prefix: of the layer's keys, such as "backbone.transformer.0.moeff.".
        **options: of `SegMoE` that a state dict does not tell and training needs: dropout,
            router_dropout (0.2 and 0.1 are the official defaults), aux_loss_weight,
            z_loss_weight, backend.

    Returns:
        SegMoE in eval mode, on the device of the state dict. Each tensor keeps its dtype; where a
        router of another dtype than the experts' was saved, the layer runs under
        ``torch.autocast``, or once it is cast: ``layer.to(dtype)``.

    Raises:
        TypeError: for an argument of the wrong type, or a value that is not a tensor of floats.
        ValueError: for missing or unknown keys (listed), or shapes that do not fit the options.
    """
    segment_size = check.check_integer("load_official", "segment_size", segment_size, 1)
    top_k = check.check_integer("load_official", "top_k", top_k, 1)
    if unknown := sorted(set(options) - set(_OPTIONS)):
        rule = f"be of {', '.join(_OPTIONS)} (the state dict tells the others)"
        check.fail_type("load_official", "options", rule, unknown)
    check.check_choice("load_official", "expert_scope", expert_scope, check.EXPERT_SCOPES)
    inside = _inside(state_dict, prefix)
    official = _sort_keys(inside, prefix)
    _check_values(inside)
    ours = {**official.others, **_stack(official.experts)}
    layer = SegMoE(
        **_told(ours, segment_size, top_k, expert_scope),
        segment_size=segment_size,
        expert_scope=expert_scope,
        router_temperature=router_temperature,
        renormalize=renormalize,
        **options,
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    if differences := [
        f"{name}: expected {wanted.get(name)}, got {found.get(name)}"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]:
        rule = f"fit segment_size={segment_size} and expert_scope={expert_scope!r}"
        fail_state_dict(rule, "; ".join(differences))
    # Not copied into the layer's own parameters, which would round to their dtype.
    own = {name: tensor.detach().clone() for name, tensor in ours.items()}
    layer.load_state_dict(own, assign=True)
    layer._official = official.names
    return layer.eval()


def _told(
    ours: Mapping[str, Tensor], segment_size: int, top_k: int, expert_scope: str
) -> dict[str, Any]:
    """What keys and shapes tell of a layer, as arguments of `SegMoE`."""
    some = ours.get("experts.up_proj", ours.get("shared_expert.up_proj.weight"))
    if some is None:
        fail_state_dict("have up_proj weights of experts or of a shared expert", sorted(ours))
    if some.ndim < 2:
        fail_state_dict("have up_proj weights of two dimensions", tuple(some.shape))
    num_experts = some.shape[0] if "experts.up_proj" in ours else 0
    factor = segment_size if expert_scope == "segment" and num_experts else 1
    d_ff, d_model = some.shape[-2:]
    if d_model % factor or d_ff % factor:
        fail_state_dict(
            f"have expert widths divisible by segment_size={segment_size}", (d_ff, d_model)
        )
    gated = any(".gate_proj" in key for key in ours)
    return {
        "d_model": d_model // factor,
        "d_ff": d_ff // factor,
        "num_experts": num_experts,
        "top_k": min(top_k, num_experts) if num_experts else top_k,
        "shared_expert": "segment" if "shared_expert.up_proj.weight" in ours else None,
        "activation": "silu" if gated else "gelu",
        "gated": gated,
        "bias": any(key.endswith((".bias", "_bias")) for key in ours),
        "device": some.device,
        "dtype": some.dtype,
    }


def load_official_layers(
    state_dict: Mapping[str, Tensor], *, segment_sizes: int | str | Sequence[int], **options: Any
) -> dict[str, SegMoE]:
    """Build all Seg-MoE layers of an official model.

    ::

        checkpoint = torch.load("weather.pt", weights_only=True)["model_state_dict"]
        layers = load_official_layers(checkpoint, segment_sizes="3,5,5,5", dropout=0.2)
        for name, layer in layers.items():      # "backbone.transformer.0.moeff" and so on
            model.set_submodule(name, layer)

    Args:
        state_dict: of the model; keys outside the layers are left alone.
        segment_sizes: P of each layer in the order of their numbers, see `segment_schedule`.
        **options: of `load_official`, the same for all layers.

    Returns:
        The layers by their names in the model, in the order of their numbers.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: if there is no layer, or as `load_official`.
    """
    function = "load_official_layers"
    check.check_mapping(function, "state_dict", state_dict)
    if "prefix" in options:
        check.fail_type(function, "options", "have no prefix", repr(options["prefix"]))
    found = {m[1] for key in state_dict if (m := _INSIDE_A_MODEL.match(key))}
    if not found:
        rule = "have keys of layers, such as 'backbone.transformer.0.moeff.gating.weight'"
        check.fail_value(function, "state_dict", rule, f"keys such as {sorted(state_dict)[:4]}")
    prefixes = sorted(found, key=_by_numbers)
    sizes = read_schedule(function, "segment_sizes", segment_sizes, len(prefixes))
    return {
        prefix.removesuffix("."): load_official(
            state_dict, segment_size=size, prefix=prefix, **options
        )
        for prefix, size in zip(prefixes, sizes, strict=True)
    }


def _by_numbers(prefix: str) -> list[tuple[int, str]]:
    """Sorts "layers.10." behind "layers.2."."""
    return [(int(part) if part.isdecimal() else -1, part) for part in prefix.split(".")]


def to_official(layer: SegMoE, *, prefix: str = "") -> dict[str, Tensor]:
    """Write a layer's parameters as the official code names them; `load_official` reads them.

    Args:
        layer: one that the official code can express: shared expert "segment" or None and as wide
            as an expert, pooling "concat", not causal, GELU plain or SiLU gated, weights of several
            experts renormalized, adapters and parametrisations merged.
        prefix: put in front of every key.

    Returns:
        State dict, sharing no memory with the layer: of the class that `load_official` read, else
        of ``MoESegment`` (``MoEFeedForward`` at segment_size 1, ``MoESegmentV0`` for "segment",
        ``MoESegmentV1`` for "projected") with a shared expert of ``ffn_type="mlp"``.

    Raises:
        TypeError: if layer is not a SegMoE, or prefix not a string.
        ValueError: if the official code has no such layer, other ranks have experts of it, or
            parts of it are not plain parameters.
    """
    check.check_type("to_official", "layer", layer, SegMoE, "be a SegMoE")
    check.check_string("to_official", "prefix", prefix)
    _check_expressible(layer)
    nested = "1." if layer.expert_scope == "token" and layer.segment_size > 1 else ""
    names = layer._official or OfficialNames(nested, "proj")
    back = {ours: official for official, ours in _OTHER_KEYS.items()}
    result = {}
    for name, tensor in layer.state_dict().items():
        part, _, leaf = name.partition(".")
        kind, _, suffix = leaf.partition("_proj")
        kind = _swap(kind, gated=layer.gated)
        suffix = suffix[1:] or "weight"  # of "_bias", ".bias", ".weight" and ""
        if part == "experts":
            for e, value in enumerate(tensor.detach()):
                key = f"experts.{e}.{names.nested}{kind}_proj.{suffix}"
                result[prefix + key] = value.clone()
            continue
        value = tensor.detach().clone()
        key = back.get(name, f"shared_expert.{kind}_{names.shared}.{suffix}")
        wide = part == "shared_expert" and names.shared == "conv" and suffix == "weight"
        result[prefix + key] = value[..., None] if wide else value
    return result


def _check_expressible(layer: SegMoE) -> None:
    """Refuse what the official code can't say."""
    if layer.experts is not None and layer.experts.num_experts != layer.num_experts:
        got = f"{layer.experts.num_experts} of {layer.num_experts}"
        check.fail_value("to_official", "layer", "have all experts (gather_experts first)", got)
    expected = "silu" if layer.gated else "gelu"
    same_at_one = layer.segment_size == 1 or layer.expert_scope == "projected"
    for option, fits in (
        ("causal", not layer.causal),
        ("pooling", layer.pooling == "concat" or (same_at_one and layer.pooling != "mean")),
        ("activation", layer.activation == expected),
        ("shared_expert_scope", layer.shared_expert_scope != "token" or same_at_one),
        ("shared_d_ff", layer.shared_d_ff in {None, layer.d_ff}),
        ("renormalize", layer.renormalize is not False or layer.top_k == 1),
    ):
        if not fits:
            rule = f"have an official counterpart (activation {expected!r}, pooling 'concat')"
            got = f"{option}={getattr(layer, option)!r}"
            check.fail_value("to_official", "layer", rule, got)
    unknown = sorted(name for name in layer.state_dict() if not _OUR_KEY.fullmatch(name))
    linears = ((n, part) for n, part in layer.named_modules() if isinstance(part, nn.Linear))
    unknown += [f"{name}: {type(part).__name__}" for name, part in linears if not is_plain(part)]
    if unknown:
        rule = (
            "be plain parameters (merge adapters and parametrisations first; remove hooks and "
            "subclasses of torch.nn.Linear)"
        )
        check.fail_value("to_official", "layer", rule, f"also {unknown[:4]}")


def segment_schedule(sizes: int | str | Sequence[int], num_layers: int) -> list[int]:
    """Read a schedule of segment sizes over layers, such as "5,5,4,4,3,3".

    Args:
        sizes: one size for all layers, or one for each: a sequence, or text with commas.
        num_layers: how many layers there are.

    Returns:
        num_layers sizes.

    Raises:
        TypeError: if sizes is none of these, or num_layers not an int.
        ValueError: if a size is not a positive integer, or the number of sizes does not fit.
    """
    num_layers = check.check_integer("segment_schedule", "num_layers", num_layers, 1)
    return read_schedule("segment_schedule", "sizes", sizes, num_layers)


def read_schedule(function: str, argument: str, sizes: Any, num_layers: int) -> list[int]:
    """`segment_schedule`, in the words of who asks."""
    if isinstance(sizes, str):
        parts = [part.strip() for part in sizes.split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            rule = "be comma-separated positive integers"
            check.fail_value(function, argument, rule, repr(sizes))
        schedule = [int(part) for part in parts]
    else:
        several = sizes if isinstance(sizes, Sequence) else [sizes]
        schedule = [check.check_integer(function, argument, size, 1) for size in several]
    if len(schedule) not in {1, num_layers}:
        rule = f"have 1 or num_layers={num_layers} sizes"
        check.fail_value(function, argument, rule, f"{len(schedule)} in {sizes!r}")
    return schedule * num_layers if len(schedule) == 1 else schedule
