"""What runs each stage of the layer: both backends of this package, and what does the same.

``route`` (pool, logits, softmax, top-k), ``permute`` (group the slots by expert), ``expert_ffn``
(the experts on the steps of each segment, weighted and summed), ``grouped_gemm`` (one product on
rows that are grouped by expert), ``combine`` (sum over the choices and the gated shared path).
`test_stages` times them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import make_case
from benchmarks.gate import Verdict, judge, require
from benchmarks.peer_modules import SegmentPeer, grouped_mm, sorted_slots
from benchmarks.shapes import Workload
from segmoe_kernels import FFNWeights, SegMoE, functional, reference

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensor]
_OURS = ("segmoe", "eager", "compile")
# Stage -> its providers.
STAGES = {
    "route": _OURS,
    "permute": (*_OURS, "sort", "scattermoe"),
    "expert_ffn": (
        *_OURS,
        "grouped_mm",
        "scattermoe",
        "scattermoe_nosync",
        "liger",
        "transformers",
    ),
    "grouped_gemm": (*_OURS, "grouped_mm", "scattermoe"),
    "combine": _OURS,
}


@dataclass(frozen=True)
class Stage:
    """One stage on fixed inputs, by one provider.

    Attributes:
        inputs: what gradients are asked of, by name; none where results are whole numbers.
        function: what is timed.
        exact: plain PyTorch, which takes float64 too.
        ours: held to the accuracy of plain PyTorch without any allowance.
    """

    inputs: Tensors
    function: Function
    exact: Function
    ours: bool

    def call(self, dy: Tensor | None) -> Callable[[], Any]:
        """What is timed: forward, or with dy forward and the gradients of all inputs."""
        if dy is None:

            def forward() -> Tensor:
                with torch.no_grad():
                    return self.function(self.inputs)

            return forward
        leaves = {key: value.detach().requires_grad_() for key, value in self.inputs.items()}
        return lambda: torch.autograd.grad(self.function(leaves), tuple(leaves.values()), dy)

    def dy(self) -> Tensor:
        """A random gradient of the result."""
        with torch.no_grad():
            return torch.randn_like(self.exact(self.inputs))


class _Parts(NamedTuple):
    """Inputs, the stage on one of the backends, and makers of what else does the same."""

    inputs: Tensors
    run: Callable[[Tensors, str], Tensor]
    others: dict[str, Callable[[], Function]] = {}  # noqa: RUF012  never written


def make_stage(
    part: str, provider: str, workload: Workload, dtype: torch.dtype, device: torch.device
) -> Stage:
    """Make a stage's inputs and what runs it.

    Args:
        part: a key of `STAGES`.
        provider: one of its providers.
        workload: sizes and kind of expert.
        dtype: of parameters and inputs.
        device: of both.

    Raises:
        SkippedError: if the provider can't be used here.
    """
    whole = "whole" if part == "combine" else "routed"
    layer, (x, *_) = make_case(workload, part=whole, routing="uniform", dtype=dtype, device=device)
    if provider == "segmoe":
        peers.need_triton(x)
    with torch.no_grad():
        inputs, run, others = _MAKERS[part](layer, x)
        exact: Function = lambda t: run(t, "reference")  # noqa: E731
        functions = {
            "segmoe": lambda: lambda t: run(t, "triton"),
            "eager": lambda: exact,
            "compile": lambda: torch.compile(exact),
        }
        function = (functions | others)[provider]()
    return Stage(inputs, function, exact, provider == "segmoe")


def _route(layer: SegMoE, x: Tensor) -> _Parts:
    options = {"segment_size": layer.segment_size, "top_k": layer.top_k}

    def run(t: Tensors, backend: str) -> Tensor:
        return functional.route(t["x"], t["weight"], backend=backend, **options).topk_weights

    return _Parts({"x": x, "weight": layer.router.weight.detach()}, run)


def _permute(layer: SegMoE, x: Tensor) -> _Parts:
    """Results are the experts' offsets: the order inside an expert is not everyone's."""
    ids, num_experts = peers.route_ids(layer, x), layer.num_experts
    long_ids = ids.long()

    def run(t: Tensors, backend: str) -> Tensor:  # noqa: ARG001  every function takes the inputs
        return functional.permute(ids, num_experts, backend=backend).expert_offsets[1:]

    def scattermoe() -> Function:
        package = peers.load_scattermoe_on(x.device)
        return lambda _: package.flatten_sort_count(long_ids, num_experts)[2]

    sort = {"sort": lambda: lambda _: sorted_slots(ids, num_experts)[2], "scattermoe": scattermoe}
    return _Parts({}, run, sort)


def _expert_ffn(layer: SegMoE, x: Tensor) -> _Parts:
    routed = reference.route(
        x, layer.router.weight, segment_size=layer.segment_size, top_k=layer.top_k
    )
    permutation = reference.permute(routed.topk_ids, layer.num_experts)
    options = {"segment_size": layer.segment_size, "activation": layer.activation}
    names = ("up_proj", "down_proj", "gate_proj")
    weights = layer.experts.weights()
    long_ids = routed.topk_ids.long()

    def run(t: Tensors, backend: str) -> Tensor:
        experts = FFNWeights(t["up_proj"], t["down_proj"], t.get("gate_proj"))
        args = (t["x"], t["topk_weights"], permutation, experts)
        out = functional.expert_ffn(*args, backend=backend, **options)
        return out[0] if out.shape[0] == 1 else out.sum(0)

    def peer(name: str) -> Callable[[], Function]:
        return lambda: _peer_experts(peers.PROVIDERS[name](layer, x.device).module, long_ids)

    inputs = {"x": x, "topk_weights": routed.topk_weights}
    inputs |= {n: w.detach() for n in names if (w := getattr(weights, n)) is not None}
    return _Parts(inputs, run, {name: peer(name) for name in STAGES["expert_ffn"][3:]})


def _peer_experts(peer: SegmentPeer, ids: Tensor) -> Function:
    def run(t: Tensors) -> Tensor:
        x = t["x"]
        batch, length, width = x.shape
        peer.use_weights(t["up_proj"], t["down_proj"], t.get("gate_proj"))
        y = peer.run_experts(
            x.reshape(-1, width),
            peer.per_step(t["topk_weights"].to(x.dtype), batch, length),
            peer.per_step(ids, batch, length),
        )
        return y.view(x.shape)

    return run


def _grouped_gemm(layer: SegMoE, x: Tensor) -> _Parts:
    """The first product of the experts, without its activation, on rows that lie in order."""
    ids, num_experts = peers.route_ids(layer, x), layer.num_experts
    steps = ids.view(x.shape[0], -1, layer.top_k).repeat_interleave(layer.segment_size, 1)
    per_step = reference.permute(
        steps[:, : x.shape[1]].reshape(-1, layer.top_k).contiguous(), num_experts
    )
    offsets = per_step.expert_offsets
    rows = x.reshape(-1, x.shape[-1])[per_step.sorted_to_slot.long() // layer.top_k]

    def run(t: Tensors, backend: str) -> Tensor:
        return functional.grouped_gemm(t["rows"], t["weight"], offsets, backend=backend)

    def scattermoe() -> Function:
        package = peers.load_scattermoe_on(x.device)
        slots, ends = torch.arange(rows.shape[0], device=x.device), offsets[1:].long()
        index = (torch.bucketize(slots, ends, right=True), slots, ends)
        grouped = {"grouped_in": True, "grouped_out": True}
        return lambda t: package.parallel_linear(
            t["rows"], t["weight"].permute(0, 2, 1), 1, *index, **grouped
        )

    others = {
        "grouped_mm": lambda: lambda t: grouped_mm(t["rows"], t["weight"], offsets[1:]),
        "scattermoe": scattermoe,
    }
    return _Parts({"rows": rows, "weight": layer.experts.up_proj.detach()}, run, others)


def _combine(layer: SegMoE, x: Tensor) -> _Parts:
    shared, logits = reference.shared_expert(
        x, layer.shared_expert.weights(), layer.shared_gate.weight, segment_size=layer.segment_size
    )
    inputs = {
        "expert_out": torch.randn_like(x.expand(layer.top_k, *x.shape)),
        "shared_out": shared,
        "shared_gate_logits": logits,
    }
    return _Parts(inputs, lambda t, backend: functional.combine(*t.values(), backend=backend))


_MAKERS: dict[str, Callable[[SegMoE, Tensor], _Parts]] = {
    "route": _route,
    "permute": _permute,
    "expert_ffn": _expert_ffn,
    "grouped_gemm": _grouped_gemm,
    "combine": _combine,
}


def check(stage: Stage) -> None:
    """Refuse what computes something else: outputs and the gradients of all inputs.

    Args:
        stage: with the provider that is judged.

    Raises:
        RefusedError: by the criterion of the `gate`.
    """
    if not stage.inputs:
        equal = torch.equal(stage.function({}).long(), stage.exact({}).long())
        return require(Verdict(0.0 if equal else math.inf, "y"), ours=stage.ours)
    dy = stage.dy()
    found, eager = (_results(f, stage.inputs, dy) for f in (stage.function, stage.exact))
    exact = _results(stage.exact, stage.inputs, dy, torch.float64)
    return require(judge(found, eager, exact), ours=stage.ours)


def _results(
    function: Function, inputs: Tensors, dy: Tensor, dtype: torch.dtype | None = None
) -> Tensors:
    """The output and the gradients of all inputs."""
    leaves = {
        name: value.detach().to(dtype or value.dtype).requires_grad_()
        for name, value in inputs.items()
    }
    y = function(leaves)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
