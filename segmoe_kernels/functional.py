"""The layer as functions: four differentiable stages, and `seg_moe` which runs them in order.

Every function checks its arguments, then hands them to the reference (plain PyTorch) or to the
Triton kernels; both have the same names and give the same results. Every one raises TypeError for a
wrong type or dtype, ValueError for a wrong shape, value or device, and RuntimeError if
``backend="triton"`` can't run here.
"""

import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from segmoe_kernels import pipeline, reference
from segmoe_kernels import validation as check
from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.flops import install_flops
from segmoe_kernels.options import Options, call_key, check_layer, settings
from segmoe_kernels.routing import FFNWeights, LayerWeights, Permutation, RouterOutput, Routing

__all__ = [
    "combine",
    "expert_ffn",
    "grouped_gemm",
    "permute",
    "resolve_backend",
    "route",
    "seg_moe",
]


def resolve_backend(backend: str, x: Tensor) -> str:
    """Say which backend runs for ``x``: "triton" or "reference".

    Args:
        backend: "auto" takes Triton for GPU tensors where it is installed, else the reference;
            the environment variable SEGMOE_BACKEND overrides "auto" (`reload_settings` reads it
            again). "triton" never falls back.
        x: the input; only its device is looked at. Triton's interpreter, which runs CPU tensors,
            multiplies bfloat16 wrongly: there the kernels themselves refuse it.

    Returns:
        "triton" or "reference".

    Raises:
        TypeError: if x has no device.
        ValueError: if backend (or SEGMOE_BACKEND) is not one of the three names.
        RuntimeError: if "triton" is asked for and can't run here, with what to do about it.
    """
    check.check_choice("resolve_backend", "backend", backend, check.BACKENDS)
    if backend == "auto":
        backend = settings().backend
        check.check_choice("resolve_backend", "SEGMOE_BACKEND", backend, check.BACKENDS)
    if not isinstance(getattr(x, "device", None), torch.device):
        check.fail_type("resolve_backend", "x", "be a torch.Tensor", type(x).__name__)
    if backend == "reference":
        return "reference"
    missing = _why_not_triton(x.device.type)
    if missing is None:
        interpreted = x.device.type == "cpu"
        return "reference" if interpreted and backend == "auto" else "triton"
    if backend == "triton":
        raise RuntimeError(f"segmoe_kernels: backend='triton' {missing}")
    if x.device.type == "cuda":
        _warn_once(f"segmoe_kernels: the reference runs, because backend='triton' {missing}")
    return "reference"


def _why_not_triton(device_type: str) -> str | None:
    if device_type not in {"cuda", "cpu"}:
        return f"needs a CUDA or ROCm device, got {device_type} tensors; use backend='reference'."
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"needs the triton package ({error}): pip install triton"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return (
            "needs a GPU, got cpu tensors; use backend='auto' or 'reference', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter."
        )
    return None


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED and not torch.compiler.is_compiling():
        _WARNED.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def backend_stages(backend: str, x: Tensor) -> ModuleType:
    """The module whose functions are the stages of the backend that runs for ``x``."""
    if resolve_backend(backend, x) == "reference":
        stages: ModuleType = reference
    else:
        from segmoe_kernels import stages
    if not torch.compiler.is_compiling():
        install_flops()
    return stages


def route(
    x: Tensor,
    router_weight: Tensor,
    *,
    segment_size: int,
    top_k: int,
    pooling: str = "concat",
    router_temperature: float = 1.0,
    router_dropout: float = 0.0,
    renormalize: bool | None = None,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> RouterOutput:
    """Stage 1: pool each segment and choose its experts, in one pass over x.

    ``router_probs = dropout(softmax(pooled @ router_weight.T / router_temperature))``; the
    ``top_k`` largest are chosen, the lower expert first among equals.

    Args:
        x: (B, T, D).
        router_weight: (E, W), W the pooled width: ``P * D`` for "concat", else D. Dtype of x.
        segment_size: P, steps in a segment.
        top_k: experts per segment, 1 to E.
        pooling: "concat", or over the real steps "mean", "max", "first", "last".
        router_temperature: divides the logits.
        router_dropout: probability of dropping an expert's *probability* (official behaviour).
        renormalize: divide the chosen probabilities by their sum; None does so for top_k > 1.
        router_start: (W,). Makes the router causal: segment j is routed on the pooled segment
            j - 1, and segment 0 on this vector.
        padding_mask: (B, T) bool, True = real. A segment without a real step is not routed.
        backend: see `resolve_backend`.

    Returns:
        RouterOutput; logits, probabilities and weights carry gradients.

    Source: arXiv 2601.21641; ``MoESegment`` in evortigosa/segmoe_forecast, model/MoE.py.
    """
    name = "route"
    check.check_sequences(name, x, padding_mask)
    options = Options(segment_size, top_k, pooling, router_dropout=router_dropout)
    options = options._replace(router_temperature=router_temperature, renormalize=renormalize)
    options = options.checked(name)
    segment_size, top_k = options.segment_size, options.top_k
    check.check_route(name, x, router_weight, segment_size, top_k, pooling, router_start)
    check.check_steps(name, x, segment_size, top_k)
    of_call = {"router_start": router_start, "padding_mask": padding_mask}
    stages = backend_stages(backend, x)
    out: RouterOutput = stages.route(x, router_weight, **options.of_router(), **of_call)
    return out


def permute(topk_ids: Tensor, num_experts: int, *, backend: str = "auto") -> Permutation:
    """Stage 2: group the slots (``segment * top_k + choice``) by expert, by a stable counting sort.

    Args:
        topk_ids: (S, top_k) int32. What lies outside [0, E) names no expert: -1 for a segment
            that is not routed.
        num_experts: E.
        backend: see `resolve_backend`.

    Returns:
        Permutation; slots without an expert come last.
    """
    num_experts = check.check_integer("permute", "num_experts", num_experts, 1)
    check.check_index("permute", "topk_ids", topk_ids, topk_ids)
    if topk_ids.ndim != 2 or topk_ids.shape[1] < 1:
        check.fail_value("permute", "topk_ids", "have shape (S, top_k)", tuple(topk_ids.shape))
    out: Permutation = backend_stages(backend, topk_ids).permute(topk_ids, num_experts)
    return out


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Rows of expert e times its matrix: ``act(x[rows of e] @ weight[e].T + bias[e])``.

    Args:
        x: (M, K), rows grouped by expert.
        weight: (E, N, K), dtype of x.
        expert_offsets: (E + 1,) int32; rows of e are ``[offsets[e], offsets[e + 1])``. They have to
            ascend from 0 to at most M; the kernels don't look, as that would wait for the GPU.
        bias: (E, N) or None.
        activation: see `expert_ffn`, or None.
        backend: see `resolve_backend`.

    Returns:
        (M, N), dtype of x. Rows from ``expert_offsets[E]`` on are ``act(0)``, which is 0.
    """
    check.check_tensor("grouped_gemm", "x", x)
    if x.ndim != 2:
        check.fail_value("grouped_gemm", "x", "have shape (M, K)", tuple(x.shape))
    check.check_tensor("grouped_gemm", "weight", weight)
    if weight.ndim != 3:
        shape = tuple(weight.shape)
        check.fail_value("grouped_gemm", "weight", "have shape (E, N, K)", shape)
    shape = (weight.shape[0], weight.shape[1], x.shape[1])
    check.check_like("grouped_gemm", "weight", weight, x, shape)
    if bias is not None:
        check.check_like("grouped_gemm", "bias", bias, x, shape[:2])
    check.check_offsets("grouped_gemm", expert_offsets, x, weight.shape[0])
    check.check_choice("grouped_gemm", "activation", activation, (*ACTIVATIONS, None))
    out: Tensor = backend_stages(backend, x).grouped_gemm(
        x, weight, expert_offsets, bias, activation
    )
    return out


def expert_ffn(
    x: Tensor,
    topk_weights: Tensor,
    permutation: Permutation,
    experts: FFNWeights,
    *,
    segment_size: int,
    expert_scope: str = "token",
    activation: str = "gelu",
    dropout: float = 0.0,
    padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stage 3: run each slot's expert on its segment and scale by the slot's weight.

    Hidden: ``act(up(x))``, or gated ``act(gate(x)) * up(x)``; then dropout; then ``down``.

    Args:
        x: (B, T, D).
        topk_weights: (S, top_k) float32 (float64 where x is).
        permutation: of the slots, from `permute`.
        experts: FFNWeights stacked over E, of width D ("token") or ``P * D`` ("segment").
        segment_size: P.
        expert_scope: "token" applies the expert to each of the P steps, "segment" to their
            concatenation.
        activation: a name in `segmoe_kernels.activations.ACTIVATIONS`, such as exact "gelu".
        dropout: probability; random numbers come from PyTorch's generator of the device.
        padding_mask: (B, T) bool, True = real.
        backend: see `resolve_backend`.

    Returns:
        (top_k, B, T, D), dtype of x: the weighted output of each choice, at the place of its
        steps. Masked steps are 0.

    Source: arXiv 2601.21641; ``FeedForward`` in evortigosa/segmoe_forecast, model/MoE.py.
    """
    name = "expert_ffn"
    check.check_sequences(name, x, padding_mask)
    check.check_choice(name, "expert_scope", expert_scope, ("token", "segment"))
    options = Options(
        segment_size, expert_scope=expert_scope, activation=activation, dropout=dropout
    ).checked(name)
    segment_size = options.segment_size
    check.check_tensor(name, "topk_weights", topk_weights)
    num_segments = x.shape[0] * -(-x.shape[1] // segment_size)
    if topk_weights.ndim != 2 or topk_weights.shape[0] != num_segments:
        rule = f"have shape (S={num_segments}, top_k)"
        check.fail_value(name, "topk_weights", rule, tuple(topk_weights.shape))
    check.check_type(name, "permutation", permutation, Permutation, "be a Permutation")
    num_experts = permutation.expert_offsets.shape[0] - 1
    check.check_offsets(name, permutation.expert_offsets, x, num_experts)
    for field in ("sorted_to_slot", "slot_to_sorted"):
        index = getattr(permutation, field)
        check.check_index(name, f"permutation.{field}", index, x)
        if index.shape != (topk_weights.numel(),):
            rule = f"have shape (R={topk_weights.numel()},)"
            check.fail_value(name, f"permutation.{field}", rule, tuple(index.shape))
    width = x.shape[-1] * (segment_size if expert_scope == "segment" else 1)
    check.check_ffn(name, "experts", experts, x, width, num_experts)
    check.check_steps(name, x, segment_size, topk_weights.shape[1])
    run, of_experts = backend_stages(backend, x).expert_ffn, options.of_experts()
    out: Tensor = run(
        x, topk_weights, permutation, experts, **of_experts, padding_mask=padding_mask
    )
    return out


def combine(
    expert_out: Tensor,
    shared_out: Tensor | None = None,
    shared_gate_logits: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stage 4: sum the choices of each step, add the shared path times its shared gate, crop.

    ``y = sum_k expert_out[k] + sigmoid(shared_gate_logits) * shared_out``.

    Args:
        expert_out: (top_k, B, T, D), already weighted, 0 where masked.
        shared_out: (B, J, P * D) or None; what lies behind T is cropped.
        shared_gate_logits: (B, J), one for each row of shared_out.
        padding_mask: (B, T) bool, True = real; needed where shared_out is.
        backend: see `resolve_backend`.

    Returns:
        (B, T, D), dtype of expert_out; a view of it for one choice without a shared path.
    """
    check.check_tensor("combine", "expert_out", expert_out)
    if expert_out.ndim != 4 or expert_out.shape[0] < 1:
        shape = tuple(expert_out.shape)
        check.fail_value("combine", "expert_out", "have shape (top_k, B, T, D)", shape)
    check.check_mask("combine", padding_mask, expert_out[0])
    if (shared_out is None) != (shared_gate_logits is None):
        got = "only one of them"
        check.fail_value("combine", "shared_out", "come with shared_gate_logits", got)
    if shared_out is not None and shared_gate_logits is not None:
        check.check_shared_out(expert_out, shared_out, shared_gate_logits)
    out: Tensor = backend_stages(backend, expert_out).combine(
        expert_out, shared_out, shared_gate_logits, padding_mask=padding_mask
    )
    return out


def seg_moe(
    x: Tensor,
    router_weight: Tensor,
    experts: FFNWeights,
    *,
    segment_size: int,
    top_k: int = 1,
    pooling: str = "concat",
    expert_scope: str = "token",
    shared: FFNWeights | None = None,
    shared_gate: Tensor | None = None,
    in_proj: tuple[Tensor, Tensor | None] | None = None,
    out_proj: tuple[Tensor, Tensor | None] | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    router_dropout: float = 0.0,
    router_temperature: float = 1.0,
    renormalize: bool | None = None,
    router_start: Tensor | None = None,
    padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Routing]:
    """The whole layer: route, permute, run the experts, combine with the shared path.

    The projections of ``expert_scope="projected"`` run as PyTorch's own GEMMs on both backends. So
    do the shared expert's, with kernels of ours around them on the Triton backend.

    Under ``torch.autocast`` the router stays in float32, the products run in the autocast dtype
    and the result has the dtype of x.

    Args:
        x: (..., T, D).
        router_weight: (E, W); W is D for "projected", else the pooled width.
        experts: FFNWeights stacked over E.
        segment_size: P.
        top_k: experts per segment, 1 to E.
        pooling: see `route`.
        expert_scope: "token", "segment" (see `expert_ffn`), or "projected": the segment is
            projected to width D, handled like one token, and projected back to its P steps.
        shared: FFNWeights of the always-on expert or None; its width, a multiple of D, says how
            many steps one of its rows sees: ``P * D`` (the official layer) or D.
        shared_gate: (1, width of shared).
        in_proj: weight (D, P * D) and bias (D,) or None; "projected" only.
        out_proj: weight (P * D, D) and bias (P * D,) or None; "projected" only.
        activation: see `expert_ffn`.
        dropout: see `expert_ffn`; in the shared expert as well.
        router_dropout: see `route`.
        router_temperature: see `route`.
        renormalize: see `route`.
        router_start: see `route`. Needs "token" and a shared expert of width D or none: a wider
            one would let a step see later ones.
        padding_mask: (..., T) bool, True = real. Masked steps contribute nothing and get 0.
        backend: see `resolve_backend`.

    Returns:
        ``(y, routing)``: y has the shape and dtype of x.

    Raises:
        ValueError: for options that exclude each other, beside the module's rules.

    Source: arXiv 2601.21641; evortigosa/segmoe_forecast, model/MoE.py: ``MoESegment`` ("token"),
    ``MoESegmentV0`` ("segment"), ``MoESegmentV1`` ("projected"), ``MoEFeedForward`` (P = 1).
    """
    weights = LayerWeights(
        router_weight, experts, shared, shared_gate, in_proj, out_proj, router_start
    )
    of_router = router_dropout, router_temperature, renormalize
    options = Options(segment_size, top_k, pooling, expert_scope, activation, dropout, *of_router)
    return run_layer(x, weights, options, padding_mask, backend)


# Calls that passed the checks, with their options and the stages that they run.
_CHECKED: dict[tuple[Any, ...], tuple[Options, ModuleType]] = {}
_MOST_CHECKED = 1024


def run_layer(
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    padding_mask: Tensor | None,
    backend: str,
    around: Callable[[Any], pipeline.Stages] | None = None,
) -> tuple[Tensor, Routing]:
    """`seg_moe` with its arguments in order; a call as one before it is not checked again.

    ``around`` makes of the backend's stages those to run.
    """
    key = call_key(x, weights, options, backend)
    known = None if key is None else _CHECKED.get(key)
    stages: Any
    if known is None:
        check.check_x("seg_moe", x)
        check.check_weights("seg_moe", x, weights)
    check.check_mask("seg_moe", padding_mask, x)  # in traced code, too: see SegMoE
    weights, dtype = pipeline.autocast_weights(x, weights)
    if known is None:
        options = check_layer("seg_moe", x, weights, dtype, options)
        stages = backend_stages(backend, x)
        if key is not None:
            if len(_CHECKED) >= _MOST_CHECKED:
                _CHECKED.clear()
            _CHECKED[key] = options, stages
    else:
        options, stages = known
        install_flops()
        check.check_steps("seg_moe", x, options.segment_size, options.top_k)
    stages = stages if around is None else around(stages)
    return pipeline.run_stages(stages, x, weights, options, padding_mask)
