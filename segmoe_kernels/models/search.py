"""Where a model's FFNs are, and what types, flags and configurations tell of the model around."""

import inspect
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.models.dense import UNDERSTOOD, DenseFFN, read_ffn, settle

# Of modules and of parameters.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_post_accumulate_grad_hooks",
)

# Wrappers that have listed a model's parameters, and would miss those of a swap.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}

# Classes, FFNs inside them, and what these have for rows: Crossformer, PatchTSMixer,
# MultiPatchFormer and TSMixer. iTransformer is known by its embedding, or by name.
NO_STEPS = (
    ("TwoStageAttentionLayer", "MLP2", "variates"),
    ("PatchMixerBlock", "mlp", "features"),
    ("", r"encoder_list_ch\..*", "variates"),
    ("ResBlock", "temporal", "variates"),
)
_INVERTED = {"DataEmbedding_inverted"}

Match = str | Callable[[str, nn.Module], bool] | None


def find_ffns(
    model: nn.Module, match: Match, parts: Mapping[str, str] | None, *, of_steps: bool
) -> tuple[dict[str, DenseFFN], dict[str, str]]:
    """Find FFNs by name, with their descriptions, and what must be left, with the reasons.

    With ``of_steps`` what is known for rows that are no time steps must be left, too.
    """
    fail_swap = partial(check.fail_value, "replace_ffn")
    wanted = _predicate(match)
    named = dict(model.named_modules())
    for name, module in named.items():
        if _WRAPPERS & {kind.__name__ for kind in type(module).__mro__}:
            rule = "be swapped before it is wrapped, and before an optimizer is made"
            fail_swap("model", rule, f"{type(module).__name__} at {name!r}")
    found: dict[str, DenseFFN] = {}
    left: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, module, dense in _candidates(named, parts, found):
        if wanted is not None and not wanted(name, module):
            if dense is not None:
                others[name] = "is not selected"
            continue
        settled = settled_at(named, name, dense)
        rows = rows_around(named, name) if of_steps else None
        if rows is not None and isinstance(settled, DenseFFN):
            settled = f"has {rows} for rows, no time steps"
        if isinstance(settled, DenseFFN):
            found[name] = settled
        elif wanted is not None:
            lacks = f"can't {UNDERSTOOD}" if parts is None else f"lacks one of {dict(parts)}"
            reason = settled or lacks
            fail_swap("match", "select what can be swapped", listed(model, {name: reason}))
        elif settled is not None:
            left[name] = settled
    if found:
        return found, left
    rule, got = "have inside an FFN that can be swapped", listed(model, left or others)
    if not got:
        rule, got = f"have inside what can {UNDERSTOOD}", "nothing that looks like an FFN"
    if wanted is not None:
        fail_swap("match", "select an FFN", f"{match!r} and {got}")
    return fail_swap("model", rule, got)


def _candidates(
    named: dict[str, nn.Module], parts: Mapping[str, str] | None, found: dict[str, DenseFFN]
) -> Iterator[tuple[str, nn.Module, DenseFFN | str | None]]:
    """Modules outside `SegMoE` and outside what was found, with what `read_ffn` says."""
    taken: list[str] = []
    for name, module in named.items():
        if any(name.startswith(f"{outer}." if outer else "") for outer in [*taken, *found]):
            continue
        if isinstance(module, SegMoE):
            taken.append(name)
        elif not any(isinstance(child, SegMoE) for child in module.children()):
            yield name, module, read_ffn(module, parts)


def settled_at(
    named: dict[str, nn.Module],
    name: str,
    dense: DenseFFN | str | None,
    inside: bool | None = None,
) -> DenseFFN | str | None:
    """How an FFN is to be swapped where it is, or why it can't be."""
    if not isinstance(dense, DenseFFN):
        return dense
    if not name and not isinstance(named[name], nn.TransformerEncoderLayer):
        return "is an FFN alone, of which upcycle() makes a layer"
    mixture = next((outer for outer in _parents(name) if _is_mixture(named[outer])), None)
    if mixture is not None:
        return f"is inside the mixture of experts {mixture!r}, whose rows are gathered tokens"
    settled = settle(named[name], dense, inside)
    return settled if isinstance(settled, str) else obstacle(named, name, settled) or settled


def listed(model: nn.Module, reasons: Mapping[str, str]) -> str:
    """Modules and what is wrong with them, equal ones in one entry."""
    named = dict(model.named_modules())
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault((type(named[name]).__name__, reason), []).append(name)
    return "; ".join(
        f"{names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''} ({kind}): {reason}"
        for (kind, reason), names in groups.items()
    )


def _predicate(match: Any) -> Callable[[str, nn.Module], bool] | None:
    if match is None:
        return None
    if callable(match) and not isinstance(match, type):
        return cast(Callable[[str, nn.Module], bool], match)
    if not isinstance(match, str):
        rule = "be a regular expression, a function of name and module, or None"
        got = f"the class {match.__name__}" if isinstance(match, type) else type(match).__name__
        check.fail_type("replace_ffn", "match", rule, got)
    try:
        pattern = re.compile(match)
    except re.error as error:
        check.fail_value("replace_ffn", "match", f"be a regular expression ({error})", repr(match))
    return lambda name, _: pattern.fullmatch(name) is not None


def _parents(name: str) -> Iterator[str]:
    """Names of the modules around a module, from the nearest to the model itself."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_mixture(module: nn.Module) -> bool:
    """Whether it is a mixture of experts: inside, rows are gathered tokens."""
    children = dict(module.named_children())
    if any(re.search(r"(^|_)experts?(_list|s)?$", name) for name in children):
        return True
    # Weights of a router have one row, or column, for each expert.
    routed = {
        size
        for name, weight in module.named_parameters()
        if re.fullmatch(r"\w*(gat(e|ing)|router|switch)\w*(\.weight)?", name)
        for size in weight.shape
    }
    return any(
        isinstance(child, nn.ModuleList)
        and len(child) > 1
        and len(child) in routed
        and all(isinstance(read_ffn(expert), DenseFFN) for expert in child)
        for child in children.values()
    )


def decoder_around(named: dict[str, nn.Module], name: str) -> str | None:
    """Name of the nearest module around, whose attention or configuration says it is causal."""
    for outer in _parents(name):
        flags = [
            flag
            for module in named[outer].modules()
            for holder in (module, getattr(module, "config", None))
            for attribute in ("is_causal", "mask_flag", "is_decoder")
            if isinstance(flag := getattr(holder, attribute, None), bool)
        ]
        kinds = [type(module).__name__ for module in named[outer].modules()]
        takes = (inspect.signature(module.forward).parameters for module in named[outer].modules())
        cached = any("decode_cache" in parameters for parameters in takes)  # TimesFM's layers
        if any(flags) or cached or any("Causal" in kind for kind in kinds):
            return outer
        if flags:
            return None
    return None


def rows_around(named: dict[str, nn.Module], name: str) -> str | None:
    """What an FFN has for rows, where a module around is known for other ones than time steps."""
    for outer in _parents(name):
        kind, inner = type(named[outer]), name[len(outer) :].lstrip(".")
        for known, place, rows in NO_STEPS:
            if known in {"", kind.__name__} and re.fullmatch(place, inner):
                return rows
        kinds = {type(child).__name__ for child in named[outer].children()}
        names = {kind.__name__.lower(), kind.__module__.rpartition(".")[2].lower()}
        if "itransformer" in names or {k for k in kinds if "Embedding" in k} == _INVERTED:
            return "variates"
    return None


def obstacle(named: dict[str, nn.Module], name: str, dense: DenseFFN) -> str | None:
    """Say what would be lost or untied if an FFN were swapped."""
    module = named[name]
    own = [part for ffn in dense.experts or [dense] for part in ffn.linears().values()]
    weights = [weight for part in own for weight in part.parameters()]
    gone: list[nn.Module] = [*own] if dense.inside else list(module.modules())
    if isinstance(module, nn.TransformerEncoderLayer):
        gone = [*own, module.dropout]
    changed = [type(part).__name__ for part in [module, *gone] if "forward" in vars(part)]
    hooked = [type(part).__name__ for part in gone if any(getattr(part, n, None) for n in _HOOKS)]
    hooked += ["weights" for weight in weights if any(getattr(weight, n, None) for n in _HOOKS)]
    held = [weight for holder in named.values() for weight in holder._parameters.values()]
    if changed:
        return f"has a forward set on an instance: of {changed[0]}"
    if hooked:
        return f"has hooks, of {hooked[0]}, which would be lost: remove them first"
    for owner, holder in named.items():
        for attribute, value in vars(holder).items():
            if attribute != "_modules" and any(_leads_to(value, part) for part in gone):
                where = f"{owner}.{attribute}".lstrip(".")
                return f"is also in {where}, which is no module: a swap would not reach it there"
    if len({weight.requires_grad for weight in weights}) > 1:
        return "has some weights frozen and others not"
    children = [child for holder in named.values() for child in holder._modules.values()]
    places = sum(child is part for child in children for part in own)
    tied = sum(weight is other for weight in weights for other in held) > len(weights)
    if tied or places > len(own):
        return "shares weights with another module, which would not stay tied"
    return None


def _leads_to(value: Any, module: nn.Module, depth: int = 3) -> bool:
    """Whether a value is a module, a method of it, or has one inside, as closures may."""
    if isinstance(value, partial):
        value = [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        around = inspect.getclosurevars(value).nonlocals.values()
        value = [*around, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return depth > 0 and any(_leads_to(part, module, depth - 1) for part in value)
    return value is module or (isinstance(value, MethodType) and value.__self__ is module)


def switch_cache_off(model: nn.Module) -> None:
    """Switch the key-value cache of a model off, and let none in by an argument."""
    off = False
    for module in model.modules():
        for name in ("config", "generation_config"):
            holder: Any = getattr(module, name, None)
            if not hasattr(holder, "use_cache"):
                continue
            off |= holder.use_cache is not False  # None is the library's default
            holder.use_cache = False
            hooks: Any = module._forward_pre_hooks
            if hasattr(module, "get_input_embeddings") and refuse_cache not in hooks.values():
                module.register_forward_pre_hook(refuse_cache, with_kwargs=True)
    if off:
        message = (
            "segmoe_kernels.replace_ffn: switched use_cache off in config and generation_config, "
            "as segments would begin anew at every call with cached keys and values; for causal "
            "experts in a decoder of Hugging Face, see segmoe_kernels.models.cached.enable_cache."
        )
        warnings.warn(message, stacklevel=4)  # of who calls replace_ffn


def refuse_cache(module: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a key-value cache: a pre-hook of models whose segments would begin anew."""
    name = type(module).__name__
    if kwargs.get("use_cache"):
        rule = "be False, as segments begin anew at every call"
        check.fail_value(name, "use_cache", rule, kwargs["use_cache"])
    for argument in ("past_key_values", "cache"):  # the older and the newer name
        if kwargs.get(argument) is not None:
            got = type(kwargs[argument]).__name__
            check.fail_value(name, argument, "be None, as segments begin anew", got)
