"""Routing statistics of a model's layers: counted on the device, read when asked.

::

    with collect_routing_stats(model, every=100) as stats:
        for x, target in batches:
            train_step(model, x, target)
            entry = stats.end_step()        # None but every 100th step, which alone waits
        stats.end_epoch()
    plot_expert_load(stats.step_history)    # `plots`; CSVWriter and others in `writers`

`collect_routings` hands out the routing itself, for losses of the whole model.
"""

import copy
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.routing import Routing

__all__ = ["RoutingCollector", "collect_routing_stats", "collect_routings"]

# Behind two sums for each expert (choices, probability): of all segments and calls of a layer.
_SCALARS = ("entropy", "segments", "switches", "pairs", "aux_loss", "z_loss", "calls")
# What the official code divides by, and takes the logarithm of, at least.
_TINY = 1e-12
_STATE = ("num_experts", "step", "epoch", "totals", "sums", "step_history", "epoch_history")


def measure(
    routing: Routing, segments_per_sequence: int, aux_weight: float, z_weight: float
) -> Tensor:
    """Sums over the segments of one call; no value is looked at, so nothing waits for a GPU.

    (2 * E + 7,) float64: choices of each expert, probability of each, ``_SCALARS``. Segments of one
    sequence are neighbours in routing.
    """
    probs = routing.router_probs.double()
    counts = routing.expert_counts.double()
    first = routing.topk_ids[:, 0]
    routed = first >= 0
    number = routed.sum().double()
    mass = probs.sum(0)
    entropy = -(probs * probs.clamp_min(_TINY).log()).sum()
    sequences = first.shape[0] // max(segments_per_sequence, 1)
    rows = first.reshape(sequences, segments_per_sequence)
    pairs = (rows[:, 1:] >= 0) & (rows[:, :-1] >= 0)
    switches = pairs & (rows[:, 1:] != rows[:, :-1])
    aux = z = torch.zeros_like(number)
    if aux_weight:
        balance = (counts * mass).sum() / (counts.sum() * number).clamp_min(1)
        aux = aux_weight * counts.shape[0] * balance
    if z_weight:
        logs = routing.router_logits.double().logsumexp(-1).square()
        z = z_weight * torch.where(routed, logs, 0).sum() / number.clamp_min(1)
    scalars = [entropy, number, switches.sum().double(), pairs.sum().double(), aux, z]
    return torch.cat([counts, mass, torch.stack([*scalars, (number > 0).double()])])


# Opaque to torch.compile, so that a graph holds it whole and asks anew in each pass.
@torch.library.custom_op("segmoe_kernels::count_routing", mutates_args=("sums",))
def _count_routing(
    sums: Tensor,
    router_logits: Tensor,
    router_probs: Tensor,
    topk_ids: Tensor,
    expert_counts: Tensor,
    segments_per_sequence: int,
    aux_weight: float,
    z_weight: float,
) -> None:
    # Inside a backward pass, a forward pass is activation checkpointing's second one.
    if torch._C._current_graph_task_id() == -1:
        routing = Routing(router_logits, router_probs, topk_ids, topk_ids, expert_counts)
        sums.add_(measure(routing, segments_per_sequence, aux_weight, z_weight))


@_count_routing.register_fake
def _(*_: Any) -> None:
    return


class _LayerCounter:
    """The sums of one layer since they were read, and who adds to them."""

    def __init__(self, layer: SegMoE) -> None:
        self.layer, self.num_experts = layer, layer.num_experts
        self.sums = self.zeros(next(layer.parameters()).device)
        layer._observers = (*layer._observers, self)

    def zeros(self, device: torch.device | str = "cpu") -> Tensor:
        # An inference tensor could not be added to later.
        with torch.inference_mode(False):
            length = 2 * self.num_experts + len(_SCALARS)
            return torch.zeros(length, dtype=torch.float64, device=device)

    def __call__(self, layer: SegMoE, routing: Routing, segments_per_sequence: int) -> None:
        _refuse_replica("collect_routing_stats", layer)
        device = routing.router_probs.device
        if device != self.sums.device:
            # The layer moved.
            before, self.sums = self.sums, self.zeros(device)
            if before.device.type != "meta":
                self.sums.copy_(before)
        fields = ("router_logits", "router_probs", "topk_ids", "expert_counts")
        tensors = [getattr(routing, field).detach() for field in fields]
        sizes = segments_per_sequence, float(layer.aux_loss_weight), float(layer.z_loss_weight)
        _count_routing(self.sums, *tensors, *sizes)


def _summarise(sums: list[Tensor], num_experts: list[int]) -> dict[str, Any]:
    """The statistics of layers taken together, from each one's sums on the host."""
    most = max(num_experts)
    counts, mass = sums[0].new_zeros(2, most)
    total = dict.fromkeys(_SCALARS, 0.0)
    entropy_norm = 0.0
    for values, count in zip(sums, num_experts, strict=True):
        counts[:count] += values[:count]
        mass[:count] += values[count : 2 * count]
        own = dict(zip(_SCALARS, values[2 * count :].tolist(), strict=True))
        for name in ("aux_loss", "z_loss"):
            own[name] /= max(own["calls"], 1.0)
        total = {name: total[name] + value for name, value in own.items()}
        entropy_norm += own["entropy"] / math.log(count) if count > 1 else 0.0
    segments = max(total["segments"], 1.0)
    hard = counts / counts.sum().clamp_min(1.0)
    soft = mass / mass.sum().clamp_min(_TINY)

    def variation(fraction: Tensor) -> float:
        return (fraction.std(unbiased=False) / fraction.mean().clamp_min(_TINY)).item()

    return {
        "hard_fraction": hard,
        "soft_fraction": soft,
        "token_counts": counts.long(),
        "prob_mass": mass,
        "entropy": total["entropy"] / segments,
        "entropy_norm": entropy_norm / segments,
        "dead_experts": int((counts == 0).sum()),
        "cv_hard": variation(hard),
        "cv_soft": variation(soft),
        "load_max_over_mean": (hard.max() * most).item(),
        "switch_rate": total["switches"] / max(total["pairs"], 1.0),
        "drop_rate": 0.0,
        "aux_loss": total["aux_loss"],
        "z_loss": total["z_loss"],
        "num_tokens": int(total["segments"]),
    }


class RoutingCollector(AbstractContextManager["RoutingCollector"]):
    """Counts what a model's `SegMoE` layers decide; `collect_routing_stats` makes one.

    What is counted is *segments*, whatever the words of the official tracker, whose keys are kept:
    with ``N`` routed segments, ``c_e`` choices of expert e and ``p_se`` the probability of e in
    segment s (after router dropout, as the losses see it):

    | key | value |
    |---|---|
    | ``token_counts`` | (E,) int64: ``c_e``; sums to ``N * top_k`` |
    | ``hard_fraction`` | (E,) float64: ``c_e / sum_e c_e`` |
    | ``prob_mass`` | (E,) float64: ``m_e = sum_s p_se`` |
    | ``soft_fraction`` | (E,) float64: ``m_e / sum_e m_e`` |
    | ``entropy`` | ``-sum_s sum_e p_se log p_se / N``, natural logarithm |
    | ``entropy_norm`` | entropy by ``log E``: 1 where all are equally likely (0 at ``E = 1``) |
    | ``dead_experts`` | how many have ``c_e = 0`` |
    | ``cv_hard`` | standard deviation of hard_fraction over its mean (of E, not E - 1) |
    | ``cv_soft`` | likewise of soft_fraction |
    | ``load_max_over_mean`` | ``max_e c_e / mean_e c_e``; minus 1 it is MaxVio |
    | ``switch_rate`` | pairs next to each other whose first choices differ, of all such pairs |
    | ``drop_rate`` | 0: nothing is dropped |
    | ``aux_loss`` | weighted load-balancing loss, the mean over calls, in evaluation too |
    | ``z_loss`` | likewise the router z-loss; 0 where the layer has no weight for it |
    | ``num_tokens`` | ``N`` |

    Pairs are of routed segments of one sequence. Segments without a real step count in nothing.
    Where nothing was routed, everything is 0 but ``dead_experts``. An entry has these for each
    layer and for all together::

        {"step": 200, "epoch": 0, "global": {"entropy": 1.2, ...}, "layers": {0: {...}, 1: {...}}}

    "global" pools the segments of all layers, experts by their index, as the official code does;
    its losses are the layers' added up. An entry of several steps pools their segments likewise
    (the official tracker's epochs are means over steps).

    A forward pass inside a backward pass is activation checkpointing's second one and is not
    counted, reentrant or not. Under ``torch.compile`` counting is one operator in the graph.
    Layers that are put into the model later are not seen; a layer's copies and pickles are free of
    the collector, also those that `shard_experts` makes, so shard first. Copies that
    ``torch.nn.DataParallel`` calls, in threads, are refused.

    Attributes:
        layer_names: the layers' names in the model, in the order of their numbers.
        step_history: entries of `end_step`.
        epoch_history: entries of `end_epoch`.

    Source: utils/LoadBalancingLoss.py (``compute_metrics``) and utils/ExpertUsageTracker.py of
    evortigosa/segmoe_forecast; MaxVio: arXiv 2408.15664.
    """

    def __init__(
        self, layers: Mapping[str, SegMoE], every: int, all_reduce: bool, group: Any
    ) -> None:
        self.layer_names = list(layers)
        self._counters = [_LayerCounter(layer) for layer in layers.values()]
        self._num_experts = [counter.num_experts for counter in self._counters]
        self._every, self._all_reduce, self._group = every, all_reduce, group
        self._step = self._epoch = 0
        self._totals = [counter.zeros() for counter in self._counters]
        self.step_history: list[dict[str, Any]] = []
        self.epoch_history: list[dict[str, Any]] = []

    def compute(self) -> dict[str, Any]:
        """Read the statistics of the epoch so far. Waits for the device."""
        sums = zip(self._totals, self._read(), strict=True)
        return self._entry([total + new for total, new in sums])

    def end_step(self) -> dict[str, Any] | None:
        """End a step, which may be several calls of the model.

        Every ``every``-th time the statistics since the last one, or since `end_epoch` if that was
        later, are returned and added to ``step_history``; else None, and nothing waits.
        """
        self._step += 1
        if self._step % self._every:
            return None
        entry = self._entry(self._take())
        self.step_history.append(entry)
        return entry

    def end_epoch(self) -> dict[str, Any]:
        """End an epoch; return its statistics, also in ``epoch_history``. The next starts at 0."""
        self._take()
        entry = self._entry(self._totals)
        self.epoch_history.append(entry)
        self._epoch += 1
        self._totals = [counter.zeros() for counter in self._counters]
        return entry

    def reset(self) -> None:
        """Forget what was counted since the last `end_epoch`; histories stay."""
        self._totals = [counter.zeros() for counter in self._counters]
        for counter in self._counters:
            counter.sums.zero_()

    def close(self) -> None:
        """Stop counting; what was counted can still be read."""
        for counter in self._counters:
            _stop_observing(counter.layer, counter)

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Counters and histories, of tensors and numbers only, for a checkpoint (of this rank)."""
        values = [self._num_experts, self._step, self._epoch, self._totals]
        values += [self._read(merge=False), self.step_history, self.epoch_history]
        return copy.deepcopy(dict(zip(_STATE, values, strict=True)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: of a collector of as many layers with as many experts.

        Raises:
            TypeError: if state is not a dict, or its sums are no list.
            ValueError: if it is not of such a collector. The collector is then as it was.
        """
        name = "RoutingCollector.load_state_dict"
        check.check_type(name, "state", state, dict, "be a dict")
        if set(state) != set(_STATE):
            check.fail_value(name, "state", f"have the keys {list(_STATE)}", list(state))
        if state["num_experts"] != self._num_experts:
            rule = f"be of layers with {self._num_experts} experts"
            check.fail_value(name, "state", rule, state["num_experts"])
        # All of it before the first assignment.
        shapes = [tuple(counter.sums.shape) for counter in self._counters]
        for key in ("totals", "sums"):
            kept = state[key]
            check.check_type(name, f"state[{key!r}]", kept, list, "be a list")
            found = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in kept]
            if found != shapes:
                rule = f"have tensors of shapes {shapes}"
                check.fail_value(name, f"state[{key!r}]", rule, found)
        state = copy.deepcopy(state)
        self._step, self._epoch = state["step"], state["epoch"]
        self._totals = state["totals"]
        self.step_history, self.epoch_history = state["step_history"], state["epoch_history"]
        for counter, sums in zip(self._counters, state["sums"], strict=True):
            counter.sums.copy_(sums)

    def _read(self, *, merge: bool = True) -> list[Tensor]:
        """Each layer's sums on the host, in one copy; of all ranks where they are merged."""
        device = self._counters[0].sums.device
        flat = torch.cat([counter.sums.to(device) for counter in self._counters])
        if merge and self._all_reduce:
            dist.all_reduce(flat, group=self._group)
        return list(flat.cpu().split([len(total) for total in self._totals]))

    def _take(self) -> list[Tensor]:
        """Read the sums, add them to the epoch's and start them from 0."""
        sums = self._read()
        self._totals = [total + new for total, new in zip(self._totals, sums, strict=True)]
        for counter in self._counters:
            counter.sums.zero_()
        return sums

    def _entry(self, sums: list[Tensor]) -> dict[str, Any]:
        each = zip(sums, self._num_experts, strict=True)
        return {
            "step": self._step,
            "epoch": self._epoch,
            "global": _summarise(sums, self._num_experts),
            "layers": {i: _summarise([own], [count]) for i, (own, count) in enumerate(each)},
        }


def _layers_with_experts(function: str, model: Any) -> dict[str, SegMoE]:
    check.check_module(function, "model", model)
    named = model.named_modules()
    layers = {name: m for name, m in named if isinstance(m, SegMoE) and m.num_experts}
    if not layers:
        rule = "have a SegMoE with experts inside"
        check.fail_value(function, "model", rule, type(model).__name__)
    return layers


def _stop_observing(layer: SegMoE, observer: Any) -> None:
    others = tuple(seen for seen in layer._observers if seen is not observer)
    layer.__dict__.pop("_observers", None)
    if others:
        layer._observers = others


def _refuse_replica(function: str, layer: SegMoE) -> None:
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            f"segmoe_kernels.{function}: torch.nn.DataParallel calls copies of the layers in "
            "threads. Use DistributedDataParallel, or collect inside the module."
        )


def collect_routings(model: nn.Module) -> AbstractContextManager[list[Routing]]:
    """Get the routing of every call of a model's `SegMoE` layers, with its graph.

    The official load-balancing loss pools the routing of all layers into one loss; no layer sees
    that alone. A training step with it::

        with collect_routings(model) as routings:
            y = model(x)
        loss = task_loss(y) + 0.02 * load_balancing_loss(routings)
        loss.backward()

    Layers then keep an ``aux_loss_weight`` of 0. The second forward pass of activation
    checkpointing, inside backward, adds nothing; nor does a call by another thread.

    Args:
        model: with `SegMoE` layers inside, plain, sharded, in adapters or wrapped, or one of them.

    Returns:
        A context manager that gives a list, which grows by a Routing with each call of a layer
        with experts. Afterwards no layer refers to it.

    Raises:
        TypeError: if model is not a module.
        ValueError: if it has no layer with experts.
        RuntimeError: from a layer in training that is called with gradients switched off, though
            they were on where the collection began: what it decides would have no graph, as under
            ``checkpoint(..., use_reentrant=True)``. From copies that ``torch.nn.DataParallel``
            calls.
    """
    return _collecting(_layers_with_experts("collect_routings", model).values())


@contextmanager
def _collecting(layers: Iterable[SegMoE]) -> Iterator[list[Routing]]:
    routings: list[Routing] = []
    with_graph = torch.is_grad_enabled()
    thread = threading.get_ident()

    def observe(layer: SegMoE, routing: Routing, _: int) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling and threading.get_ident() != thread:
            _refuse_replica("collect_routings", layer)
            return  # somebody else's call of the model
        if with_graph and layer.training and not torch.is_grad_enabled():
            raise RuntimeError(
                "segmoe_kernels.collect_routings: a layer was called in training with gradients "
                "switched off, so its routing has no graph. Pass use_reentrant=False to "
                "torch.utils.checkpoint; where no graph is wanted, call collect_routings under "
                "torch.no_grad() too."
            )
        # Inside a backward pass, a forward pass is activation checkpointing's second one.
        if compiling or torch._C._current_graph_task_id() == -1:
            routings.append(routing)

    layers = list(layers)
    for layer in layers:
        layer._observers = (*layer._observers, observe)
    try:
        yield routings
    finally:
        for layer in layers:
            _stop_observing(layer, observe)


def collect_routing_stats(
    model: nn.Module, *, every: int = 1, all_reduce: bool = False, group: Any = None
) -> RoutingCollector:
    """Count, from now on, where the `SegMoE` layers of a model send segments.

    Counters stay on the layers' device, and no forward pass waits for it; reading does, once for
    all layers. Training and evaluation count alike: use one collector for each, or `reset`.

    Args:
        model: with `SegMoE` layers inside, plain, sharded, in adapters or wrapped, or one of them.
        every: how many `RoutingCollector.end_step` make one entry of ``step_history``.
        all_reduce: sum over the ranks of a process group where counters are read: one collective
            for each entry, so every rank has to read as often.
        group: process group of ``torch.distributed``; None: all ranks.

    Returns:
        RoutingCollector; its docstring has every statistic's formula. As a context manager, or by
        ``close()``, it leaves the layers as they were.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: if model has no layer with experts, or every is below 1.
        RuntimeError: where ranks are to be summed, if ``torch.distributed`` is not initialised, or
            this rank not in the group.
    """
    name = "collect_routing_stats"
    every = check.check_integer(name, "every", every, 1)
    check.check_flag(name, "all_reduce", all_reduce)
    if group is not None and not all_reduce:
        check.fail_value(name, "group", "be None without all_reduce=True", group)
    if all_reduce:
        check.check_group(name, group)
    return RoutingCollector(_layers_with_experts(name, model), every, all_reduce, group)
