"""The reference backend by hand: worked numbers, dropout, NaN, causality."""

import math

import pytest
import torch
from torch import nan, tensor

from segmoe_kernels import SegMoE

LN3 = math.log(3.0)


def make_worked_layer(shared_expert=None, **options):
    """P=2, D=F=1, E=2, relu. The router's logits are the two steps of a segment."""
    layer = SegMoE(
        1,
        1,
        2,
        segment_size=2,
        activation="relu",
        shared_expert=shared_expert,
        backend="reference",
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2)[:, : layer.router.weight.shape[1]])
        layer.experts.up_proj.copy_(tensor([2.0, 3.0]).reshape(2, 1, 1))
        layer.experts.down_proj.copy_(tensor([5.0, 7.0]).reshape(2, 1, 1))
    return layer


def assert_close(actual, expected):
    torch.testing.assert_close(
        actual, tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )


def run_worked(layer, steps, mask=None):
    x = tensor(steps, dtype=torch.float64).reshape(1, -1, 1)
    y, routing = layer.forward_with_routing(x, None if mask is None else tensor([mask]))
    return y.flatten(), routing


def test_layer_worked_top1():
    # softmax(ln 3, 0) = (3/4, 1/4): expert 0 scales by 3/4 * 2 * 5 = 7.5, expert 1 by 15.75.
    y, routing = run_worked(make_worked_layer(), [LN3, 0.0, 0.0, LN3, LN3])
    assert_close(routing.router_logits, [[LN3, 0], [0, LN3], [LN3, 0]])
    assert_close(routing.router_probs, [[0.75, 0.25], [0.25, 0.75], [0.75, 0.25]])
    assert_close(routing.topk_weights, [[0.75], [0.75], [0.75]])
    assert routing.topk_ids.tolist() == [[0], [1], [0]]
    assert routing.expert_counts.tolist() == [2, 1]
    assert_close(y, [7.5 * LN3, 0, 0, 15.75 * LN3, 7.5 * LN3])


def test_layer_worked_padding():
    # Without its first step the first segment is (0, 0): a tie, expert 0 at 1/2.
    y, routing = run_worked(
        make_worked_layer(), [LN3, 1.0, 9.0, 9.0, 0.0, LN3], [False, True, False, False, True, True]
    )
    assert_close(
        routing.router_probs, [[1 / (1 + math.e), math.e / (1 + math.e)], [0, 0], [0.25, 0.75]]
    )
    assert routing.topk_ids.tolist() == [[1], [-1], [1]]
    assert_close(routing.topk_weights, [[math.e / (1 + math.e)], [0], [0.75]])
    assert routing.expert_counts.tolist() == [0, 2]
    assert_close(y, [0, 21 * math.e / (1 + math.e), 0, 0, 0, 15.75 * LN3])


def test_layer_worked_causal():
    # Segment 0 is routed on the start vector, segment 1 on segment 0.
    layer = make_worked_layer(causal=True)
    with torch.no_grad():
        layer.router.start.copy_(tensor([0.0, LN3], dtype=torch.float64))
    y, routing = run_worked(layer, [LN3, 0.0, 1.0, 2.0, 3.0])
    assert routing.topk_ids.tolist() == [[1], [0], [1]]
    assert_close(routing.router_logits, [[0, LN3], [LN3, 0], [1, 2]])
    assert_close(y[:4], [15.75 * LN3, 0, 7.5, 15])


def make_identity_layer(p=0.0, router_p=0.0, shared_expert=None, num_experts=2, **options):
    """Relu experts that pass positive x on, with weight 1 at top 1."""
    layer = SegMoE(
        8,
        8,
        num_experts,
        dropout=p,
        router_dropout=router_p,
        shared_expert=shared_expert,
        activation="relu",
        renormalize=True,
        backend="reference",
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("proj", "proj.weight")):
                parameter.copy_(torch.eye(8).expand_as(parameter))
            else:
                parameter.zero_()
    return layer


def assert_rate(kept, p):
    """Share of True against 1 - p, within five standard deviations."""
    tolerance = 5 * math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < tolerance


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_expert_ffn_dropout_keeps_and_scales(p):
    layer = make_identity_layer(p)
    y = layer(torch.ones(4, 500, 8).double())
    kept = y != 0
    assert_rate(kept, p)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=0, atol=1e-14)
    # Columns and rows are dropped on their own.
    assert_rate(kept[:, 1:] ^ ~kept[:, :-1], 2 * p * (1 - p))
    assert_rate(kept[..., 1:] ^ ~kept[..., :-1], 2 * p * (1 - p))


def test_shared_expert_dropout_keeps_and_scales():
    layer = make_identity_layer(0.25, shared_expert="token")
    with torch.no_grad():
        layer.experts.down_proj.zero_()
    y = layer(torch.ones(4, 500, 8).double())  # the gate's logit is 0: half
    assert_rate(y != 0, 0.25)
    torch.testing.assert_close(y[y != 0].unique(), tensor([0.5 / 0.75]).double())


@pytest.mark.parametrize("option", [{"p": 0.5}, {"router_p": 0.5}])
def test_layer_dropout_is_off_in_eval(option):
    layer, plain = make_identity_layer(**option).eval(), make_identity_layer()
    x = torch.rand(2, 7, 8).double()
    assert torch.equal(layer(x), plain(x))
    assert not torch.equal(layer.train()(x), plain(x))


@pytest.mark.parametrize("r", [0.1, 0.5])
def test_route_dropout_acts_on_probabilities(r):
    layer = make_identity_layer(router_p=r, num_experts=4)
    y, routing = layer.forward_with_routing(torch.ones(8, 500, 8).double())
    probs = routing.router_probs
    assert_rate(probs != 0, r)
    torch.testing.assert_close(probs[probs != 0].unique(), tensor([0.25 / (1 - r)]).double())
    # Logits are from before; the lowest expert that is left is chosen; its weight is 1.
    assert not routing.router_logits.any()
    lowest = torch.where(probs != 0, torch.arange(4), 4).amin(1) % 4
    assert torch.equal(routing.topk_ids[:, 0], lowest.int())
    lost = ~probs.any(1)
    assert lost.any() or r < 0.5
    assert torch.equal(routing.topk_weights[:, 0], (~lost).double())
    assert torch.equal(y.reshape(-1, 8).any(1), ~lost)
    assert torch.equal(routing.expert_counts, torch.bincount(lowest, minlength=4).int())


def make_random_layer(**options):
    options = {"segment_size": 3, "shared_expert": "token", "backend": "reference", **options}
    layer = SegMoE(4, 6, 5, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.router.weight.normal_()
    return layer.eval()


@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
@pytest.mark.parametrize("value", [nan, torch.inf])
def test_layer_keeps_nan_in_its_segment(value, scope):
    layer = make_random_layer(expert_scope=scope, top_k=2)
    x = torch.randn(3, 8, 4).double()
    dirty = x.clone()
    dirty[1, 4, 2] = value
    results = []
    for inputs in (x, dirty):
        layer.zero_grad()
        leaf = inputs.clone().requires_grad_()
        y, routing = layer.forward_with_routing(leaf)
        y.backward(torch.linspace(-1, 1, 96).double().reshape(y.shape))
        grads = [layer.experts.up_proj.grad.clone(), layer.experts.down_proj.grad.clone()]
        results.append((y.detach(), leaf.grad, routing.topk_ids, grads))
    (y, dx, _, _), (dirty_y, dirty_dx, ids, grads) = results
    clean = torch.ones(3, 8, dtype=torch.bool)
    clean[1, 3:6] = False
    assert not dirty_y[~clean].isfinite().all()
    torch.testing.assert_close(dirty_y[clean], y[clean], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dirty_dx[clean], dx[clean], rtol=1e-12, atol=1e-13)
    others = [e for e in range(5) if e not in ids[4].tolist()]
    assert len(others) == 3
    assert all(grad[others].isfinite().all() for grad in grads)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pooling", ["concat", "mean", "max", "first", "last"])
@pytest.mark.parametrize("shared", ["token", None])
def test_layer_causal_never_looks_ahead(shared, pooling, padded):
    layer = make_random_layer(causal=True, pooling=pooling, shared_expert=shared, top_k=2)
    x = torch.randn(2, 10, 4).double()
    mask = torch.rand(2, 10) < 0.7 if padded else torch.ones(2, 10, dtype=torch.bool)
    y = layer(x, mask)
    for t in range(9):
        for future in (torch.randn(2, 9 - t, 4) * 30, torch.full((2, 9 - t, 4), nan)):
            other, other_mask = x.clone(), mask.clone()
            other[:, t + 1 :] = future
            other_mask[:, t + 1 :] ^= padded
            # Not bit for bit: other futures give experts other row counts, and some BLAS round a
            # row by how many there are. What leaks would be of the size of y, or NaN.
            torch.testing.assert_close(
                layer(other, other_mask)[:, : t + 1], y[:, : t + 1], rtol=1e-12, atol=1e-13
            )


def test_expert_ffn_dropout_differs_between_calls_and_repeats_by_seed():
    layer, x = make_identity_layer(0.5), torch.ones(1, 50, 8).double()
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(second, first)
