"""Pictures of routing: load of each expert, curves of the statistics, who took which segment.

matplotlib is imported by the functions; without it they raise ImportError. Each returns a
`matplotlib.figure.Figure` of its own, which needs no display: ``figure.savefig("load.png")``.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels.routing import Routing

__all__ = ["plot_expert_load", "plot_expert_usage", "plot_segment_timeline"]

_VECTORS = ("hard_fraction", "soft_fraction", "token_counts", "prob_mass")
_SCALARS = (
    *("entropy", "entropy_norm", "dead_experts", "cv_hard", "cv_soft", "load_max_over_mean"),
    *("switch_rate", "drop_rate", "aux_loss", "z_loss", "num_tokens"),
)
_CURVES = ("entropy_norm", "cv_hard", "dead_experts", "switch_rate")


def _figure(function: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, (rows, columns); `matplotlib.pyplot` would keep it open."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "needs matplotlib: pip install segmoe-kernels[plots]"
        raise ImportError(f"segmoe_kernels.{function} {message}") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, squeeze=False)


def _check_history(function: str, history: Any) -> None:
    if not isinstance(history, Sequence) or isinstance(history, str):
        check.fail_type(function, "history", "be a sequence of entries", type(history).__name__)
    for entry in history:
        if not isinstance(entry, dict) or not {"step", "global", "layers"} <= set(entry):
            rule = "have entries of RoutingCollector, as its step_history has"
            check.fail_type(function, "history", rule, type(entry).__name__)
    if not history:
        check.fail_value(function, "history", "have at least one entry", "none")
    if len({tuple(entry["layers"]) for entry in history}) > 1:
        got = [len(entry["layers"]) for entry in history]
        check.fail_value(function, "history", "be of one model", f"entries of {got} layers")


def _positions(history: Sequence[dict[str, Any]]) -> tuple[list[int], str]:
    """Where the entries stand, and what is counted there: epochs may have no step of their own."""
    steps = [entry["step"] for entry in history]
    if all(one < other for one, other in itertools.pairwise(steps)):
        return steps, "step"
    return list(range(1, len(steps) + 1)), "entry"


def _edges(steps: list[int]) -> list[int]:
    """Where cells begin and end: an entry is of the steps before its own, as many as the next's."""
    before = steps[0] - 1
    if len(steps) > 1 and steps[0] > 0:
        before = max(0, 2 * steps[0] - steps[1])
    return [before, *steps]


def plot_expert_load(history: Sequence[dict[str, Any]], *, key: str = "hard_fraction") -> Any:
    """Draw a heat map for each layer: experts over steps.

    Args:
        history: ``step_history`` or ``epoch_history`` of a `RoutingCollector`.
        key: "hard_fraction", "soft_fraction", "token_counts" or "prob_mass".

    Returns:
        matplotlib Figure. Axes of the layers from top to bottom, then the colour bar. A fraction's
        colours run from 0 to 1.

    Raises:
        TypeError: if history is not a sequence of entries.
        ValueError: if it is empty or of several models, or for an unknown key.
    """
    name = "plot_expert_load"
    _check_history(name, history)
    check.check_choice(name, "key", key, _VECTORS)
    layers = list(history[0]["layers"])
    figure, axes = _figure(name, len(layers), 1, (8, 1 + 1.5 * len(layers)))
    loads = {i: torch.stack([entry["layers"][i][key] for entry in history]).T for i in layers}
    largest = max(load.max().item() for load in loads.values())
    steps, label = _positions(history)
    edges = _edges(steps)
    mesh = None
    for axis, (i, load) in zip(axes[:, 0], loads.items(), strict=True):
        rows = [e - 0.5 for e in range(load.shape[0] + 1)]
        top = 1.0 if "fraction" in key else largest
        mesh = axis.pcolormesh(edges, rows, load.double().numpy(), vmin=0.0, vmax=top)
        axis.set_ylabel(f"layer {i}\nexpert")
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel(label)
    figure.colorbar(mesh, ax=list(axes[:, 0]), label=key)
    return figure


def plot_expert_usage(history: Sequence[dict[str, Any]], *, keys: Sequence[str] = _CURVES) -> Any:
    """Draw statistics over steps: one picture for each, a line for each layer, one for all.

    Args:
        history: see `plot_expert_load`.
        keys: statistics that are one number, such as "entropy", "cv_soft", "aux_loss".

    Returns:
        matplotlib Figure.

    Raises:
        TypeError: as `plot_expert_load`, or if keys is no sequence of names.
    """
    name = "plot_expert_usage"
    _check_history(name, history)
    if not isinstance(keys, Sequence) or isinstance(keys, str):
        check.fail_type(name, "keys", "be a sequence of names", type(keys).__name__)
    if not keys:
        check.fail_value(name, "keys", "have at least one name", "none")
    for key in keys:
        check.check_choice(name, "keys", key, _SCALARS)
    figure, axes = _figure(name, len(keys), 1, (8, 1 + 1.8 * len(keys)))
    steps, label = _positions(history)
    for axis, key in zip(axes[:, 0], keys, strict=True):
        for i in history[0]["layers"]:
            values = [entry["layers"][i][key] for entry in history]
            axis.plot(steps, values, marker=".", label=f"layer {i}")
        values = [entry["global"][key] for entry in history]
        axis.plot(steps, values, color="black", linestyle="--", label="global")
        axis.set_ylabel(key)
    axes[-1, 0].set_xlabel(label)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_segment_timeline(
    routing: Routing,
    *,
    segment_size: int,
    num_steps: int,
    sequence: int = 0,
    series: Tensor | None = None,
) -> Any:
    """Draw which expert took which segment of a sequence, over time.

    Args:
        routing: of `SegMoE.forward_with_routing`.
        segment_size: P of the layer.
        num_steps: T of its input.
        sequence: which sequence of the batch; leading dimensions count as flattened.
        series: (T,) or (T, C), drawn above; None: nothing.

    Returns:
        matplotlib Figure. Its last but one axes (the last is the colour bar) has a cell for each
        expert and segment, with the segment's weight for the expert, or blank where it did not go.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: if sizes do not fit routing, or there is nothing to draw.
    """
    name = "plot_segment_timeline"
    each = _check_timeline(name, routing, segment_size, num_steps, sequence, series)
    rows = 1 if series is None else 2
    weights = _weights(routing, slice(sequence * each, (sequence + 1) * each))
    figure, axes = _figure(name, rows, 1, (9, 2.5 * rows))
    if series is not None:
        # Each step in the middle of its time, as a segment's cell ends where the next begins.
        times = [t + 0.5 for t in range(num_steps)]
        axes[0, 0].plot(times, series.detach().double().cpu().numpy())
        axes[0, 0].set_ylabel("series")
    axis = axes[-1, 0]
    edges = [*range(0, num_steps, segment_size), num_steps]
    experts = [e - 0.5 for e in range(weights.shape[0] + 1)]
    top = max(1.0, weights.nan_to_num().max().item())
    mesh = axis.pcolormesh(edges, experts, weights.numpy(), vmin=0.0, vmax=top)
    axis.set(xlabel="step", ylabel="expert", xlim=(0, num_steps))
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(mesh, ax=list(axes[:, 0]), label="weight")
    return figure


def _check_timeline(
    name: str, routing: Any, segment_size: int, num_steps: int, sequence: int, series: Any
) -> int:
    """Refuse what does not fit the routing; segments of one sequence."""
    check.check_type(name, "routing", routing, Routing, "be a Routing")
    check.check_integer(name, "segment_size", segment_size, 1)
    check.check_integer(name, "num_steps", num_steps, 1)
    check.check_integer(name, "sequence", sequence, 0)
    segments, each = routing.topk_ids.shape[0], -(-num_steps // segment_size)
    if segments % each or routing.router_probs.shape[1] == 0:
        rule = f"be of experts and sequences of {each} segments, as sizes have it"
        got = f"{segments} segments, {routing.router_probs.shape[1]} experts"
        check.fail_value(name, "routing", rule, got)
    if sequence >= segments // each:
        check.fail_value(name, "sequence", f"be below {segments // each}, as in routing", sequence)
    if series is not None:
        check.check_tensor(name, "series", series)
        if series.ndim not in {1, 2} or series.shape[0] != num_steps:
            rule = f"have shape (T={num_steps},) or (T={num_steps}, C)"
            check.fail_value(name, "series", rule, tuple(series.shape))
    return each


def _weights(routing: Routing, rows: slice) -> Tensor:
    """(E, J) float64: the weight of each expert in each segment, NaN where it was not chosen."""
    ids, weights = routing.topk_ids[rows].long(), routing.topk_weights[rows].detach().double()
    # One row more for what was not routed.
    shape = ids.shape[0], routing.router_probs.shape[1] + 1
    ids, weights = ids.cpu(), weights.cpu()
    out = weights.new_full(shape, float("nan"))
    out.scatter_(1, ids.masked_fill(ids < 0, shape[1] - 1), weights)
    return out[:, :-1].T
