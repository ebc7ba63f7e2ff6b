"""Time of each stage of the layer beside what does the same elsewhere.

    python -m benchmarks.stages [--shapes headline] [--parts route,permute,expert_ffn,combine,...]

Parts: ``route`` (pool, logits, softmax, top-k), ``permute`` (group the slots by expert),
``expert_ffn`` (the experts on the steps of each segment, weighted and summed), ``grouped_gemm``
(one product on rows that are grouped by expert), ``combine`` (sum over the choices and the gated
shared path). Outputs and gradients have to pass the criterion of the `gate` first.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import DTYPES, make_case, release_memory
from benchmarks.gate import RefusedError, Verdict, judge, require
from benchmarks.layer import describe, line
from benchmarks.peer_modules import SegmentPeer, grouped_mm, sorted_slots
from benchmarks.runner import MODES, PASSES, Configuration, Emit, Options, Suite, run_suite
from benchmarks.timing import Clock, capture, summary, time_interleaved
from segmoe_kernels import FFNWeights, SegMoE, functional, reference

__all__ = ["SUITE", "Stage", "make_stage"]

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensor]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage on fixed inputs.

    Attributes:
        inputs: tensors that gradients are asked of, by name.
        functions: provider -> what is timed.
        exact: the same on float64 inputs; the reference.
        integers: its results are whole numbers, without gradients.
    """

    inputs: Tensors
    functions: dict[str, Function]
    exact: Function
    integers: bool = False


def make_stage(configuration: Configuration) -> Stage:
    """Make the inputs and the providers of the part that a configuration names."""
    part = configuration.part
    layer, inputs = make_case(
        configuration.find_workload(),
        part="whole" if part == "combine" else "routed",
        routing=configuration.routing,
        dtype=DTYPES[configuration.dtype],
        device=torch.device(configuration.device),
    )
    makers = {
        "route": _route,
        "permute": _permute,
        "expert_ffn": _expert_ffn,
        "grouped_gemm": _grouped_gemm,
        "combine": _combine,
    }
    with torch.no_grad():
        return makers[part](layer, inputs.x)


def _with_compile(functions: dict[str, Function]) -> dict[str, Function]:
    return {**functions, "compile": torch.compile(functions["eager"])}


def _route(layer: SegMoE, x: Tensor) -> Stage:
    options = {"segment_size": layer.segment_size, "top_k": layer.top_k}

    def eager(t: Tensors) -> Tensor:
        return reference.route(t["x"], t["weight"], **options).topk_weights

    def ours(t: Tensors) -> Tensor:
        return functional.route(t["x"], t["weight"], **options).topk_weights

    inputs = {"x": x, "weight": layer.router.weight.detach()}
    return Stage(inputs, _with_compile({"segmoe": ours, "eager": eager}), eager)


def _permute(layer: SegMoE, x: Tensor) -> Stage:
    """Results are the expert's offsets: the order inside an expert is not everyone's."""
    ids, num_experts = peers.route_ids(layer, x), layer.num_experts
    long_ids = ids.long()

    def eager(t: Tensors) -> Tensor:  # noqa: ARG001  every function takes the inputs
        return reference.permute(ids, num_experts).expert_offsets[1:]

    def ours(t: Tensors) -> Tensor:  # noqa: ARG001
        return functional.permute(ids, num_experts).expert_offsets[1:]

    def sort(t: Tensors) -> Tensor:  # noqa: ARG001
        return sorted_slots(ids, num_experts)[2]

    functions = _with_compile({"segmoe": ours, "eager": eager}) | {"sort": sort}
    if x.is_cuda:
        try:
            package = peers.load_scattermoe()
        except peers.SkippedError as error:
            print(f"skipped scattermoe: {error}", flush=True)
        else:
            functions["scattermoe"] = lambda _: package.flatten_sort_count(long_ids, num_experts)[2]
    return Stage({}, functions, eager, integers=True)


def _expert_ffn(layer: SegMoE, x: Tensor) -> Stage:
    routed = reference.route(
        x, layer.router.weight, segment_size=layer.segment_size, top_k=layer.top_k
    )
    permutation = reference.permute(routed.topk_ids, layer.num_experts)
    options = {"segment_size": layer.segment_size, "activation": layer.activation}
    fields = ("up_proj", "down_proj", "gate_proj")
    weights = layer.experts.weights()

    def experts(t: Tensors) -> FFNWeights:
        return FFNWeights(t["up_proj"], t["down_proj"], t.get("gate_proj"))

    def total(out: Tensor) -> Tensor:
        return out[0] if out.shape[0] == 1 else out.sum(0)

    def eager(t: Tensors) -> Tensor:
        args = (t["x"], t["topk_weights"], permutation, experts(t))
        return total(reference.expert_ffn(*args, **options))

    def ours(t: Tensors) -> Tensor:
        args = (t["x"], t["topk_weights"], permutation, experts(t))
        return total(functional.expert_ffn(*args, **options))

    functions = _with_compile({"segmoe": ours, "eager": eager})
    for name in ("grouped_mm", "scattermoe", "scattermoe_nosync", "liger", "transformers"):
        try:
            provider = peers.PROVIDERS[name](layer, x.device)
        except peers.SkippedError as error:
            print(f"skipped {name}: {error}", flush=True)
        else:
            functions[name] = _peer_experts(provider.module, routed.topk_ids.long())
    inputs = {"x": x, "topk_weights": routed.topk_weights}
    inputs |= {f: w.detach() for f in fields if (w := getattr(weights, f)) is not None}
    return Stage(inputs, functions, eager)


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


def _grouped_gemm(layer: SegMoE, x: Tensor) -> Stage:
    """The first product of the experts, without its activation, on rows that lie in order."""
    ids, num_experts = peers.route_ids(layer, x), layer.num_experts
    per_step = reference.permute(
        ids.repeat_interleave(layer.segment_size, 0)[: x.shape[0] * x.shape[1]], num_experts
    )
    offsets = per_step.expert_offsets
    source = x.reshape(-1, x.shape[-1])
    rows = source[per_step.sorted_to_slot.long() // layer.top_k]

    def eager(t: Tensors) -> Tensor:
        return reference.grouped_gemm(t["rows"], t["weight"], offsets)

    def ours(t: Tensors) -> Tensor:
        return functional.grouped_gemm(t["rows"], t["weight"], offsets)

    def torch_grouped(t: Tensors) -> Tensor:
        return grouped_mm(t["rows"], t["weight"], offsets[1:])

    functions = _with_compile({"segmoe": ours, "eager": eager})
    functions["grouped_mm"] = torch_grouped
    if x.is_cuda:
        try:
            package = peers.load_scattermoe()
        except peers.SkippedError as error:
            print(f"skipped scattermoe: {error}", flush=True)
        else:
            slots = torch.arange(rows.shape[0], device=x.device)
            owners = torch.bucketize(slots, offsets[1:].long(), right=True)
            index = (owners, slots, offsets[1:].long())
            functions["scattermoe"] = lambda t: package.parallel_linear(
                t["rows"],
                t["weight"].permute(0, 2, 1),
                1,
                *index,
                grouped_in=True,
                grouped_out=True,
            )
    inputs = {"rows": rows, "weight": layer.experts.up_proj.detach()}
    return Stage(inputs, functions, eager)


def _combine(layer: SegMoE, x: Tensor) -> Stage:
    shared, logits = reference.shared_expert(
        x, layer.shared_expert.weights(), layer.shared_gate.weight, segment_size=layer.segment_size
    )
    inputs = {
        "expert_out": torch.randn_like(x.expand(layer.top_k, *x.shape)),
        "shared_out": shared,
        "shared_gate_logits": logits,
    }
    functions = {
        "segmoe": lambda t: functional.combine(*t.values()),
        "eager": lambda t: reference.combine(*t.values()),
    }
    return Stage(inputs, _with_compile(functions), functions["eager"])


def _results(
    function: Function, inputs: Tensors, dy: Tensor | None, dtype: torch.dtype | None = None
) -> Tensors:
    """The output and the gradients of all inputs."""
    leaves = {
        name: value.detach().to(dtype or value.dtype).requires_grad_(dy is not None)
        for name, value in inputs.items()
    }
    if dy is None:
        return {"y": function(leaves)}
    y = function(leaves)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def _admit(
    stage: Stage, dy: Tensor | None, emit_why: Callable[[str, str, str], None]
) -> dict[str, float]:
    """Errors over limits of the providers that are correct."""
    eager = _results(stage.exact, stage.inputs, dy)
    exact = eager if stage.integers else _results(stage.exact, stage.inputs, dy, torch.float64)
    admitted: dict[str, float] = {}
    for name, function in stage.functions.items():
        try:
            found = _results(function, stage.inputs, dy)
            if stage.integers:
                equal = torch.equal(found["y"].long(), exact["y"].long())
                worst = Verdict(0.0 if equal else math.inf, "y")
            else:
                worst = judge(found, eager, exact)
            require(worst, ours=name == "segmoe")
            admitted[name] = worst.error_over_limit
        except RefusedError as error:
            emit_why(name, "refused", str(error))
        except Exception as error:  # a peer may break in any way
            emit_why(name, "failed", describe(error))
    return admitted


def measure(configuration: Configuration, options: Options, emit: Emit) -> None:
    """Time one stage of one configuration."""
    device = torch.device(configuration.device)
    stage = make_stage(configuration)
    clock = Clock(device)
    passes = [p for p in options.passes if p == "forward" or not stage.integers]
    identities = [i for i in options.identities() if i["pass"] in passes]

    def emit_why(name: str, key: str, why: str) -> None:
        for identity in identities:
            if identity["provider"] == name:
                emit({**identity, key: why})

    for identity in options.identities():
        if identity["provider"] not in stage.functions:
            emit({**identity, "skipped": "does not run this stage here"})
        elif identity not in identities:
            emit({**identity, "skipped": "whole numbers have no gradient"})
    wanted = {n: f for n, f in stage.functions.items() if n in options.providers}
    stage = dataclasses.replace(stage, functions=wanted)
    dy = None
    if not stage.integers:
        with torch.no_grad():
            dy = torch.randn_like(stage.exact(stage.inputs))
    admitted = _admit(stage, dy, emit_why)
    release_memory(device)
    for mode in options.modes:
        for passed in passes:
            functions = {}
            for name in admitted:
                function = _call(stage, name, dy if passed != "forward" else None)
                if mode == "graph":
                    identity = {"provider": name, "pass": passed, "mode": mode}
                    try:
                        function = capture(function)[0]
                    except Exception as error:  # whatever can't be captured
                        emit({**identity, "failed": describe(error)})
                        continue
                functions[name] = function
            timings = time_interleaved(
                functions, clock, budget_s=options.budget_s, least_rounds=options.rounds
            )
            for name, timing in timings.items():
                row = {"provider": name, "pass": passed, "mode": mode, **summary(timing)}
                row |= {"error_over_limit": admitted[name], "l2_flushed": clock.flushes}
                if "segmoe" in timings:
                    row["time_over_segmoe"] = timing.ratio(timings["segmoe"])
                emit(row)


def _call(stage: Stage, name: str, dy: Tensor | None) -> Callable[[], Any]:
    function, inputs = stage.functions[name], stage.inputs
    if dy is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(inputs)

        return forward
    leaves = {key: value.detach().requires_grad_() for key, value in inputs.items()}
    return lambda: torch.autograd.grad(function(leaves), tuple(leaves.values()), dy)


SUITE = Suite(
    name="stages",
    parts=("route", "permute", "expert_ffn", "grouped_gemm", "combine"),
    default_parts=("route", "permute", "expert_ffn", "grouped_gemm", "combine"),
    providers=(
        "segmoe",
        "eager",
        "compile",
        "sort",
        "grouped_mm",
        "scattermoe",
        "scattermoe_nosync",
        "liger",
        "transformers",
    ),
    passes=PASSES,
    modes=MODES,
    measure=measure,
    line=line,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_suite(SUITE, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    sys.exit(main())
