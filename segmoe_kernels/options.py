"""What a layer does, apart from its tensors: its options, and settings of the whole process.

Options are checked once and handed on whole; settings come from the environment, which is read at
import, and where somebody says so.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.routing import LayerWeights

__all__ = ["Options", "Settings", "call_key", "check_layer", "reload_settings", "settings"]

# What a tensor or a number has to be for its class, and with it all of it, to be known.
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_PLAIN_VALUES = {int, float, str, bool, type(None)}


class Options(NamedTuple):
    """Options of `functional.seg_moe`, whose docstring explains them."""

    segment_size: int
    top_k: int = 1
    pooling: str = "concat"
    expert_scope: str = "token"
    activation: str = "gelu"
    dropout: float = 0.0
    router_dropout: float = 0.0
    router_temperature: float = 1.0
    renormalize: bool | None = None

    def checked(self, function: str) -> "Options":
        """Refuse a wrong value by name; Python's numbers in place of NumPy's."""
        check.check_choice(function, "pooling", self.pooling, check.POOLINGS)
        check.check_choice(function, "expert_scope", self.expert_scope, check.EXPERT_SCOPES)
        check.check_choice(function, "activation", self.activation, ACTIVATIONS)
        check.check_flag(function, "renormalize", self.renormalize, optional=True)
        if self.expert_scope == "projected" and self.pooling != "concat":
            rule = "be 'concat' with expert_scope='projected'"
            check.fail_value(function, "pooling", rule, repr(self.pooling))
        rate, positive = check.check_probability, check.check_positive
        return self._replace(
            segment_size=check.check_integer(function, "segment_size", self.segment_size, 1),
            top_k=check.check_integer(function, "top_k", self.top_k, 1),
            dropout=rate(function, "dropout", self.dropout),
            router_dropout=rate(function, "router_dropout", self.router_dropout),
            router_temperature=positive(function, "router_temperature", self.router_temperature),
        )

    def of_router(self) -> dict[str, Any]:
        """Keywords of `functional.route`."""
        names = ("segment_size", "top_k", "pooling", "router_dropout", "router_temperature")
        return {name: getattr(self, name) for name in (*names, "renormalize")}

    def of_experts(self) -> dict[str, Any]:
        """Keywords of `functional.expert_ffn`."""
        names = ("segment_size", "expert_scope", "activation", "dropout")
        return {name: getattr(self, name) for name in names}


def check_layer(
    function: str,
    x: Tensor,
    weights: LayerWeights,
    compute_dtype: torch.dtype,
    options: Options,
    *,
    num_local: int | None = None,
) -> Options:
    """Refuse a layer whose weights and options do not fit x and each other.

    ``num_local`` experts are here where the others are on other ranks; None: all of them.
    """
    options = options.checked(function)
    segment_size, scope = options.segment_size, options.expert_scope
    _check_projections(x, weights, options)
    # A projected segment is one token of width D: the rest of the layer sees P = 1.
    steps = 1 if scope == "projected" else segment_size
    width = x.shape[-1] * (steps if scope == "segment" else 1)
    empty = x.new_empty(0, 0, x.shape[-1])
    rows = empty.to(compute_dtype)
    router, start, shared = weights.router_weight, weights.router_start, weights.shared
    check.check_route(function, empty, router, steps, options.top_k, options.pooling, start)
    check.check_steps(function, x, segment_size, options.top_k)
    num_experts = router.shape[0] if num_local is None else num_local
    check.check_ffn(function, "experts", weights.experts, rows, width, num_experts)
    check.check_shared(rows, shared, weights.shared_gate, steps)
    if start is not None and shared is not None and shared.up_proj.shape[-1] != width:
        rule = f"have width {width} (token) with router_start: a wider one sees later steps"
        check.fail_value(function, "shared.up_proj", rule, tuple(shared.up_proj.shape))
    return options


def call_key(
    x: Any, weights: LayerWeights, options: Options, backend: str
) -> tuple[Any, ...] | None:
    """All that the checks of a call look at, but batch and length, to compare it with another.

    None in traced code, and where something of another class has a say.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    kinds = tuple(map(type, options))  # True is no 1 here
    plain = type(backend) is str and _PLAIN_VALUES.issuperset(kinds)
    if not plain or type(x) not in _PLAIN_TENSORS or x.is_nested or x.ndim == 0:
        return None
    kind = x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    key: list[Any] = [options, kinds, backend, settings(), x.ndim, x.shape[-1]]
    key += (torch.get_autocast_dtype(kind) if cast else None, x.dtype, x.device, x.layout)
    given: list[Any] = []
    for field in weights:
        if isinstance(field, tuple):
            key.append(type(field))
            given += field
        else:
            given.append(field)
    for tensor in given:
        if tensor is None:
            key.append(None)
        elif type(tensor) not in _PLAIN_TENSORS or tensor.is_nested:
            return None
        else:
            key += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
    return tuple(key)


def _check_projections(x: Tensor, weights: LayerWeights, options: Options) -> None:
    """Refuse weights and a scope that exclude each other."""
    scope = options.expert_scope
    if weights.router_start is not None and scope != "token":
        rule = "be None unless expert_scope='token' (causal models need token scopes)"
        check.fail_value("seg_moe", "router_start", rule, f"expert_scope={scope!r}")
    narrow, wide = x.shape[-1], options.segment_size * x.shape[-1]
    for name, shape in (("in_proj", (narrow, wide)), ("out_proj", (wide, narrow))):
        projection: Any = getattr(weights, name)
        if (projection is None) == (scope == "projected"):
            rule = "come with expert_scope='projected' and only with it"
            check.fail_value("seg_moe", name, rule, f"expert_scope={scope!r}")
        if projection is None:
            continue
        if not isinstance(projection, tuple) or len(projection) != 2:
            rule = "be (weight, bias or None)"
            check.fail_type("seg_moe", name, rule, type(projection).__name__)
        for index, tensor in enumerate(projection):
            if tensor is not None or index == 0:
                like = check.cast_like(tensor, x)
                check.check_like("seg_moe", f"{name}[{index}]", tensor, like, shape[: 2 - index])


class Settings(NamedTuple):
    """What the variables say.

    Attributes:
        backend: SEGMOE_BACKEND, in the place of "auto".
        arch: SEGMOE_ARCH, whose tiles are taken, or None.
        tiles: SEGMOE_TILES, a file of tiles, or None.
        replay: whether launches are played back; not with SEGMOE_REPLAY=0.
    """

    backend: str
    arch: str | None
    tiles: str | None
    replay: bool


def settings() -> Settings:
    """What holds now.

    Returns:
        Settings.
    """
    return _NOW


def reload_settings() -> None:
    """Read the environment again: SEGMOE_BACKEND, SEGMOE_ARCH, SEGMOE_TILES and SEGMOE_REPLAY.

    They are read when the package is imported; whoever changes one later in the same process calls
    this. Layers and functions take the new ones in their next call.
    """
    global _NOW  # noqa: PLW0603  one place, read in every call
    _NOW = _read()


def _read() -> Settings:
    get = os.environ.get
    return Settings(
        get("SEGMOE_BACKEND", "auto"),
        get("SEGMOE_ARCH"),
        get("SEGMOE_TILES") or None,
        get("SEGMOE_REPLAY", "1") != "0",
    )


_NOW = _read()
