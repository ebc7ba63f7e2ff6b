"""Checkpoints in and out, and schedules of segment sizes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE

__all__ = ["load_official", "segment_schedule", "to_official"]

# Official names: evortigosa/segmoe_forecast, model/MoE.py. "1." is the place of the FFN in the
# Sequential(Rearrange, FFN, Rearrange) that wraps the experts of MoESegment.
_EXPERT_KEY = re.compile(r"experts\.(\d+)\.(1\.)?(up|gate|down)_proj\.(weight|bias)")
_SHARED_KEY = re.compile(r"shared_expert\.(up|gate|down)_(proj|conv)\.(weight|bias)")
# Where a model's layers begin: at their experts, or at the shared one.
_INSIDE_A_MODEL = re.compile(r"(.*?\.)(?:experts\.\d+|shared_expert)\.")
_OTHER_KEYS = {
    "gating.weight": "router.weight",
    "shared_gating.weight": "shared_gate.weight",
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "out_proj.weight": "out_proj.weight",
    "out_proj.bias": "out_proj.bias",
}


class _Official(NamedTuple):
    """An official layer's tensors under our names, the experts not yet stacked."""

    experts: dict[str, dict[int, Tensor]]  # "up_proj" or "up_proj_bias" -> expert -> tensor
    others: dict[str, Tensor]


def _swap(name: str, *, gated: bool) -> str:
    """The official gated FFN activates ``up_proj``; ours, like everybody's, ``gate_proj``."""
    return {"up": "gate", "gate": "up"}.get(name, name) if gated else name


def _sort_keys(state_dict: Mapping[str, Tensor], prefix: str) -> _Official:
    inside = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not inside:
        got = f"keys such as {sorted(state_dict)[:4]}"
        check.fail_value("load_official", "state_dict", f"have keys under prefix={prefix!r}", got)
    gated = any(".gate_proj." in key or ".gate_conv." in key for key in inside)
    experts: dict[str, dict[int, Tensor]] = {}
    others: dict[str, Tensor] = {}
    leftovers = []
    for key, value in inside.items():
        if not isinstance(value, Tensor):
            check.fail_type("load_official", f"state_dict[{key!r}]", "be a tensor", type(value))
        if match := _EXPERT_KEY.fullmatch(key):
            suffix = "_bias" if match[4] == "bias" else ""
            name = f"{_swap(match[3], gated=gated)}_proj{suffix}"
            experts.setdefault(name, {})[int(match[1])] = value
        elif match := _SHARED_KEY.fullmatch(key):
            if match[2] == "conv" and value.ndim == 3:
                if value.shape[-1] != 1:
                    leftovers.append(key)
                    continue
                value = value[..., 0]  # noqa: PLW2901  a 1x1 convolution is a linear map
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
        rule = f"have only keys of an official Seg-MoE layer{hint}"
        check.fail_value("load_official", "state_dict", rule, f"also {sorted(leftovers)}")
    return _Official(experts, others)


def _stack(experts: dict[str, dict[int, Tensor]]) -> dict[str, Tensor]:
    numbers = {name: sorted(tensors) for name, tensors in experts.items()}
    count = len(numbers.get("up_proj", []))
    stacked = {}
    for name, found in numbers.items():
        if found != list(range(count)):
            rule = f"have {name} of every expert 0 to {count - 1}"
            check.fail_value("load_official", "state_dict", rule, f"experts {found}")
        shapes = {tuple(tensor.shape) for tensor in experts[name].values()}
        if len(shapes) > 1:
            rule = f"have {name} of one shape in every expert"
            check.fail_value("load_official", "state_dict", rule, sorted(shapes))
        stacked[f"experts.{name}"] = torch.stack([experts[name][e] for e in range(count)])
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

    Returns:
        SegMoE in eval mode, dtype and device of the state dict.

    Raises:
        TypeError: for a value that is not a tensor.
        ValueError: for missing or unknown keys (listed), or shapes that do not fit the options.
    """
    check.check_integer("load_official", "segment_size", segment_size, 1)
    check.check_integer("load_official", "top_k", top_k, 1)
    check.check_choice("load_official", "expert_scope", expert_scope, check.EXPERT_SCOPES)
    official = _sort_keys(state_dict, prefix)
    ours = {**official.others, **_stack(official.experts)}
    num_experts = ours["experts.up_proj"].shape[0] if "experts.up_proj" in ours else 0
    some = ours.get("experts.up_proj", ours.get("shared_expert.up_proj.weight"))
    if some is None:
        rule = "have up_proj weights of experts or of a shared expert"
        check.fail_value("load_official", "state_dict", rule, sorted(ours))
    factor = segment_size if expert_scope == "segment" and num_experts else 1
    d_ff, d_model = some.shape[-2], some.shape[-1]
    if d_model % factor or d_ff % factor:
        rule = f"have expert widths divisible by segment_size={segment_size}"
        check.fail_value("load_official", "state_dict", rule, (d_ff, d_model))
    gated = any(".gate_proj" in key for key in ours)
    biased = any(key.endswith((".bias", "_bias")) for key in ours)
    layer = SegMoE(
        d_model // factor,
        d_ff // factor,
        num_experts,
        top_k=min(top_k, num_experts) if num_experts else top_k,
        segment_size=segment_size,
        expert_scope=expert_scope,
        shared_expert="segment" if "shared_expert.up_proj.weight" in ours else None,
        activation="silu" if gated else "gelu",
        gated=gated,
        bias=biased,
        router_temperature=router_temperature,
        renormalize=renormalize,
        device=some.device,
        dtype=some.dtype,
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    if wanted != found:
        differences = [
            f"{name}: expected {wanted.get(name)}, got {found.get(name)}"
            for name in sorted({*wanted, *found})
            if wanted.get(name) != found.get(name)
        ]
        rule = f"fit segment_size={segment_size} and expert_scope={expert_scope!r}"
        check.fail_value("load_official", "state_dict", rule, "; ".join(differences))
    layer.load_state_dict(ours)
    return layer.eval()


def to_official(layer: SegMoE, *, prefix: str = "") -> dict[str, Tensor]:
    """Write a layer's parameters as the official code names them; `load_official` reads them.

    Args:
        layer: one that the official code can express: shared expert "segment" or None, pooling
            "concat", not causal, GELU plain or SiLU gated.
        prefix: put in front of every key.

    Returns:
        State dict of ``MoESegment`` (``MoEFeedForward`` at segment_size 1, ``MoESegmentV0`` for
        "segment", ``MoESegmentV1`` for "projected"), sharing no memory with the layer.

    Raises:
        TypeError: if layer is not a SegMoE.
        ValueError: if the official code has no such layer.
    """
    if not isinstance(layer, SegMoE):
        check.fail_type("to_official", "layer", "be a SegMoE", type(layer).__name__)
    expected = "silu" if layer.gated else "gelu"
    same_at_one = layer.segment_size == 1 or layer.expert_scope == "projected"
    for option, fits in (
        ("causal", not layer.causal),
        ("pooling", layer.pooling == "concat" or (same_at_one and layer.pooling != "mean")),
        ("activation", layer.activation == expected),
        ("shared_expert_scope", layer.shared_expert_scope != "token" or same_at_one),
    ):
        if not fits:
            rule = f"have an official counterpart (activation {expected!r}, pooling 'concat')"
            got = f"{option}={getattr(layer, option)!r}"
            check.fail_value("to_official", "layer", rule, got)
    nested = "1." if layer.expert_scope == "token" and layer.segment_size > 1 else ""
    back = {ours: official for official, ours in _OTHER_KEYS.items()}
    result = {}
    for name, tensor in layer.state_dict().items():
        value = tensor.detach().clone()
        module, _, leaf = name.partition(".")
        if module == "experts":
            kind = _swap(leaf.split("_")[0], gated=layer.gated)
            suffix = "bias" if leaf.endswith("_bias") else "weight"
            for e in range(layer.num_experts):
                key = f"experts.{e}.{nested}{kind}_proj.{suffix}"
                result[prefix + key] = value[e].clone()
        elif module == "shared_expert":
            kind, _, suffix = leaf.partition("_proj.")
            result[f"{prefix}shared_expert.{_swap(kind, gated=layer.gated)}_proj.{suffix}"] = value
        else:
            result[prefix + back[name]] = value
    return result


def segment_schedule(sizes: str, num_layers: int) -> list[int]:
    """Read a schedule of segment sizes over layers, such as "5,5,4,4,3,3".

    Args:
        sizes: comma-separated sizes: one for all layers, or one for each.
        num_layers: how many layers there are.

    Returns:
        num_layers sizes.

    Raises:
        TypeError: if sizes is not a string or num_layers not an int.
        ValueError: if a size is not a positive integer, or the number of sizes does not fit.
    """
    check.check_integer("segment_schedule", "num_layers", num_layers, 1)
    if not isinstance(sizes, str):
        check.fail_type("segment_schedule", "sizes", "be a str", type(sizes).__name__)
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        rule = "be comma-separated positive integers"
        check.fail_value("segment_schedule", "sizes", rule, repr(sizes))
    if len(parts) not in {1, num_layers}:
        rule = f"have 1 or num_layers={num_layers} sizes"
        check.fail_value("segment_schedule", "sizes", rule, f"{len(parts)} in {sizes!r}")
    schedule = [int(part) for part in parts]
    return schedule * num_layers if len(schedule) == 1 else schedule
