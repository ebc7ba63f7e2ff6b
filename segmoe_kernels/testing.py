"""Inputs, a float64 oracle and the accuracy criterion, shared by tests and benchmarks.

A kernel is judged by the error that plain PyTorch makes in the same dtype, both against float64::

    inputs = make_inputs(4, 37, 64, dtype=torch.bfloat16)
    actual = run_layer(layer, *inputs, backend="triton")
    ids = route_ids(layer, *inputs)
    eager = run_layer(layer, *inputs, backend="reference", topk_ids=ids)
    assert_as_accurate(actual, eager, oracle(layer, *inputs, topk_ids=ids))
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from segmoe_kernels import reference
from segmoe_kernels.functional import resolve_backend
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.routing import RouterOutput

__all__ = [
    "Accuracy",
    "Inputs",
    "assert_as_accurate",
    "compare",
    "forced_routing",
    "make_inputs",
    "oracle",
    "route_ids",
    "run_layer",
]

RMS_FACTOR = 1.5
MAX_FACTOR = 3.0


class Inputs(NamedTuple):
    """What one call of the layer and its backward take; unpacks into `run_layer`.

    Attributes:
        x: (..., T, D).
        dy: (..., T, D), the upstream gradient.
        padding_mask: (..., T) bool, True = real, or None.
    """

    x: Tensor
    dy: Tensor
    padding_mask: Tensor | None = None


def make_inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    masked: float = 0.0,
) -> Inputs:
    """Draw unit-variance inputs and a random upstream gradient, the same on every device.

    Args:
        *shape: (..., T, D).
        dtype: of x and dy. The numbers are drawn in float32 and rounded.
        device: where the tensors are put.
        seed: of the random numbers.
        masked: share of steps that are padding, at random places; 0 gives no mask.

    Returns:
        Inputs.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    on_host: dict[str, Any] = {"generator": generator, "device": "cpu"}
    pair = torch.randn(2, *shape, **on_host, dtype=drawn)
    # A storage each: what a kernel reads beyond x must not be dy.
    x, dy = (tensor.to(device, dtype, copy=True) for tensor in pair)
    mask = None
    if masked:
        mask = (torch.rand(shape[:-1], **on_host) >= masked).to(device)
    return Inputs(x, dy, mask)


@contextlib.contextmanager
def forced_routing(topk_ids: Tensor | None) -> Iterator[None]:
    """Make the reference route as told; weights still come from its own probabilities.

    Rounding can turn a near tie, so two precisions are compared on the same choices.

    Args:
        topk_ids: (S, top_k) int32, -1 for a segment that is not routed. None changes nothing.
    """
    if topk_ids is None:
        yield
        return
    route = reference.route
    ids = topk_ids

    def forced(x: Tensor, router_weight: Tensor, **options: Any) -> RouterOutput:
        free = route(x, router_weight, **options)
        routed = (ids >= 0).to(free.router_probs.dtype)
        weights = free.router_probs.gather(-1, ids.long().clamp_min(0)) * routed
        renormalize = options.get("renormalize")
        if options["top_k"] > 1 if renormalize is None else renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
        return free._replace(topk_weights=weights, topk_ids=ids)

    with mock.patch.object(reference, "route", forced):
        yield


def run_layer(
    layer: SegMoE,
    x: Tensor,
    dy: Tensor,
    padding_mask: Tensor | None = None,
    *,
    topk_ids: Tensor | None = None,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run a copy of the layer forward and backward.

    Args:
        layer: left as it is.
        x: (..., T, D).
        dy: (..., T, D), upstream gradient.
        padding_mask: (..., T) bool or None.
        topk_ids: (S, top_k) int32 or None: choices that the reference backend has to take.
        backend: None keeps the layer's.
        dtype: None keeps the layer's and the inputs'; else both are converted.

    Returns:
        "y", "dx" and "d<name>" for each parameter that has a gradient.

    Raises:
        ValueError: for choices where another backend runs, which would make its own.
    """
    layer = copy.deepcopy(layer)
    layer.zero_grad()
    if backend is not None:
        layer.backend = backend
    if topk_ids is not None and resolve_backend(layer.backend, x) != "reference":
        raise ValueError(
            "segmoe_kernels.run_layer: expected topk_ids to be None unless backend='reference' "
            f"runs, got backend={layer.backend!r}."
        )
    if dtype is not None:
        layer, x, dy = layer.to(dtype), x.to(dtype), dy.to(dtype)
    x = x.detach().requires_grad_()
    with forced_routing(topk_ids):
        y = layer(x, padding_mask)
        y.backward(dy)
    results = {"y": y.detach(), "dx": x.grad}
    results.update({f"d{name}": p.grad for name, p in layer.named_parameters()})
    return {name: value for name, value in results.items() if value is not None}


def route_ids(
    layer: SegMoE,
    x: Tensor,
    dy: Tensor | None = None,  # noqa: ARG001  takes Inputs unpacked, as run_layer does
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The layer's choices for x, on its own backend.

    Args:
        layer: in eval mode, or without router dropout.
        x: see `Inputs`.
        dy: not used.
        padding_mask: see `Inputs`.

    Returns:
        (S, top_k) int32.
    """
    with torch.no_grad():
        return layer.forward_with_routing(x, padding_mask)[1].topk_ids


def oracle(
    layer: SegMoE,
    x: Tensor,
    dy: Tensor,
    padding_mask: Tensor | None = None,
    topk_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run the reference in float64 on the same rounded inputs and parameters.

    Args:
        layer: in any dtype.
        x: (..., T, D).
        dy: (..., T, D), upstream gradient.
        padding_mask: (..., T) bool or None.
        topk_ids: (S, top_k) int32 or None: the choices of the run that is judged.

    Returns:
        As `run_layer`, in float64.

    Raises:
        ValueError: if dropout would make two runs differ.
    """
    if layer.training and (layer.dropout or layer.router_dropout):
        raise ValueError(
            "segmoe_kernels.oracle: expected layer to be in eval mode or without dropout, got "
            f"dropout={layer.dropout}, router_dropout={layer.router_dropout} in training."
        )
    return run_layer(
        layer, x, dy, padding_mask, topk_ids=topk_ids, backend="reference", dtype=torch.float64
    )


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Errors of a result and of plain PyTorch in the same dtype, against float64.

    Attributes:
        rms: root mean square error.
        max: largest error.
        eager_rms: the same of plain PyTorch.
        eager_max: likewise.
        rms_limit: ``1.5 * eager_rms + eps * RMS(oracle)``.
        max_limit: ``3 * eager_max + eps * max|oracle|``.
        worst: index of the largest error.
    """

    rms: float
    max: float
    eager_rms: float
    eager_max: float
    rms_limit: float
    max_limit: float
    worst: tuple[int, ...]

    @property
    def passes(self) -> bool:
        """Whether both errors are within their limits; False for NaN and Inf, plain PyTorch's too.

        An infinite error of plain PyTorch would let any result pass.
        """
        return self.rms <= self.rms_limit < math.inf and self.max <= self.max_limit < math.inf

    def __str__(self) -> str:
        return (
            f"RMS error {self.rms:.3e} (limit {self.rms_limit:.3e}, eager {self.eager_rms:.3e}), "
            f"max error {self.max:.3e} at {self.worst} (limit {self.max_limit:.3e}, "
            f"eager {self.eager_max:.3e})"
        )


def compare(actual: Tensor, eager: Tensor, exact: Tensor) -> Accuracy:
    """Measure ``actual`` by the error of ``eager``, both against ``exact``.

    Args:
        actual: any shape.
        eager: same shape and dtype, from plain PyTorch.
        exact: same shape, float64.

    Returns:
        Accuracy.
    """
    if actual.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, ())
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).abs()
    eager_error = (eager.double() - exact).abs()
    rms, eager_rms, exact_rms = (
        t.square().mean().sqrt().item() for t in (error, eager_error, exact)
    )
    worst = torch.unravel_index(error.argmax(), error.shape)
    return Accuracy(
        rms=rms,
        max=error.max().item(),
        eager_rms=eager_rms,
        eager_max=eager_error.max().item(),
        rms_limit=RMS_FACTOR * eager_rms + eps * exact_rms,
        max_limit=MAX_FACTOR * eager_error.max().item() + eps * exact.abs().max().item(),
        worst=tuple(int(i) for i in worst),
    )


def assert_as_accurate(
    actual: Tensor | Mapping[str, Tensor],
    eager: Tensor | Mapping[str, Tensor],
    exact: Tensor | Mapping[str, Tensor],
    name: str = "result",
) -> None:
    """Require a result to be as accurate as plain PyTorch in the same dtype.

    RMS error at most ``1.5 * eager + eps * RMS(exact)``, largest error at most
    ``3 * eager + eps * max|exact|``, each tensor on its own; NaN or Inf always fails.

    Args:
        actual: a tensor, or what `run_layer` returns.
        eager: the same from plain PyTorch, in the same dtype.
        exact: the same from `oracle`.
        name: for the message, where tensors are compared.

    Raises:
        AssertionError: naming every tensor that fails, with both errors.
    """
    parts = [part if isinstance(part, Mapping) else {name: part} for part in (actual, eager, exact)]
    if not parts[0].keys() == parts[1].keys() == parts[2].keys():
        raise AssertionError(f"different results: {[sorted(part) for part in parts]}")
    failures = []
    for key, value in parts[0].items():
        plain, true = parts[1][key], parts[2][key]
        if value.shape != true.shape or plain.shape != true.shape or value.dtype != plain.dtype:
            got = [(tuple(t.shape), t.dtype) for t in (value, plain, true)]
            failures.append(f"{key}: shapes and dtypes differ: {got}")
            continue
        accuracy = compare(value, plain, true)
        if not accuracy.passes:
            failures.append(f"{key}: {accuracy}")
    if failures:
        raise AssertionError("less accurate than plain PyTorch:\n" + "\n".join(failures))
