"""Auxiliary losses against numbers worked by hand, and their gradients."""

import copy
import gc
import math
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn, tensor
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import (
    Routing,
    SegMoE,
    collect_routing_stats,
    collect_routings,
    load_balancing_loss,
    router_z_loss,
    set_loss_scaler,
)
from segmoe_kernels.losses import inject_loss


def make_routing(probs, ids, logits=None):
    """A routing of float64 rows; weights are not looked at."""
    probs = tensor(probs, dtype=torch.float64)
    ids = tensor(ids, dtype=torch.int32)
    logits = torch.zeros_like(probs) if logits is None else tensor(logits, dtype=torch.float64)
    counts = torch.stack([(ids == e).sum() for e in range(probs.shape[1])]).int()
    return Routing(logits, probs, torch.zeros(ids.shape), ids, counts)


# f = (2/4, 1/4, 1/4), P = (0.4, 0.35, 0.25): 3 * (0.2 + 0.0875 + 0.0625) = 1.05.
FIRST = make_routing(
    [[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.2, 0.7, 0.1], [0.3, 0.2, 0.5]], [[0], [0], [1], [2]]
)
# Two segments, both to expert 2: P = (0.1, 0.3, 0.6): 3 * 0.6 = 1.8.
SECOND = make_routing([[0.1, 0.4, 0.5], [0.1, 0.2, 0.7]], [[2], [2]])
# Top 2 of 2 segments: counts (2, 1, 1), P = (0.5, 0.25, 0.25).
TOP2 = make_routing([[0.6, 0.3, 0.1], [0.4, 0.2, 0.4]], [[0, 1], [0, 2]])
# The second segment is masked: as if it weren't there.
MASKED = make_routing([[0.6, 0.3, 0.1], [0, 0, 0], [0.4, 0.2, 0.4]], [[0, 1], [-1, -1], [0, 2]])
NOTHING = make_routing([[0.0, 0.0, 0.0]], [[-1]])
DENSE = SegMoE(2, 2, 0).double().forward_with_routing(torch.zeros(3, 2, dtype=torch.float64))[1]


@pytest.mark.parametrize(
    ("routings", "options", "expected"),
    [
        (FIRST, {}, 1.05),
        ([FIRST], {}, 1.05),
        (FIRST, {"normalization": "switch"}, 1.05),
        (SECOND, {}, 1.8),
        ([FIRST, SECOND], {"normalization": "per_layer"}, (1.05 + 1.8) / 2),
        # All six segments: f = (2, 1, 3) / 6, P = (1.8, 2.0, 2.2) / 6.
        ([FIRST, SECOND], {}, 3 * (2 * 1.8 + 1 * 2.0 + 3 * 2.2) / 36),
        ((FIRST, SECOND), {"normalization": "global"}, 3 * (2 * 1.8 + 1 * 2.0 + 3 * 2.2) / 36),
        (TOP2, {}, 3 * (0.5 * 0.5 + 0.25 * 0.25 * 2)),
        (TOP2, {"normalization": "switch"}, 3 * (1.0 * 0.5 + 0.5 * 0.25 * 2)),
        (MASKED, {}, 3 * (0.5 * 0.5 + 0.25 * 0.25 * 2)),
        (MASKED, {"normalization": "switch"}, 3 * (1.0 * 0.5 + 0.5 * 0.25 * 2)),
        ([TOP2, MASKED], {}, 3 * (0.5 * 0.5 + 0.25 * 0.25 * 2)),
        (NOTHING, {}, 0.0),
        (DENSE, {}, 0.0),
        ([FIRST, NOTHING], {}, 1.05),
        ([FIRST, NOTHING], {"normalization": "per_layer"}, 1.05 / 2),
    ],
)
def test_load_balancing_loss_worked(routings, options, expected):
    loss = load_balancing_loss(routings, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balancing_loss_of_balance(top_k):
    ids = [[(s + k) % 4 for k in range(top_k)] for s in range(8)]
    routing = make_routing([[0.25] * 4] * 8, ids)
    assert load_balancing_loss(routing).item() == pytest.approx(1.0, rel=1e-15)
    switch = load_balancing_loss(routing, normalization="switch")
    assert switch.item() == pytest.approx(top_k, rel=1e-15)


def test_load_balancing_loss_gradient_flows_through_probabilities():
    probs = FIRST.router_probs.clone().requires_grad_()
    routing = Routing(
        FIRST.router_logits, probs, FIRST.topk_weights, FIRST.topk_ids, FIRST.expert_counts
    )
    load_balancing_loss(routing).backward()
    # d/dp[s, e] of E * sum f_e * mean p_e is E * f_e / S.
    expected = (3 * tensor([0.5, 0.25, 0.25]) / 4).double().expand(4, 3)
    torch.testing.assert_close(probs.grad, expected, rtol=1e-15, atol=0)


class Stack(nn.Module):
    """Four layers of different segment sizes in residual blocks, checkpointed where asked."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(3)
        options = {"top_k": 2, "router_dropout": 0.2, "dtype": torch.float64, **options}
        sizes = (5, 4, 3, 1)
        self.layers = nn.ModuleList(SegMoE(6, 8, 4, segment_size=p, **options) for p in sizes)
        self.dense = SegMoE(6, 8, 0, dtype=torch.float64)  # routes nothing
        self.checkpointed = False

    def forward(self, x):  # noqa: D102
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return self.dense(x)


def official_loss(routings):
    """The official code's words: all layers' rows side by side, then f times P."""
    probs = torch.cat([routing.router_probs for routing in routings])
    ids = torch.cat([routing.topk_ids for routing in routings]).long()
    rows, experts = probs.shape
    mask = nn.functional.one_hot(ids, experts).to(probs.dtype)
    fraction = mask.sum(dim=(0, 1)) / (rows * ids.shape[1])
    return experts * (fraction * probs.mean(dim=0)).sum()


def train_pooled(model, x, loss):
    model.zero_grad()
    torch.manual_seed(1)
    with collect_routings(model) as routings:
        y = model(x)
    value = 0.02 * loss(routings)
    (y.square().mean() + value).backward()
    assert len(routings) == 4  # checkpointing's second pass adds none
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), grads


@pytest.mark.parametrize("checkpointed", [False, True])
def test_pooled_loss_of_a_model_is_the_official_one(checkpointed):
    model, x = Stack(), torch.randn(3, 17, 6, dtype=torch.float64)
    expected, expected_grads = train_pooled(model, x, official_loss)
    model.checkpointed = checkpointed
    value, grads = train_pooled(model, x, load_balancing_loss)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-12, msg=name)
    none = train_pooled(model, x, lambda routings: 0 * official_loss(routings))[1]
    for i in range(4):
        name = f"layers.{i}.router.weight"
        assert (grads[name] - none[name]).norm() > 1e-4 * none[name].norm()  # it does act


def test_collected_routings_are_of_each_call_and_nothing_else_keeps_them():
    model, x = Stack(backend="reference"), torch.randn(2, 7, 6, dtype=torch.float64)
    before = [dict(vars(layer)) for layer in model.layers]
    with collect_routings(model) as routings:
        model(x)
        copied = copy.deepcopy(model)
        with collect_routings(model) as inner:
            model(x)
        model(x)
        copied(x)
    model(x)
    rows = [2 * -(-7 // p) for p in (5, 4, 3, 1)]
    assert [len(routing.topk_ids) for routing in routings] == rows * 3
    assert all(one is two for one, two in zip(inner, routings[4:8], strict=True))
    assert [layer._observers for layer in model.layers] == [()] * 4
    assert [vars(layer).keys() for layer in model.layers] == [state.keys() for state in before]
    gone = [weakref.ref(routing.router_probs) for routing in routings]
    del routings, inner
    gc.collect()
    assert not any(one() is not None for one in gone)


def test_collected_routings_in_compiled_models_and_without_gradients():
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    model = SegMoE(6, 8, 4, segment_size=3, dtype=torch.float64)
    with collect_routings(model) as expected:
        model(x)
    with collect_routings(model) as routings:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(load_balancing_loss(routings), load_balancing_loss(expected))
    assert routings[0].router_probs.requires_grad
    with torch.no_grad(), collect_routings(model) as routings:
        model(x)
    model.eval()
    with collect_routings(model) as more, torch.no_grad():
        model(x)
    assert len(routings) == len(more) == 1


def test_collected_routings_are_of_the_thread_that_collects():
    model = SegMoE(6, 8, 4, segment_size=3)
    start, lengths = threading.Barrier(2), {}

    def collect(length):
        start.wait()
        with collect_routings(model) as routings:
            for _ in range(20):
                model(torch.randn(1, length, 6))
        lengths[length] = {len(routing.topk_ids) for routing in routings}, len(routings)

    threads = [threading.Thread(target=collect, args=(length,)) for length in (3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {3: ({1}, 20), 9: ({3}, 20)}
    assert model._observers == ()


@pytest.mark.parametrize("collect", [collect_routings, collect_routing_stats])
def test_copies_that_threads_call_are_not_collected_in_silence(collect):
    model = SegMoE(6, 8, 4, segment_size=3)
    raised = []

    def call(copies):
        try:
            copies(torch.randn(1, 3, 6))
        except RuntimeError as error:
            raised.append(str(error))

    with collect(model):
        thread = threading.Thread(target=call, args=(model._replicate_for_data_parallel(),))
        thread.start()
        thread.join()
    assert "Use DistributedDataParallel" in raised[0]


Z_FIRST = make_routing([[0.5, 0.5]] * 2, [[0], [1]], logits=[[0.0, 0.0], [1.0, 1.0]])
Z_SECOND = make_routing([[0.5, 0.5]], [[0]], logits=[[-math.log(2), -math.log(2)]])
Z_MASKED = make_routing([[0.5, 0.5], [0, 0]], [[0], [-1]], logits=[[0.0, 0.0], [0.0, 0.0]])
LN2 = math.log(2)


@pytest.mark.parametrize(
    ("routings", "expected"),
    [
        (Z_FIRST, (LN2**2 + (1 + LN2) ** 2) / 2),
        (Z_SECOND, 0.0),
        ([Z_FIRST, Z_SECOND], (LN2**2 + (1 + LN2) ** 2) / 3),
        (Z_MASKED, LN2**2),
        ([Z_MASKED, Z_FIRST], (2 * LN2**2 + (1 + LN2) ** 2) / 3),
        (NOTHING, 0.0),
        (DENSE, 0.0),
        ([DENSE, Z_SECOND], 0.0),
    ],
)
def test_router_z_loss_worked(routings, expected):
    loss = router_z_loss(routings)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-14, abs=1e-30)


def test_router_z_loss_gradient():
    logits = tensor([[0.0, 0.0], [7.0, 7.0]], dtype=torch.float64, requires_grad=True)
    ids = tensor([[0], [-1]], dtype=torch.int32)
    routing = Routing(logits, torch.zeros(2, 2), torch.zeros(2, 1), ids, tensor([1, 0]))
    router_z_loss(routing).backward()
    # 2 * logsumexp * softmax where routed, 0 where masked.
    expected = tensor([[LN2, LN2], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-15, atol=0)


def test_inject_loss_passes_values_and_adds_the_gradient():
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    out = inject_loss(y * 2, (weight * tensor([3.0, 5.0])).sum())
    assert torch.equal(out, y * 2)
    dy = torch.randn(3, 4).double()
    (out * dy).sum().backward()
    assert torch.equal(y.grad, 2 * dy)
    assert torch.equal(weight.grad, tensor([3.0, 5.0]).double())


def test_the_loss_kept_is_of_the_last_call_in_training():
    layer, x = SegMoE(4, 6, 3, segment_size=5, aux_loss_weight=0.1), torch.randn(2, 10, 4)
    layer(x)
    kept = layer.aux_loss
    layer.eval()(x)
    assert layer.aux_loss == kept > 0
    layer.train().aux_loss_weight = 0
    layer(x)
    assert layer.aux_loss == 0
    layer.aux_loss_weight, layer.z_loss_weight = 0.1, 0.1
    y = layer(x)
    assert layer.aux_loss > kept
    # Each backward pass through one output brings the loss again.
    (0 * y).sum().backward(retain_graph=True)
    once = layer.router.weight.grad.clone()
    (0 * y).sum().backward()
    assert once.any()
    torch.testing.assert_close(layer.router.weight.grad, 2 * once)


def test_a_loss_scaler_is_a_number_of_any_kind():
    layer = SegMoE(4, 6, 3)
    for number in (np.float32(0.25), np.float64(0.25), np.int64(4), 4):
        set_loss_scaler(nn.Sequential(layer), number)
        assert layer.loss_scaler == number
        assert type(layer.loss_scaler) is float


def test_a_loss_scaler_is_no_module_that_the_layer_would_swallow():
    class Engine(nn.Module):
        def scale(self, loss):
            return 7 * loss

    layer = SegMoE(4, 6, 3, aux_loss_weight=0.1)
    with pytest.raises(TypeError, match=r"scaler to be no module.*got Engine"):
        set_loss_scaler(layer, Engine())
    assert "loss_scaler" not in dict(layer.named_modules())
    layer.loss_scaler = Engine()  # past the setter
    with pytest.raises(TypeError, match=r"loss_scaler to be no module.*got Engine"):
        layer(torch.randn(1, 2, 4))


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
def test_losses_pass_gradcheck(loss):
    def of_weight(weight, x):
        layer = SegMoE(2, 2, 3, segment_size=2, top_k=2, dtype=torch.float64, backend="reference")
        state = {"router.weight": weight}

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, inputs):
                return loss(self.layer.forward_with_routing(inputs)[1])

        names = {f"layer.{key}": value for key, value in state.items()}
        return torch.func.functional_call(Wrapped(), names, (x,))

    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_weight, (weight, x))


def test_inject_loss_of_low_precision_output():
    y = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones((), dtype=torch.float32, requires_grad=True)
    inject_loss(y * 1, weight * 3).sum().backward()
    assert weight.grad == 3
    assert weight.grad.dtype == torch.float32
