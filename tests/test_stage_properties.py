"""What holds for every stage alike: strides, wanted gradients, addresses, second derivatives."""

import itertools
from typing import NamedTuple

import pytest
import test_combine
import test_experts
import test_grouped_gemm
import test_route
import test_shared
import torch
from stage_runs import check_same, check_wanted_gradients, run_stage, strided_views

from segmoe_kernels import FFNWeights, reference

stages = pytest.importorskip("segmoe_kernels.stages")


class Case(NamedTuple):
    """A stage and its tensors; ``own`` of them are the kernels', not operands of the vendor's."""

    stage: object
    tensors: dict
    own: tuple


def route(device, dtype, **options):
    mask = test_route.make_mask(3, 11, device)
    tensors = test_route.make_tensors(3, 11, 5, 4, dtype=dtype, device=device, **options)
    pooling = options.get("pooling", "concat")
    return Case(test_route.make_stage(padding_mask=mask, pooling=pooling), tensors, (*tensors,))


def experts(device, dtype, d_model=3, scope="token", *, biased=True):
    options = {"scope": scope, "gated": True, "biased": biased, "dtype": dtype, "device": device}
    tensors = test_experts.make_tensors(2, 8, d_model, 2, 3, **options)
    ids = test_experts.make_ids(6, 2, 3, device)
    mask = test_experts.make_mask(2, 8, ids, device)
    options = {"mask": mask, "activation": "silu", "expert_scope": scope}
    return Case(test_experts.make_stage(ids, 3, **options), tensors, (*tensors,))


def grouped_gemm(device, dtype):
    counts = [3, 0, 9]
    tensors = test_grouped_gemm.make_tensors(counts, 70, 37, dtype=dtype, device=device)
    return Case(test_grouped_gemm.make_stage(counts, "gelu", device), tensors, (*tensors,))


def combine(device, dtype, d_model=4):
    mask = test_combine.make_mask(3, 6, device)
    tensors = test_combine.make_tensors(3, 6, d_model, dtype=dtype, device=device, mask=mask)
    return Case(test_combine.make_stage(mask), tensors, (*tensors,))


def shared(device, dtype, **options):
    tensors, keywords = test_shared.draw_case(dtype, device, gated=True, bias=True, **options)
    del tensors["dy"]

    def stage(expert_out, x, shared_gate, *, backend, **weights):
        function = (stages if backend == "triton" else reference).shared_combine
        return {"y": function(expert_out, x, FFNWeights(**weights), shared_gate, **keywords)}

    return Case(stage, tensors, ("expert_out", "x"))


CASES = {
    "route": route,
    "route causal": lambda *where: route(*where, causal=True),
    "route max": lambda *where: route(*where, pooling="max", causal=True),
    "experts": experts,
    "experts products for weights": lambda *where: experts(*where, test_experts.MIDDLE),
    "experts wide": lambda *where: experts(*where, test_experts.WIDE, biased=False),
    "experts segment": lambda *where: experts(*where, scope="segment"),
    "grouped_gemm": grouped_gemm,
    "combine": combine,
    "combine wide": lambda *where: combine(*where, 260),
    "shared": lambda *where: shared(*where, length=12, d_model=16),
    "shared masked": lambda *where: shared(*where, masked=True),
}
NARROW = [name for name in CASES if "wide" not in name and "products" not in name]
every_case = pytest.mark.parametrize("name", CASES)
every_narrow_case = pytest.mark.parametrize("name", NARROW)


@every_narrow_case
def test_any_strides_are_read(name, device):
    """The elements between those of a view are NaN; gradients that come in may repeat."""
    stage, tensors, own = CASES[name](device, torch.float32)
    upstream = {}
    expected = run_stage(stage, tensors, upstream=upstream)
    for number, key in enumerate(own):
        # Every kind of strides for the first two, one kind for the others.
        views = list(strided_views(tensors[key]))
        for view in views if number < 2 else views[number % len(views) :][:1]:
            check_same(run_stage(stage, {**tensors, key: view}, upstream=upstream), expected)
    for key, gradient in upstream.items():
        for view in strided_views(gradient):
            check_same(run_stage(stage, tensors, upstream={**upstream, key: view}), expected)
        one = gradient[:1].expand_as(gradient)
        repeated = run_stage(stage, tensors, upstream={**upstream, key: one.contiguous()})
        check_same(run_stage(stage, tensors, upstream={**upstream, key: one}), repeated)


@every_narrow_case
def test_only_wanted_gradients_are_computed(name, device):
    """Each alone, all but each, and all pairs: the same bits, and no others."""
    stage, tensors, _ = CASES[name](device, torch.float32)
    subsets = [{key} for key in tensors]
    subsets += [set(tensors) - {key} for key in tensors]
    if len(tensors) < 6:
        subsets += map(set, itertools.combinations(tensors, 2))
    check_wanted_gradients(stage, tensors, [wanted for wanted in subsets if wanted])


@every_narrow_case
def test_second_derivatives_are_refused(name, device):
    stage, tensors, _ = CASES[name](device, torch.float64)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    outputs = [out for out in stage(**leaves, backend="triton").values() if out.requires_grad]
    loss = sum(out.square().sum() for out in outputs)
    gradients = torch.autograd.grad(loss, [*leaves.values()], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        sum(gradient.square().sum() for gradient in gradients).backward()


@pytest.mark.interpreter
@every_case
def test_tensors_of_the_call_alone_are_touched(name):
    """Every address of every load and store, those whose values nobody uses too."""
    from benchmarks.traffic_meter import TrafficMeter

    stage, tensors, _ = CASES[name]("cpu", torch.float32)
    with TrafficMeter():
        run_stage(stage, tensors)
