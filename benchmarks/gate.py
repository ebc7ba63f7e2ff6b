"""Nothing is timed that does not compute the layer: outputs and every gradient against float64.

The criterion is that of `segmoe_kernels.testing`: a result may err 1.5 times (RMS) and 3 times
(largest error) as much as plain PyTorch in the same dtype, on the same choices of experts. This
package has to keep it. A peer gets four times these limits: one that rounds an intermediate more
often than the yardstick is still worth timing, one that computes something else is not.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_modules import LoopExperts
from benchmarks.peers import Provider
from segmoe_kernels import SegMoE
from segmoe_kernels.testing import Accuracy, Inputs, compare, oracle, run_layer

PEER_ALLOWANCE = 4.0
# Rows that the float64 oracle takes at once: its hidden layers have to fit beside everything else.
ORACLE_ROWS = 65536


class RefusedError(Exception):
    """A result is wrong; the message names it."""


@dataclass(frozen=True)
class Verdict:
    """How far the worst result is from its limit.

    Attributes:
        error_over_limit: at most 1 keeps the criterion.
        worst: the result it belongs to.
    """

    error_over_limit: float
    worst: str


def run_provider(provider: Provider, inputs: Inputs) -> dict[str, Tensor]:
    """Forward with and without gradients, and backward.

    Args:
        provider: what to run.
        inputs: x and dy.

    Returns:
        "y", "y_no_grad", "dx" and "d<name>" under the names of `SegMoE`; an expert without a
        segment may have no gradient, which counts as zeros.
    """
    x = inputs.x.detach().requires_grad_()
    named = dict(provider.module.named_parameters())
    with torch.no_grad():
        y_no_grad = provider.call(inputs.x)
    y = provider.call(x)
    found = torch.autograd.grad(y, (x, *named.values()), inputs.dy, allow_unused=True)
    dx, *gradients = (
        torch.zeros_like(of) if gradient is None else gradient
        for gradient, of in zip(found, (x, *named.values()), strict=True)
    )
    renamed = provider.layer_gradients(dict(zip(named, gradients, strict=True)))
    results = {"y": y.detach(), "y_no_grad": y_no_grad, "dx": dx}
    return results | {f"d{name}": gradient for name, gradient in renamed.items()}


class Gate:
    """Judges providers of one layer on one input.

    Args:
        layer: the layer, whose parameters all providers have.
        inputs: x and dy.
    """

    def __init__(self, layer: SegMoE, inputs: Inputs) -> None:
        self._layer, self._inputs = layer, inputs
        self._kept: dict[str, Any] = {}

    def check(self, provider: Provider) -> Verdict:
        """Run a provider and judge it.

        Args:
            provider: of the same layer.

        Returns:
            The verdict of one that passes.

        Raises:
            RefusedError: if a result is missing or too far from float64.
        """
        ids = provider.route_ids(self._inputs.x)
        yardstick = self._yardstick(provider.yardstick, ids)
        exact = self._exact(ids)
        worst = judge(run_provider(provider, self._inputs), yardstick, exact)
        require(worst, ours=provider.ours)
        return worst

    def forget(self) -> None:
        """Free what is kept between checks."""
        self._kept.clear()

    def _yardstick(self, kind: str, ids: Tensor) -> dict[str, Tensor]:
        if not self._same_ids(f"ids of {kind}", ids):
            if kind == "reference":
                results = run_layer(self._layer, *self._inputs, topk_ids=ids, backend="reference")
            else:
                results = _run_loop(self._layer, self._inputs, ids)
            self._kept[kind] = results | {"y_no_grad": results["y"]}
        return self._kept[kind]

    def _exact(self, ids: Tensor) -> dict[str, Tensor]:
        if not self._same_ids("ids of exact", ids):
            self._kept.pop("exact", None)
            results = _oracle_by_parts(self._layer, self._inputs, ids)
            self._kept["exact"] = results | {"y_no_grad": results["y"]}
        return self._kept["exact"]

    def _same_ids(self, key: str, ids: Tensor) -> bool:
        kept = self._kept.get(key)
        self._kept[key] = ids
        return kept is not None and torch.equal(kept, ids)


def error_over_limit(accuracy: Accuracy) -> float:
    """The larger of RMS and maximal error, each over its limit; NaN where one is."""
    ratios = (_ratio(accuracy.rms, accuracy.rms_limit), _ratio(accuracy.max, accuracy.max_limit))
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)


def require(worst: Verdict, *, ours: bool) -> None:
    """Refuse what is farther from float64 than it may be.

    Args:
        worst: the verdict on the worst result.
        ours: this package, which gets no allowance.

    Raises:
        RefusedError: naming the result.
    """
    allowed = 1.0 if ours else PEER_ALLOWANCE
    if not worst.error_over_limit <= allowed:
        raise RefusedError(
            f"{worst.worst} errs {worst.error_over_limit:.3g} times the limit, allowed are "
            f"{allowed:g}"
        )


def judge(results: dict[str, Tensor], yardstick: dict[str, Tensor], exact: Any) -> Verdict:
    """Compare all results; the worst makes the verdict.

    Args:
        results: by name.
        yardstick: the same from plain PyTorch in the same dtype.
        exact: the same in float64.

    Returns:
        The verdict, which may fail.

    Raises:
        RefusedError: if a result is missing, or has another shape or dtype.
    """
    missing = exact.keys() ^ results.keys()
    if missing:
        raise RefusedError(f"results that only one of the two has: {sorted(missing)}")
    worst = Verdict(0.0, "")
    for name, value in results.items():
        if value.shape != exact[name].shape or value.dtype != yardstick[name].dtype:
            got = (tuple(value.shape), value.dtype)
            raise RefusedError(f"{name} must have the layer's shape and dtype, got {got}")
        ratio = error_over_limit(compare(value, yardstick[name], exact[name]))
        if not ratio <= worst.error_over_limit:  # a NaN is the worst of all
            worst = Verdict(ratio, name)
        if math.isnan(ratio):
            break
    return worst


def _ratio(error: float, limit: float) -> float:
    # Both are 0 where a gradient is exactly 0 on all sides.
    return error / limit if limit else (0.0 if error == 0 else float("inf"))


def _run_loop(layer: SegMoE, inputs: Inputs, ids: Tensor) -> dict[str, Tensor]:
    loop = LoopExperts(layer)
    loop.forced_ids = ids
    provider = Provider("loop", loop, loop, lambda _: ids, loop.layer_gradients)
    results = run_provider(provider, inputs)
    results.pop("y_no_grad")
    return results


def _oracle_by_parts(layer: SegMoE, inputs: Inputs, ids: Tensor) -> dict[str, Tensor]:
    """`oracle` on some sequences at a time; gradients of parameters are summed in float64."""
    batch, length, _ = inputs.x.shape
    segments = ids.shape[0] // batch
    step = max(1, ORACLE_ROWS // (length * layer.top_k))
    total: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {"y": [], "dx": []}
    for start in range(0, batch, step):
        stop = min(batch, start + step)
        part = Inputs(inputs.x[start:stop], inputs.dy[start:stop])
        some = ids[start * segments : stop * segments]
        results = oracle(layer, *part, topk_ids=some)
        for name, pieces in parts.items():
            pieces.append(results.pop(name))
        for name, gradient in results.items():
            total[name] = total[name] + gradient if name in total else gradient
    return {name: torch.cat(pieces) for name, pieces in parts.items()} | total
