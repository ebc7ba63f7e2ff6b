"""What holds for every stage alike: strides, masks, wanted gradients, dropout's seed, addresses."""

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

pytest.importorskip("segmoe_kernels.stages")


class Case(NamedTuple):
    """A stage and its tensors; ``own`` of them are the kernels', not operands of the vendor's."""

    stage: object
    tensors: dict
    own: tuple
    mask: torch.Tensor | None = None


def route(device, dtype, dropout=0.0, **options):
    mask = test_route.make_mask(3, 11, device)
    tensors = test_route.make_tensors(3, 11, 5, 4, dtype=dtype, device=device, **options)
    stage = test_route.make_stage(
        padding_mask=mask, pooling=options.get("pooling", "concat"), router_dropout=dropout
    )
    return Case(stage, tensors, (*tensors,), mask)


def experts(device, dtype, d_model=3, scope="token", *, biased=True, dropout=0.0):
    options = {"scope": scope, "gated": True, "biased": biased, "dtype": dtype, "device": device}
    tensors = test_experts.make_tensors(2, 8, d_model, 2, 3, **options)
    ids = test_experts.make_ids(6, 2, 3, device)
    mask = test_experts.make_mask(2, 8, ids, device)
    options = {"mask": mask, "activation": "silu", "expert_scope": scope, "dropout": dropout}
    return Case(test_experts.make_stage(ids, 3, **options), tensors, (*tensors,), mask)


def grouped_gemm(device, dtype):
    counts = [3, 0, 9]
    tensors = test_grouped_gemm.make_tensors(counts, 70, 37, dtype=dtype, device=device)
    return Case(test_grouped_gemm.make_stage(counts, "gelu", device), tensors, (*tensors,))


def combine(device, dtype, d_model=4):
    mask = test_combine.make_mask(3, 6, device)
    tensors = test_combine.make_tensors(3, 6, d_model, dtype=dtype, device=device, mask=mask)
    return Case(test_combine.make_stage(mask), tensors, (*tensors,))


def shared(device, dtype, **options):
    options = {"gated": True, "bias": True, **options}
    stage, tensors, mask = test_shared.draw_case(dtype, device, **options)
    return Case(stage, tensors, ("expert_out", "x"), mask)


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
    stage, tensors, own, _ = CASES[name](device, torch.float32)
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
    stage, tensors, *_ = CASES[name](device, torch.float32)
    subsets = [{key} for key in tensors]
    subsets += [set(tensors) - {key} for key in tensors]
    if len(tensors) < 6:
        subsets += map(set, itertools.combinations(tensors, 2))
    check_wanted_gradients(stage, tensors, [wanted for wanted in subsets if wanted])


MASKED = {
    **{f"route {p}": lambda *w, p=p: route(*w, pooling=p) for p in test_route.POOLINGS},
    **{name: CASES[name] for name in ("experts", "experts segment", "experts wide")},
    "shared masked": CASES["shared masked"],
    "shared wide": lambda *where: shared(*where, masked=True, d_model=16),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_steps_are_never_read(name, device):
    """Nor what comes back for them; and their gradient is 0."""
    stage, tensors, _, mask = MASKED[name](device, torch.float32)
    hidden, upstream = ~mask[..., None], {}
    if "expert_out" in tensors:  # which experts leave at 0
        tensors["expert_out"] = tensors["expert_out"].masked_fill(hidden, 0)
    clean = run_stage(stage, tensors, upstream=upstream)
    dirty = {**tensors, "x": tensors["x"].masked_fill(hidden, torch.nan)}
    for key in upstream.keys() & {"y", "out"}:
        upstream[key] = upstream[key].masked_fill(hidden, torch.nan)
    actual = run_stage(stage, dirty, upstream=upstream)
    # What comes back for a mask's steps goes on to the choices, which don't read it.
    results = (actual, clean)
    for result in results:
        result.pop("dexpert_out", None)
    check_same(*results)
    assert not actual["dx"][~mask].any()


DROPPING = {
    "route": lambda *where: route(*where, dropout=0.5),
    "experts": lambda *where: experts(*where, dropout=0.5),
    "shared": lambda *where: shared(*where, dropout=0.5),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_follows_the_seed(name, device):
    stage, tensors, *_ = DROPPING[name](device, torch.float32)
    key = {"route": "probs", "experts": "out", "shared": "y"}[name]

    def call():
        return stage(**tensors, backend="triton")[key]

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


@every_narrow_case
def test_second_derivatives_are_refused(name, device):
    stage, tensors, *_ = CASES[name](device, torch.float64)
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

    stage, tensors, *_ = CASES[name]("cpu", torch.float32)
    with TrafficMeter():
        run_stage(stage, tensors)


@every_narrow_case
def test_inputs_are_never_written(name, device):
    """Nor the gradients that come in, nor the masks."""
    stage, tensors, _, mask = CASES[name](device, torch.float32)
    upstream = {}
    run_stage(stage, tensors, upstream=upstream)
    watched = [*tensors.values(), *upstream.values(), *([] if mask is None else [mask])]
    before = [(tensor._version, tensor.clone()) for tensor in watched]
    run_stage(stage, tensors, upstream=upstream)
    for tensor, (version, value) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)
