"""The stages as functions: their contracts, one by one and in order."""

import ast
import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import STATES, make_layer
from stage_runs import check_exactness

import segmoe_kernels
from segmoe_kernels import (
    FFNWeights,
    SegMoE,
    activations,
    functional,
    reference,
    replace_ffn,
)
from segmoe_kernels.functional import (
    combine,
    expert_ffn,
    grouped_gemm,
    permute,
    route,
    seg_moe,
)

BATCH, LENGTH, SIZE, D, F, E = 2, 8, 3, 4, 6, 5
ACTIVATIONS = [None, "gelu", "gelu_tanh", "silu", "relu"]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_route_output_is_consistent(top_k, padded):
    mask = torch.rand(BATCH, LENGTH) < 0.4 if padded else None
    if padded:
        mask[0, 3:6] = False
    out = route(
        draw(BATCH, LENGTH, D),
        draw(E, SIZE * D),
        segment_size=SIZE,
        top_k=top_k,
        padding_mask=mask,
        renormalize=False,
    )
    routed = torch.ones(6, dtype=torch.bool)
    if padded:
        routed = torch.stack([m[a : a + 3].any() for m in mask for a in (0, 3, 6)])
        assert not routed.all()
    assert out.block_counts is None
    assert out.topk_ids.dtype == torch.int32
    torch.testing.assert_close(out.router_probs.sum(1), routed.double(), rtol=1e-14, atol=0)
    assert torch.equal(out.topk_ids >= 0, routed[:, None].expand(6, top_k))
    best = out.router_probs.sort(1, descending=True).values[:, :top_k]
    assert torch.equal(out.topk_weights, best)
    chosen = out.router_probs.gather(1, out.topk_ids.long().clamp_min(0))
    assert torch.equal(chosen[routed], out.topk_weights[routed])
    assert not out.topk_weights[~routed].any()


def test_route_renormalizes_tiny_sums_safely():
    weight = torch.tensor([[0.0], [0.0]]).double()
    out = route(torch.ones(1, 1, 1).double(), weight, segment_size=1, top_k=1, renormalize=True)
    assert out.topk_weights.item() == 1.0
    torch.manual_seed(0)
    dropped = [
        route(
            torch.ones(1, 1, 1).double(),
            weight,
            segment_size=1,
            top_k=2,
            router_dropout=0.9,
        )
        for _ in range(20)
    ]
    empty = [out for out in dropped if not out.router_probs.any()]
    assert empty
    assert all(torch.equal(out.topk_weights, torch.zeros(1, 2).double()) for out in empty)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    top_k=st.integers(1, 3),
    num_experts=st.integers(1, 6),
    segments=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_permute_invariants(top_k, num_experts, segments, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts, (segments, top_k), generator=generator).int()
    out = permute(ids, num_experts)
    slots = ids.flatten().tolist()
    order = sorted(range(len(slots)), key=lambda s: (slots[s] if slots[s] >= 0 else num_experts, s))
    assert out.sorted_to_slot.tolist() == order
    assert [order[row] for row in out.slot_to_sorted.tolist()] == list(range(len(order)))
    counts = [slots.count(e) for e in range(num_experts)]
    assert out.expert_counts.tolist() == counts
    assert out.expert_offsets.tolist() == [sum(counts[:e]) for e in range(num_experts + 1)]
    assert {t.dtype for t in out} == {torch.int32}


def test_permute_worked_example():
    out = permute(torch.tensor([[2], [0], [-1], [2]], dtype=torch.int32), 3)
    assert out.expert_counts.tolist() == [1, 0, 2]
    assert out.expert_offsets.tolist() == [0, 1, 1, 3]
    assert out.sorted_to_slot.tolist() == [1, 0, 3, 2]
    assert out.slot_to_sorted.tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_grouped_gemm_equals_rows_one_by_one(biased, activation):
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    x, weight = draw(7, D), draw(3, F, D)
    bias = draw(3, F) if biased else None
    out = grouped_gemm(x, weight, offsets, bias, activation)
    act = (lambda z: z) if activation is None else activations.ACTIVATIONS[activation].function
    for row, e in enumerate([0, 0, 2, 2, 2]):
        expected = act(weight[e] @ x[row] + (0 if bias is None else bias[e]))
        torch.testing.assert_close(out[row], expected, rtol=1e-13, atol=1e-14)
    assert not out[5:].any()


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("gelu", 1.0, 0.5 * (1 + math.erf(1 / math.sqrt(2)))),
        ("gelu_tanh", 1.0, 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))),
        ("silu", 1.0, 1 / (1 + math.exp(-1))),
        ("relu", 1.0, 1.0),
        ("relu", -1.0, 0.0),
    ],
)
def test_activation_functions_worked(name, x, expected):
    value = activations.ACTIVATIONS[name].function(torch.tensor(x, dtype=torch.float64))
    assert value.item() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("scope", ["token", "segment"])
def test_expert_ffn_places_each_choice(scope):
    """(top_k, B, T, D): each choice's output lies at its own steps, times its weight."""
    factor = SIZE if scope == "segment" else 1
    experts = FFNWeights(draw(E, F, D * factor), draw(E, D * factor, F))
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(6)]).int()
    weights, x = draw(6, 2), draw(BATCH, LENGTH, D)
    out = expert_ffn(
        x,
        weights,
        permute(ids, E),
        experts,
        segment_size=SIZE,
        expert_scope=scope,
        activation="silu",
    )
    assert out.shape == (2, BATCH, LENGTH, D)
    padded = torch.cat([x, torch.zeros(BATCH, 1, D).double()], 1)
    for s in range(6):
        b, start = s // 3, s % 3 * 3
        rows = padded[b, start : start + 3].reshape(-1, D * factor)
        for k in range(2):
            e = ids[s, k]
            hidden = torch.nn.functional.silu(rows @ experts.up_proj[e].t())
            expected = (hidden @ experts.down_proj[e].t()).reshape(3, D) * weights[s, k]
            actual = out[k, b, start : start + 3]
            torch.testing.assert_close(actual, expected[: len(actual)], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wide", [False, True])
def test_combine_sums_choices_and_gated_shared(wide):
    steps, rows = (SIZE, 3) if wide else (1, LENGTH)
    choices, shared, gate = (
        draw(2, BATCH, LENGTH, D),
        draw(BATCH, rows, steps * D),
        draw(BATCH, rows),
    )
    mask = torch.rand(BATCH, LENGTH) < 0.7
    choices = choices.masked_fill(~mask[..., None], 0)
    y = combine(choices, shared, gate, padding_mask=mask)
    for b in range(BATCH):
        for t in range(LENGTH):
            part = shared[b, t // steps].reshape(steps, D)[t % steps]
            expected = (
                choices[0, b, t] + choices[1, b, t] + part / (1 + torch.exp(-gate[b, t // steps]))
            )
            expected = expected if mask[b, t] else torch.zeros(D).double()
            torch.testing.assert_close(y[b, t], expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(combine(choices), choices.sum(0))


@pytest.mark.parametrize(
    "name", ["default", "shared_token", "causal_last", "gated_bias", "segment"]
)
def test_seg_moe_is_the_stages_in_order(name):
    layer = make_layer(**STATES[name][0]).double()
    x, mask = draw(2, 12, 4), torch.rand(2, 12) < 0.8
    options = {"segment_size": layer.segment_size}
    scope = {"expert_scope": layer.expert_scope, "activation": layer.activation}
    routed = route(
        x,
        layer.router.weight,
        top_k=1,
        pooling=layer.pooling,
        router_start=layer.router.start,
        padding_mask=mask,
        **options,
    )
    permutation = permute(routed.topk_ids, 3)
    out = expert_ffn(
        x,
        routed.topk_weights,
        permutation,
        layer.experts.weights(),
        padding_mask=mask,
        **options,
        **scope,
    )
    shared = ()
    if layer.shared_expert is not None:
        steps = layer.shared_gate.weight.shape[1] // 4
        shared = reference.shared_expert(
            x,
            layer.shared_expert.weights(),
            layer.shared_gate.weight,
            segment_size=steps,
            activation=layer.activation,
            padding_mask=mask,
        )
    y = combine(out, *shared, padding_mask=mask)
    actual, routing = layer.forward_with_routing(x, mask)
    assert torch.equal(actual, y)
    assert torch.equal(routing.topk_ids, routed.topk_ids)
    assert torch.equal(routing.expert_counts, permutation.expert_counts)


def test_seg_moe_takes_views_of_a_fused_projection():
    fused, x = draw(E, 2 * F, D), draw(BATCH, LENGTH, D)
    router, down = draw(E, SIZE * D), draw(E, D, F)
    gate, up = fused.chunk(2, dim=1)
    views = seg_moe(x, router, FFNWeights(up, down, gate), segment_size=SIZE)[0]
    copies = FFNWeights(up.contiguous(), down, gate.contiguous())
    assert torch.equal(views, seg_moe(x, router, copies, segment_size=SIZE)[0])


def test_reference_has_every_function_of_functional():
    names = set(functional.__all__) - {"resolve_backend"}
    assert all(callable(getattr(reference, name)) for name in names)


def test_reference_seg_moe_equals_the_layer():
    layer = SegMoE(6, 10, 3, segment_size=4, shared_expert="token", dtype=torch.float64)
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    y, routing = reference.seg_moe(
        x,
        layer.router.weight,
        layer.experts.weights(),
        segment_size=4,
        shared=layer.shared_expert.weights(),
        shared_gate=layer.shared_gate.weight,
    )
    assert torch.equal(y, layer(x))
    assert routing.topk_ids.shape == (2 * 3 * 3, 1)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("splits", [1, 3])
def test_experts_may_have_any_of_the_biases(splits, gated, monkeypatch, device):
    """Each has its own place among the kernels' partial sums, whatever others there are."""
    launch = pytest.importorskip("segmoe_kernels.stages.experts.launch")
    from test_experts import make_ids, make_stage, make_tensors

    monkeypatch.setattr(launch, "num_row_splits", lambda *_: splits)
    tensors = make_tensors(2, 30, 3, 4, 2, top_k=1, gated=gated, biased=True, device=device)
    stage = make_stage(make_ids(20, 1, 2, device), 2, activation="silu")
    biases = [name for name in tensors if name.endswith("bias")]
    for absent in (set(s) for n in (1, 2) for s in itertools.combinations(biases, n)):
        check_exactness(stage, {n: t for n, t in tensors.items() if n not in absent})


def test_an_activation_is_one_entry_and_one_device_function(monkeypatch):
    """Registered from outside: the reference, swaps and messages know it; the kernels refuse it."""
    entry = activations.Activation(torch.nn.functional.relu6, (torch.nn.ReLU6,))
    monkeypatch.setitem(activations.ACTIVATIONS, "relu6", entry)
    layer = SegMoE(4, 6, 3, segment_size=2, activation="relu6", dtype=torch.float64)
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, nondet_tol=0.0)
    ffn = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU6(), torch.nn.Linear(6, 4))
    model = torch.nn.Sequential(ffn)
    replace_ffn(model, num_experts=3, segment_sizes=2)
    assert model[0].activation == "relu6"
    with pytest.raises(ValueError, match="'relu6'"):
        SegMoE(4, 6, 3, activation="relu7")
    if importlib.util.find_spec("triton"):
        layer.backend = "triton"
        with pytest.raises(Exception, match="unknown activation"):
            layer(x)


def test_names_of_activations_stand_in_few_files():
    """What has to change for a new one: the registry and the device functions."""
    places = set()
    for path in Path(segmoe_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict | ast.Compare) and "'gelu_tanh'" in ast.unparse(node):
                places.add(path.parent.name + "/" + path.name)
    assert places == {"segmoe_kernels/activations.py", "_triton/activations.py"}
