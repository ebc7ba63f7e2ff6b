"""What the router did, in numbers: `ExpertUsage` of one layer, `RoutingStats` of a model.

A *tally* is the sum of all that these numbers are made of, so that calls, steps, epochs, layers
and ranks are pooled by adding tallies: ``(2 * E + 4,)``, the choices of each expert, the
probability mass of each expert, then entropy, routed segments, switches and neighbours.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels.routing import Routing

__all__ = ["ExpertUsage", "RoutingStats", "collect_routing_stats"]

# Those of the official code: they keep logarithms and quotients finite.
_SMALL = 1e-12
_SCALARS = 4


@dataclass(frozen=True)
class ExpertUsage:
    """How one layer, or a whole model, used its experts.

    The unit is the routed *segment*, also where an official name says "token". Segments without a
    real step count nowhere. Where no segment was routed every number is 0, and all experts are
    dead. A history has a leading dimension N (steps or epochs) in every tensor.

    Worked example, ``E = 3``, ``top_k = 1``, two segments of one sequence::

        router_probs  = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]      topk_ids = [[0], [1]]
        hard_fraction = [0.5, 0.5, 0]    soft_fraction = [0.4, 0.5, 0.1]    token_counts = [1, 1, 0]
        prob_mass     = [0.8, 1.0, 0.2]  dead_experts = 1    num_tokens = 2    switch rate = 1

    Attributes:
        hard_fraction: (E,) float64. Share of the choices that fell on each expert.
        soft_fraction: (E,) float64. Share of each expert in the probability mass.
        token_counts: (E,) int64. Choices of each expert (``num_tokens * top_k`` in all).
        prob_mass: (E,) float64. Sum of the probabilities, after router dropout.
        entropy: () float64, nats. Mean over segments of ``-sum_e p_e log p_e``; after router
            dropout the probabilities don't sum to 1, so read it in eval or without that dropout.
        entropy_norm: () float64. Entropy over ``log E``: 1 is uniform, 0 is certain (or E = 1).
        dead_experts: () int64. Experts that nobody chose.
        cv_hard: () float64. Standard deviation over mean of hard_fraction (over the E experts).
        cv_soft: () float64. Likewise of soft_fraction.
        load_max_over_mean: () float64. Choices of the busiest expert over the mean; 1 is balanced.
        segment_switch_rate: () float64, share of the neighbouring segments of a sequence whose
            first choice differs, both being routed; None where the sequences are not known.
        drop_rate: () float64, always 0: no segment is ever dropped. For dashboards that ask.
        num_tokens: () int64. Routed segments.

    Source: names and formulas of evortigosa/segmoe_forecast, utils/LoadBalancingLoss.py
    (``compute_metrics``); entropy_norm, load_max_over_mean, segment_switch_rate and drop_rate are
    ours.
    """

    hard_fraction: Tensor
    soft_fraction: Tensor
    token_counts: Tensor
    prob_mass: Tensor
    entropy: Tensor
    entropy_norm: Tensor
    dead_experts: Tensor
    cv_hard: Tensor
    cv_soft: Tensor
    load_max_over_mean: Tensor
    segment_switch_rate: Tensor | None
    drop_rate: Tensor
    num_tokens: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class RoutingStats:
    """Expert usage of a model: of all layers together, and of each.

    Attributes:
        overall: the segments of all layers with experts pooled, experts by their index (official).
        layers: of each layer, in order.
    """

    overall: ExpertUsage
    layers: tuple[ExpertUsage, ...]

    def cpu(self) -> "RoutingStats":
        """The same in host memory, by one copy: the one place where the host waits."""
        usages = [self.overall, *self.layers]
        tensors = [tensor for usage in usages for tensor in usage.tensors().values()]
        device, wide = self.overall.entropy.device, self.overall.entropy.dtype
        flat = torch.cat([tensor.to(device, wide).reshape(-1) for tensor in tensors]).cpu()
        pieces = iter(flat.split([tensor.numel() for tensor in tensors]))
        on_host = [
            dataclasses.replace(
                usage,
                **{
                    name: next(pieces).view(tensor.shape).to(tensor.dtype)
                    for name, tensor in usage.tensors().items()
                },
            )
            for usage in usages
        ]
        return RoutingStats(on_host[0], tuple(on_host[1:]))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, under the official names; the host waits once.

        Returns:
            ``{"global": {"entropy": 1.2, "hard_fraction": [...], ...}, "layers": {0: {...}, ...}}``,
            without segment_switch_rate where it is not known.
        """
        host = self.cpu()
        numbers = [
            {name: tensor.tolist() for name, tensor in usage.tensors().items()}
            for usage in (host.overall, *host.layers)
        ]
        return {"global": numbers[0], "layers": dict(enumerate(numbers[1:]))}

    def scalars(self, prefix: str = "moe", *, per_expert: bool = False) -> dict[str, float]:
        """One number for each name, for loggers and `stats_writers`; the host waits once.

        Args:
            prefix: in front of every name.
            per_expert: with what each expert has, as ``moe/layer_0/hard_fraction/expert_3``.

        Returns:
            ``{"moe/global/cv_hard": 0.3, ..., "moe/layer_0/cv_hard": 0.2, ...}``.

        Raises:
            TypeError: if prefix is not a string, or per_expert no bool.
            ValueError: for a history, which has many numbers for each name.
        """
        function = "RoutingStats.scalars"
        if not isinstance(prefix, str):
            check.fail_type(function, "prefix", "be a str", type(prefix).__name__)
        check.check_flag(function, "per_expert", per_expert)
        if self.overall.entropy.ndim:
            rule = "be one moment's (to_dict() takes a history)"
            check.fail_value(function, "stats", rule, f"{len(self.overall.entropy)} moments")
        numbers = self.to_dict()
        places = {"global": numbers["global"]}
        places |= {f"layer_{i}": usage for i, usage in numbers["layers"].items()}
        result: dict[str, float] = {}
        for place, usage in places.items():
            for name, value in usage.items():
                key = f"{prefix}/{place}/{name}"
                if not isinstance(value, list):
                    result[key] = value
                elif per_expert:
                    result |= {f"{key}/expert_{e}": each for e, each in enumerate(value)}
        return result


def collect_routing_stats(
    routings: Routing | Sequence[Routing],
    *,
    segments_per_sequence: int | Sequence[int] | None = None,
) -> RoutingStats:
    """Say how experts were used, overall and in each layer; `ExpertUsage` explains the numbers.

    Results stay on the device and carry no gradient, and the host waits for nothing before
    ``to_dict()``, ``scalars()`` or ``cpu()``.

    Args:
        routings: of one layer, or of several with the same number of experts. A layer without
            experts (E = 0) counts only as its own, empty, entry.
        segments_per_sequence: J, ``ceil(T / segment_size)``: of all layers, or of each. None: not
            known, and segment_switch_rate is None.

    Returns:
        RoutingStats.

    Raises:
        TypeError: if routings are not Routing objects, or segments_per_sequence not integers.
        ValueError: for layers with different numbers of experts, or segments that don't fill
            sequences.
    """
    name = "collect_routing_stats"
    layers = check_routings(name, routings)
    lengths = check_lengths(name, layers, segments_per_sequence)
    tallies = [tally(layer, length) for layer, length in zip(layers, lengths, strict=True)]
    experts = [layer.router_probs.shape[1] for layer in layers]
    return stats_of(tallies, experts, sequences_known=segments_per_sequence is not None)


def check_routings(function: str, routings: Any) -> list[Routing]:
    """Refuse what is not a Routing, or several with one number of experts."""
    several = [routings] if isinstance(routings, Routing) else routings
    rule = "be a Routing or a sequence of at least one"
    if not isinstance(several, Sequence):
        check.fail_type(function, "routings", rule, type(routings).__name__)
    kinds = [type(layer).__name__ for layer in several]
    if not several or not all(isinstance(layer, Routing) for layer in several):
        check.fail_type(function, "routings", rule, kinds)
    check_experts(function, "routings", [layer.router_probs.shape[1] for layer in several])
    return list(several)


def check_experts(function: str, argument: str, experts: Sequence[int]) -> None:
    """Refuse layers whose experts can't be pooled by index."""
    if len(sizes := {size for size in experts if size}) > 1:
        check.fail_value(function, argument, "have one number of experts", sorted(sizes))


def check_lengths(
    function: str, layers: Sequence[Routing], lengths: Any
) -> list[int] | list[None] | list[int | None]:
    """Refuse numbers of segments that sequences of these layers can't have."""
    argument = "segments_per_sequence"
    if lengths is None:
        return [None] * len(layers)
    if isinstance(lengths, str) or not isinstance(lengths, Sequence):
        lengths = [lengths] * len(layers)
    if len(lengths) != len(layers):
        rule = f"be an int or have one for each of {len(layers)} layers"
        check.fail_value(function, argument, rule, list(lengths))
    for layer, length in zip(layers, lengths, strict=True):
        check.check_integer(function, argument, length, 1)
        if layer.topk_ids.shape[0] % length:
            rule = f"divide the number of segments ({layer.topk_ids.shape[0]})"
            check.fail_value(function, argument, rule, length)
    return list(lengths)


def wide_dtype(device: torch.device) -> torch.dtype:
    """What tallies are summed in: float64 counts to 2**53; Apple's GPUs don't have it."""
    return torch.float32 if device.type == "mps" else torch.float64


def tally(routing: Routing, segments_per_sequence: int | None) -> Tensor:
    """Sum up one call of a layer: (2 * E + 4,), on its device; see the head of this file."""
    probs = routing.router_probs.detach()
    wide = wide_dtype(probs.device)
    if probs.shape[1] == 0:
        return probs.new_zeros(_SCALARS, dtype=wide)
    first = routing.topk_ids[:, 0]
    routed = first >= 0
    probs = torch.where(routed[:, None], probs, 0)
    entropy = -(probs * probs.clamp_min(_SMALL).log()).sum(dtype=wide)
    switches = neighbours = torch.zeros_like(entropy)
    if segments_per_sequence is not None:
        # A batch of empty sequences has no segment, and no width to be cut by.
        rows = first.view(-1, max(segments_per_sequence, 1))
        before, after = rows[:, :-1], rows[:, 1:]
        both = (before >= 0) & (after >= 0)
        neighbours, switches = both.sum(), (both & (before != after)).sum()
    scalars = [entropy, routed.sum(), switches, neighbours]
    counts, mass = routing.expert_counts.to(wide), probs.sum(0, dtype=wide)
    return torch.cat([counts, mass, torch.stack([scalar.to(wide) for scalar in scalars])])


def stats_of(
    tallies: Sequence[Tensor], experts: Sequence[int], *, sequences_known: bool
) -> RoutingStats:
    """Make statistics of a tally (..., 2 * E + 4) for each layer."""
    with_experts = [t for t, size in zip(tallies, experts, strict=True) if size] or tallies[:1]
    device = with_experts[0].device
    pooled = torch.stack([t.to(device, non_blocking=True) for t in with_experts]).sum(0)
    usages = [_usage(t, sequences_known=sequences_known) for t in (pooled, *tallies)]
    return RoutingStats(usages[0], tuple(usages[1:]))


def _usage(tallied: Tensor, *, sequences_known: bool) -> ExpertUsage:
    size = (tallied.shape[-1] - _SCALARS) // 2
    counts, mass, scalars = tallied.split([size, size, _SCALARS], dim=-1)
    entropy_sum, segments, switches, neighbours = scalars.unbind(-1)
    number = counts.sum(-1)
    hard = counts / number.clamp_min(1)[..., None]
    soft = mass / mass.sum(-1, keepdim=True).clamp_min(_SMALL)
    entropy = entropy_sum / segments.clamp_min(1)
    # A zero more, for the maximum over no experts.
    busiest = torch.nn.functional.pad(counts, (0, 1)).amax(-1)
    return ExpertUsage(
        hard_fraction=hard,
        soft_fraction=soft,
        token_counts=counts.long(),
        prob_mass=mass,
        entropy=entropy,
        entropy_norm=entropy / math.log(size) if size > 1 else torch.zeros_like(entropy),
        dead_experts=(counts == 0).sum(-1),
        cv_hard=_variation(hard),
        cv_soft=_variation(soft),
        load_max_over_mean=busiest * size / number.clamp_min(1),
        segment_switch_rate=switches / neighbours.clamp_min(1) if sequences_known else None,
        drop_rate=torch.zeros_like(entropy),
        num_tokens=segments.long(),
    )


def _variation(share: Tensor) -> Tensor:
    """Standard deviation over mean along the last dimension; 0 for none."""
    number = max(share.shape[-1], 1)
    mean = share.sum(-1) / number
    variance = (share - mean[..., None]).square().sum(-1) / number
    return variance.sqrt() / mean.clamp_min(_SMALL)
