"""Checkpoints of other mixtures of experts in and out: `convert_state_dict`."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segmoe_kernels import validation as check

__all__ = ["DIALECTS", "convert_state_dict"]


class _Dialect(NamedTuple):
    """How a model names the parts of a mixture of experts."""

    block: str | None  # name of the module in its layer; None: any, and it is kept
    experts: str  # "stacked", "list" or "fused" (gate and up in one stacked tensor)
    parts: dict[str, str]  # our projection -> theirs
    others: dict[str, str]  # our key -> theirs


_OURS = {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"}
_W123 = {"gate": "w1", "down": "w2", "up": "w3"}
_ROUTER = {"router.weight": "gate.weight"}
_SHARED = {"shared_gate.weight": "shared_expert_gate.weight"} | {
    f"shared_expert.{part}.weight": f"shared_expert.{part}.weight" for part in _OURS.values()
}
_FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}

# Sources: Maple728/Time-MoE, models/modeling_time_moe.py; transformers 4 and 5, models/mixtral and
# models/qwen2_moe. Version 5 of transformers reads per-expert lists, too, and keeps them stacked.
DIALECTS = {
    "segmoe": _Dialect(None, "stacked", _OURS, {key: key for key in [*_ROUTER, *_SHARED]}),
    "time_moe": _Dialect("ffn_layer", "list", _OURS, _ROUTER | _SHARED),
    "qwen2_moe": _Dialect("mlp", "list", _OURS, _ROUTER | _SHARED),
    "qwen2_moe_stacked": _Dialect("mlp", "fused", _FUSED, _ROUTER | _SHARED),
    "mixtral": _Dialect("block_sparse_moe", "list", _W123, _ROUTER),
    "mixtral_stacked": _Dialect("mlp", "fused", _FUSED, _ROUTER),
}
"""What `convert_state_dict` reads and writes, by name."""
_fail = partial(check.fail_value, "convert_state_dict")


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str, target: str = "segmoe"
) -> dict[str, Tensor]:
    """Rename and restack the mixtures of experts in a model's state dict.

    Every mixture in it is converted; other keys, dense FFNs among them, stay as they are. To
    "segmoe" a mixture keeps the place it has, ``model.layers.0.mlp.experts.up_proj``; to another
    dialect it gets that dialect's place, ``model.layers.0.block_sparse_moe.experts.0.w3.weight``.
    The layers are token-wise: ``SegMoE(d_model, d_ff, num_experts, top_k=..., gated=True,
    activation="silu")``, with ``shared_expert=None`` and ``renormalize=True`` for Mixtral,
    ``shared_expert="token"`` and ``shared_d_ff`` for the others (whose config says ``renormalize``:
    ``norm_topk_prob``, False in Time-MoE). For more steps in a segment start from `upcycle`, or
    train the router anew.

    Args:
        state_dict: of one layer or of a whole model.
        source: dialect of state_dict: "segmoe", "time_moe", "mixtral", "qwen2_moe" (experts as a
            list, transformers 4 and their checkpoints), "mixtral_stacked", "qwen2_moe_stacked"
            (``gate_up_proj (E, 2F, D)``, transformers 5).
        target: likewise.

    Returns:
        A new state dict; tensors that need not be restacked are the same, stacked ones are copies.

    Raises:
        TypeError: if a dialect is not a string, or a value not a tensor.
        ValueError: for an unknown dialect, no mixture of the source's kind or one in a module of
            another name, an expert or a projection that is missing, matrices that don't fit each
            other, mixtures that the target would put in one place, or what it can't say (biases,
            a shared expert in Mixtral, a router that sees several steps).
    """
    function = "convert_state_dict"
    for argument, dialect in (("source", source), ("target", target)):
        check.check_string(function, argument, dialect)
        check.check_choice(function, argument, dialect, DIALECTS)
    check.check_mapping(function, "state_dict", state_dict)
    for key, tensor in state_dict.items():
        check.check_type(function, f"state_dict[{key!r}]", tensor, Tensor, "be a tensor")
    here, there = DIALECTS[source], DIALECTS[target]
    prefixes = _prefixes(state_dict, here)
    if not prefixes:
        rule = f"have experts as {source!r} names them"
        _fail("state_dict", rule, f"keys such as {sorted(state_dict)[:4]}")
    mixtures: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is None:
            result[key] = tensor
        else:
            mixtures[prefix][key[len(prefix) :]] = tensor
    for prefix, inside in mixtures.items():
        moved = _move(prefix, there)
        written = _write(_read(inside, here, prefix), there, prefix)
        written = {moved + key: tensor for key, tensor in written.items()}
        if taken := sorted(written.keys() & result.keys()):
            _fail("state_dict", f"have nothing else where {target!r} puts {prefix!r}", taken[:4])
        result |= written
    return result


def _key_of(dialect: _Dialect) -> re.Pattern[str]:
    """Matches the key of an expert's matrix; groups: where the mixture is, expert, projection."""
    names = "|".join(dialect.parts.values())
    inner = rf"(\d+)\.({names})\.weight" if dialect.experts == "list" else rf"()({names})"
    return re.compile(rf"((?:.*\.)?)experts\.{inner}")


def _prefixes(state_dict: Mapping[str, Tensor], dialect: _Dialect) -> list[str]:
    """Prefixes of the mixtures, in order."""
    pattern = _key_of(dialect)
    found = dict.fromkeys(m[1] for key in state_dict if (m := pattern.fullmatch(key)))
    block = dialect.block
    prefixes = [p for p in found if not p or block is None or p.split(".")[-2] == block]
    if prefixes and (others := sorted(set(found) - set(prefixes))):
        _fail("state_dict", f"have all its mixtures in modules named {block!r}", others[:4])
    return prefixes


def _move(prefix: str, target: _Dialect) -> str:
    """The prefix that the target gives a mixture; a layer alone has none."""
    if target.block is None or not prefix:
        return prefix
    return ".".join([*prefix.split(".")[:-2], target.block, ""])


def _read(inside: Mapping[str, Tensor], dialect: _Dialect, prefix: str) -> dict[str, Tensor]:
    """One mixture under our names."""
    pattern, names = _key_of(dialect), {v: k for k, v in dialect.others.items()}
    parts: dict[str, dict[int, Tensor]] = {}
    result: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in inside.items():
        if match := pattern.fullmatch(key):
            parts.setdefault(match[3], {})[int(match[2] or 0)] = tensor
        elif key in names:
            result[names[key]] = tensor
        else:
            unknown.append(prefix + key)
    if unknown:
        _fail("state_dict", "have weights of router and experts alone, no biases", unknown[:4])
    missing = _missing(parts, result, dialect)
    if missing:
        _fail("state_dict", f"be complete under {prefix!r}", f"no {', '.join(missing)}")
    count = result["router.weight"].shape[0]
    for ours, theirs in dialect.parts.items():
        if theirs in parts:
            stacked = _stack(parts[theirs], count, dialect, f"{theirs} under {prefix!r}")
            if ours == "gate_up":
                if stacked.shape[1] % 2:
                    rule = f"have an even second dimension in {theirs} under {prefix!r}"
                    _fail("state_dict", rule, [*stacked.shape])
                result["experts.gate_proj"], result["experts.up_proj"] = (
                    half.contiguous() for half in stacked.chunk(2, 1)
                )
            else:
                result[f"experts.{ours}_proj"] = stacked
    _check_shapes(result, dialect, prefix)
    return result


def _missing(
    parts: Mapping[str, Any], others: Mapping[str, Tensor], dialect: _Dialect
) -> list[str]:
    """What a mixture lacks, under the dialect's names; a shared expert is complete or not there."""
    # Ours need not be gated.
    gated = dialect.experts != "stacked" or dialect.parts["gate"] in parts
    wanted = [name for ours, name in dialect.parts.items() if gated or ours != "gate"]
    missing = [f"experts.{name}" for name in wanted if name not in parts]
    shared = any(name.startswith("shared_") for name in others)
    for ours, theirs in dialect.others.items():
        needed = ours == "router.weight" or (shared and (gated or ".gate_proj." not in ours))
        if needed and ours not in others:
            missing.append(theirs)
    return missing


def _check_shapes(ours: Mapping[str, Tensor], dialect: _Dialect, prefix: str) -> None:
    """Refuse matrices that don't fit each other."""
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    count, d_ff, width = shapes["experts.up_proj"]
    token_wise = dialect.block is not None
    fitting = {
        "experts.gate_proj": (count, d_ff, width),
        "experts.down_proj": (count, width, d_ff),
        "router.weight": (count, width if token_wise else shapes["router.weight"][-1]),
    }
    shared = shapes.get("shared_expert.up_proj.weight", ())
    if shared:
        wide = width if token_wise else shared[-1]
        fitting["shared_expert.up_proj.weight"] = (*shared[:1], wide)
        fitting["shared_expert.gate_proj.weight"] = shared
        fitting["shared_expert.down_proj.weight"] = shared[::-1]
        fitting["shared_gate.weight"] = (1, wide)
    wrong = [f"{n}: {shapes[n]}" for n, s in fitting.items() if shapes.get(n, s) != s]
    if wrong:
        rule = f"have matrices that fit each other under {prefix!r}"
        _fail("state_dict", rule, [f"experts.up_proj: {shapes['experts.up_proj']}", *wrong])


def _stack(found: Mapping[int, Tensor], count: int, dialect: _Dialect, name: str) -> Tensor:
    """One projection of all experts."""
    stacked = found.get(0)
    if dialect.experts == "list":
        if sorted(found) != list(range(count)):
            _fail("state_dict", f"have all experts 0 to {count - 1} of {name}", sorted(found))
        kinds = {(tuple(tensor.shape), str(tensor.dtype)) for tensor in found.values()}
        if len(kinds) > 1:
            _fail("state_dict", f"have one shape and dtype for {name}", sorted(kinds))
        stacked = torch.stack([found[e] for e in range(count)])
    assert stacked is not None  # what is not a list has one tensor
    if stacked.ndim != 3 or stacked.shape[0] != count:
        _fail(
            "state_dict", f"have three dimensions and {count} experts in {name}", [*stacked.shape]
        )
    return stacked


def _write(ours: Mapping[str, Tensor], dialect: _Dialect, prefix: str) -> dict[str, Tensor]:
    """One mixture under the dialect's names."""
    result: dict[str, Tensor] = {}
    for key, tensor in ours.items():
        part = key.removeprefix("experts.").removesuffix("_proj")
        if not key.startswith("experts."):
            if key not in dialect.others:
                _fail("target", "have a name for every weight", f"none for {prefix}{key}")
            result[dialect.others[key]] = tensor
        elif dialect.experts == "stacked":
            result[key] = tensor
        elif dialect.experts == "list":
            for e, matrix in enumerate(tensor):
                result[f"experts.{e}.{dialect.parts[part]}.weight"] = matrix.clone()
        elif part == "down":
            result[f"experts.{dialect.parts[part]}"] = tensor
        elif part == "gate":
            fused = torch.cat([tensor, ours["experts.up_proj"]], 1)
            result[f"experts.{dialect.parts['gate_up']}"] = fused
    if dialect.experts != "stacked" and "experts.gate_proj" not in ours:
        _fail("state_dict", f"be gated, as the target is, under {prefix!r}", "no gate_proj")
    width = ours["experts.up_proj"].shape[-1]
    for name, part in (("router.weight", "a router"), ("shared_gate.weight", "a shared expert")):
        wide = ours[name].shape[-1] if name in ours else width
        if dialect.block is not None and wide != width:
            rule = f"be token-wise, as the target is, under {prefix!r}"
            _fail("state_dict", rule, f"{part} of width {wide} over experts of width {width}")
    return result
