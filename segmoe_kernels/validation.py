"""Checks of what users pass, before anything is allocated or launched.

Messages read ``segmoe_kernels.<function>: expected <argument> to <rule>, got <what>.``
TypeError is for Python types and dtypes, ValueError for shapes, values, devices and strides,
RuntimeError for what the machine lacks. Only metadata is looked at: no check waits for a GPU.
Numbers of NumPy are taken as Python's: the checks of numbers return what to go on with.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segmoe_kernels.routing import FFNWeights, LayerWeights

POOLINGS = ("concat", "mean", "max", "first", "last")
EXPERT_SCOPES = ("token", "segment", "projected")
SHARED_EXPERTS = ("segment", "token", None)
BACKENDS = ("auto", "triton", "reference")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOAT_NAMES = "float32, float16, bfloat16 or float64"

# What the paper's code and other libraries call an argument of ours.
OTHER_NAMES = {
    "d_model": "hidden_size embed_dim dim",
    "d_ff": "intermediate_size moe_intermediate_size ffn_dim dim_feedforward hidden_dim",
    "num_experts": "n_experts num_local_experts n_routed_experts",
    "top_k": "num_experts_per_tok topk moe_topk",
    "segment_size": "exp_segment_size seg_size seg_len patch_len patch_size",
    "shared_expert": "n_shared_experts num_shared_experts",
    "shared_d_ff": "shared_expert_intermediate_size",
    "activation": "hidden_act act_fn",
    "gated": "glu",
    "router_dropout": "exp_route_dropout",
    "router_temperature": "exp_route_temperature",
    "renormalize": "norm_topk_prob",
    "aux_loss_weight": "router_aux_loss_coef",
    "z_loss_weight": "router_z_loss_coef",
    "padding_mask": "mask attention_mask attn_mask key_padding_mask src_key_padding_mask",
}
_OUR_NAME = {other: ours for ours, others in OTHER_NAMES.items() for other in others.split()}
_P = ParamSpec("_P")
_R = TypeVar("_R")

# CUDA's limit on programs along the first axis of a launch; beyond it a launch is skipped silently.
MAX_PROGRAMS = 2**31 - 1


def fail_type(function: str, argument: str, rule: str, got: object) -> NoReturn:
    """Raise the TypeError of the package's form."""
    raise TypeError(f"segmoe_kernels.{function}: expected {argument} to {rule}, got {got}.")


def fail_value(function: str, argument: str, rule: str, got: object) -> NoReturn:
    """Raise the ValueError of the package's form."""
    raise ValueError(f"segmoe_kernels.{function}: expected {argument} to {rule}, got {got}.")


def refuse_other_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a method of `SegMoE`: an argument by a name of other libraries is told ours."""
    place = f"SegMoE.{function.__name__}".removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name in _OUR_NAME:
                mask = " (bool, True = real)" if _OUR_NAME[name] == "padding_mask" else ""
                fail_type(place, _OUR_NAME[name], f"be called by this name{mask}", name)
        return function(*args, **kwargs)

    return call


def _is_number(value: Any, *kinds: type) -> bool:
    """Whether it is a number, Python's or NumPy's; a boolean is none."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_integer(function: str, argument: str, value: Any, minimum: int) -> int:
    """Refuse what is not an integer of at least ``minimum``; return it as Python's."""
    if isinstance(value, torch.SymInt):  # under torch.compile or export
        return value  # type: ignore[return-value]
    if not _is_number(value, int, Integral):
        fail_type(function, argument, "be an int", f"{value!r} ({type(value).__name__})")
    if value < minimum:
        fail_value(function, argument, f"be at least {minimum}", value)
    return int(value)


def check_probability(function: str, argument: str, value: Any) -> float:
    """Refuse what is not a dropout probability in [0, 1); return it as Python's."""
    if not _is_number(value, float, int, Real):
        fail_type(function, argument, "be a float", f"{value!r} ({type(value).__name__})")
    if not 0.0 <= value < 1.0:
        fail_value(function, argument, "be in [0, 1)", value)
    return float(value)


def check_positive(function: str, argument: str, value: Any, *, zero: bool = False) -> float:
    """Refuse what is not a finite positive number (``zero=True`` admits 0); return Python's."""
    if not _is_number(value, float, int, Real):
        fail_type(function, argument, "be a float", f"{value!r} ({type(value).__name__})")
    if not (value >= 0 if zero else value > 0) or not value < math.inf:  # not-a-number is neither
        rule = "be finite and not negative" if zero else "be finite and positive"
        fail_value(function, argument, rule, value)
    return float(value)


def check_choice(function: str, argument: str, value: Any, choices: Collection[str | None]) -> None:
    """Refuse what is not one of ``choices``."""
    # Arrays compare elementwise.
    if not isinstance(value, str | None) or value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        fail_value(function, argument, f"be one of {names}", repr(value))


def check_type(function: str, argument: str, value: Any, kind: Any, rule: str) -> None:
    """Refuse what is not an instance of ``kind``, a class or several."""
    if not isinstance(value, kind):
        fail_type(function, argument, rule, type(value).__name__)


def check_string(function: str, argument: str, value: Any) -> None:
    """Refuse what is not a string."""
    check_type(function, argument, value, str, "be a str")


def check_path(function: str, argument: str, value: Any) -> None:
    """Refuse what is not a path."""
    check_type(function, argument, value, str | PathLike, "be a path")


def check_module(function: str, argument: str, value: Any) -> None:
    """Refuse what is not a module."""
    check_type(function, argument, value, nn.Module, "be a torch.nn.Module")


def check_mapping(function: str, argument: str, value: Any) -> None:
    """Refuse what is not a mapping of strings, such as a state dict."""
    check_type(function, argument, value, Mapping, "be a mapping of names to tensors")
    for key in value:
        if not isinstance(key, str):
            fail_type(function, argument, "have names that are str", repr(key))


def check_flag(function: str, argument: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is not a bool (``optional=True`` admits None)."""
    if not isinstance(value, bool) and not (optional and value is None):
        rule = "be True, False or None" if optional else "be True or False"
        fail_type(function, argument, rule, f"{value!r} ({type(value).__name__})")


def check_device(function: str, argument: str, value: Any) -> None:
    """Refuse what names no device."""
    try:
        torch.device("cpu" if value is None else value)
    except (RuntimeError, TypeError, ValueError):
        refuse = fail_value if isinstance(value, str) else fail_type
        refuse(function, argument, "be a torch.device, its name or None", repr(value))


def check_dtype(function: str, argument: str, value: Any) -> None:
    """Refuse what is not a supported floating dtype."""
    if not isinstance(value, torch.dtype) or value not in FLOAT_DTYPES:
        fail_type(function, argument, f"be {_FLOAT_NAMES}", value)


def check_group(function: str, group: Any) -> None:
    """Refuse a process group that this rank is not in; None is the group of all ranks."""
    if not dist.is_available() or not dist.is_initialized():
        message = "needs torch.distributed: call torch.distributed.init_process_group first."
        raise RuntimeError(f"segmoe_kernels.{function} {message}")
    if dist.get_rank(group) < 0:
        raise RuntimeError(f"segmoe_kernels.{function}: this rank is not in the group.")


def check_tensor(function: str, argument: str, value: Any) -> None:
    """Refuse what is not a dense tensor of a supported floating dtype."""
    check_type(function, argument, value, Tensor, "be a torch.Tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        fail_type(function, argument, "be a dense tensor", kind)
    if value.dtype not in FLOAT_DTYPES:
        fail_type(function, argument, f"have dtype {_FLOAT_NAMES}", str(value.dtype))


def check_x(function: str, x: Any, d_model: int | None = None) -> None:
    """Refuse what is not ``(..., T, D)``."""
    check_tensor(function, "x", x)
    if x.ndim < 2 or (d_model is not None and x.shape[-1] != d_model) or x.shape[-1] == 0:
        width = "d_model" if d_model is None else f"d_model={d_model}"
        fail_value(function, "x", f"have shape (..., T, {width})", tuple(x.shape))


def check_mask(function: str, mask: Any, x: Tensor) -> None:
    """Refuse a padding mask that is not ``(..., T)`` bool on the device of x."""
    if mask is None:
        return
    check_type(function, "padding_mask", mask, Tensor, "be a torch.Tensor or None")
    if mask.dtype != torch.bool:
        fail_type(function, "padding_mask", "have dtype torch.bool (True = real)", mask.dtype)
    if mask.shape != x.shape[:-1]:
        shape = tuple(x.shape[:-1])
        fail_value(function, "padding_mask", f"have shape {shape} as x", tuple(mask.shape))
    if mask.device != x.device:
        fail_value(function, "padding_mask", f"be on {x.device} as x", mask.device)


def check_like(
    function: str, argument: str, value: Any, like: Tensor, shape: tuple[int, ...]
) -> None:
    """Refuse a parameter whose shape, dtype or device does not go with ``like`` (x)."""
    check_tensor(function, argument, value)
    if tuple(value.shape) != shape:
        fail_value(function, argument, f"have shape {shape}", tuple(value.shape))
    if value.dtype != like.dtype:
        rule = f"have dtype {like.dtype} as x (cast one, or use torch.autocast)"
        fail_type(function, argument, rule, str(value.dtype))
    if value.device != like.device:
        fail_value(function, argument, f"be on {like.device} as x", value.device)


def cast_like(value: Any, x: Tensor) -> Tensor:
    """What a tensor that PyTorch multiplies x with has to be like: autocast gives both a dtype."""
    cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    # Autocast leaves float64 alone.
    narrow = cast and isinstance(value, Tensor) and torch.float64 not in {value.dtype, x.dtype}
    return x.new_empty(0, dtype=value.dtype) if narrow else x


def is_torchs_own(value: Tensor) -> bool:
    """Whether a tensor's class is PyTorch's; compiled code, which can't ask, takes it for one."""
    return torch.compiler.is_compiling() or type(value).__module__.partition(".")[0] == "torch"


def check_linear(function: str, argument: str, part: Any, x: Tensor) -> None:
    """Refuse a linear map to be called whose own tensors PyTorch may compute nonsense with."""
    # What replaces its ``forward``, as offloading does, may bring the weights in the call.
    if not isinstance(part, nn.Linear) or "forward" in part.__dict__:
        return
    own = type(part).forward is not nn.Linear.forward or part._forward_pre_hooks
    for name, value in (*part.named_parameters(), *part.named_buffers()):
        # Tensors of other libraries and DTensors have rules of their own.
        if not is_torchs_own(value) or hasattr(value, "device_mesh"):
            continue
        if value.device != x.device:
            fail_value(function, f"{argument}.{name}", f"be on {x.device} as x", value.device)
        if not own and name in {"weight", "bias"}:
            check_tensor(function, f"{argument}.{name}", value)
            like = cast_like(value, x)
            check_like(function, f"{argument}.{name}", value, like, tuple(value.shape))


def check_index(function: str, argument: str, value: Any, like: Tensor) -> None:
    """Refuse an index array that is not int32 on the device of ``like``."""
    check_type(function, argument, value, Tensor, "be a torch.Tensor")
    if value.dtype != torch.int32:
        fail_type(function, argument, "have dtype torch.int32", str(value.dtype))
    if value.device != like.device:
        fail_value(function, argument, f"be on {like.device}", value.device)


def check_ffn(
    function: str, name: str, weights: Any, x: Tensor, width: int, experts: int | None
) -> None:
    """Refuse FFN weights whose shapes do not fit ``width`` and each other."""
    check_type(function, name, weights, FFNWeights, "be FFNWeights")
    check_tensor(function, f"{name}.up_proj", weights.up_proj)
    lead = () if experts is None else (experts,)
    if weights.up_proj.ndim != len(lead) + 2:
        rule = f"have {len(lead) + 2} dimensions"
        fail_value(function, f"{name}.up_proj", rule, tuple(weights.up_proj.shape))
    d_ff = weights.up_proj.shape[-2]
    shapes = {
        "up_proj": (*lead, d_ff, width),
        "down_proj": (*lead, width, d_ff),
        "gate_proj": (*lead, d_ff, width),
        "up_proj_bias": (*lead, d_ff),
        "gate_proj_bias": (*lead, d_ff),
        "down_proj_bias": (*lead, width),
    }
    for field, shape in shapes.items():
        value = getattr(weights, field)
        if value is not None or field in {"up_proj", "down_proj"}:
            check_like(function, f"{name}.{field}", value, x, shape)
    if weights.gate_proj_bias is not None and weights.gate_proj is None:
        fail_value(function, f"{name}.gate_proj_bias", "come with gate_proj", "gate_proj=None")


def check_weights(function: str, x: Tensor, weights: LayerWeights) -> None:
    """Refuse what ``torch.autocast`` would make a weight of by casting it."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return
    check_tensor(function, "router_weight", weights.router_weight)
    tensors: dict[str, Any] = {"shared_gate": weights.shared_gate}
    ffns: dict[str, Any] = {"experts": weights.experts, "shared": weights.shared}
    for name, ffn in ffns.items():
        if ffn is not None or name == "experts":
            check_type(function, name, ffn, FFNWeights, "be FFNWeights")
            tensors |= {f"{name}.{field}": tensor for field, tensor in ffn._asdict().items()}
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(function, name, tensor)


def check_programs(function: str, programs: int) -> None:
    """Refuse a launch that CUDA would skip without a word."""
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"segmoe_kernels.{function}: expected x to need at most {MAX_PROGRAMS} programs in a "
            f"launch, got {programs}. Split the batch."
        )


def check_steps(function: str, x: Tensor, segment_size: int, top_k: int) -> None:
    """Refuse more steps, counted for each choice, than 32-bit indices can."""
    if torch.compiler.is_compiling():  # a bound on lengths that are symbols would bind the program
        return
    length = x.shape[-2]
    steps = top_k * -(-length // segment_size) * segment_size * math.prod(x.shape[:-2])
    if steps > MAX_PROGRAMS:
        rule = (
            f"have at most {MAX_PROGRAMS} steps, each counted top_k={top_k} times and the last "
            "segment as full (split the batch)"
        )
        fail_value(function, "x", rule, f"{steps} with shape {tuple(x.shape)}")


def check_sequences(function: str, x: Tensor, padding_mask: Tensor | None) -> None:
    """Refuse what is not (B, T, D), or a mask that does not fit it."""
    check_x(function, x)
    if x.ndim != 3:
        fail_value(function, "x", "have shape (B, T, D)", tuple(x.shape))
    check_mask(function, padding_mask, x)


def check_offsets(function: str, expert_offsets: Tensor, like: Tensor, num_experts: int) -> None:
    """Refuse offsets that are not (E + 1,) int32."""
    check_index(function, "expert_offsets", expert_offsets, like)
    if expert_offsets.shape != (num_experts + 1,):
        rule = f"have shape (E + 1 = {num_experts + 1},)"
        fail_value(function, "expert_offsets", rule, tuple(expert_offsets.shape))


def check_route(
    function: str,
    x: Tensor,
    router_weight: Tensor,
    segment_size: int,
    top_k: int,
    pooling: str,
    router_start: Tensor | None,
) -> None:
    """Refuse a router that does not fit x and the options."""
    check_choice(function, "pooling", pooling, POOLINGS)
    check_tensor(function, "router_weight", router_weight)
    width = x.shape[-1] * (segment_size if pooling == "concat" else 1)
    num_experts = router_weight.shape[0] if router_weight.ndim else 0
    check_like(function, "router_weight", router_weight, x, (num_experts, width))
    if not 1 <= top_k <= num_experts:
        fail_value(function, "top_k", f"be in [1, num_experts={num_experts}]", top_k)
    if router_start is not None:
        check_like(function, "router_start", router_start, x, (width,))


def check_shared(
    x: Tensor, shared: FFNWeights | None, shared_gate: Tensor | None, segment_size: int
) -> None:
    """Refuse a shared expert that is neither token-wide nor segment-wide."""
    if (shared is None) != (shared_gate is None):
        fail_value("seg_moe", "shared", "come with shared_gate", "only one of them")
    if shared is None:
        return
    widths = (x.shape[-1], segment_size * x.shape[-1])
    check_type("seg_moe", "shared", shared, FFNWeights, "be FFNWeights")
    check_tensor("seg_moe", "shared.up_proj", shared.up_proj)
    width = shared.up_proj.shape[-1] if shared.up_proj.ndim else 0
    if width not in widths:
        rule = f"have a width of {widths[0]} (token) or {widths[1]} (segment)"
        fail_value("seg_moe", "shared.up_proj", rule, tuple(shared.up_proj.shape))
    check_ffn("seg_moe", "shared", shared, x, width, None)
    check_like("seg_moe", "shared_gate", shared_gate, x, (1, width))


def check_shared_out(expert_out: Tensor, shared_out: Tensor, gate_logits: Tensor) -> None:
    """Refuse a shared path that does not cover ``expert_out``."""
    _, batch, length, d_model = expert_out.shape
    check_tensor("combine", "shared_out", shared_out)
    rows = shared_out.shape[1] if shared_out.ndim == 3 else 0
    width = shared_out.shape[2] if shared_out.ndim == 3 else 0
    enough = width > 0 and width % d_model == 0 and rows * width >= length * d_model
    if shared_out.ndim != 3 or shared_out.shape[0] != batch or not enough:
        rule = f"have shape (B={batch}, J, P * D) with D={d_model} and J * P >= T={length}"
        fail_value("combine", "shared_out", rule, tuple(shared_out.shape))
    check_like("combine", "shared_out", shared_out, expert_out, (batch, rows, width))
    check_like("combine", "shared_gate_logits", gate_logits, expert_out, (batch, rows))
