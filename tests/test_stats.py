"""Routing statistics against plain loops, and what counts once and never waits."""

import math

import pytest
import torch
from layers import make_layer
from torch import nn, tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import Routing, collect_routing_stats, replace_ffn
from segmoe_kernels.models.adapters import WithRouterLogits
from segmoe_kernels.stats.collector import measure
from segmoe_kernels.testing import make_inputs

VECTORS = {"hard_fraction", "soft_fraction", "token_counts", "prob_mass"}


def loops(calls, num_experts, aux_weight=0.0, z_weight=0.0):
    """The statistics of ``(routing, J)``, by the formulas of the docstring."""
    counts, mass = [0] * num_experts, [0.0] * num_experts
    entropy, segments, switches, pairs, balances, squares = 0.0, 0, 0, 0, [], []
    for routing, each in calls:
        probs, logits = routing.router_probs.tolist(), routing.router_logits.tolist()
        ids = routing.topk_ids.tolist()
        own, own_mass, own_squares = [0] * num_experts, [0.0] * num_experts, []
        for s, chosen in enumerate(ids):
            if chosen[0] < 0:
                continue
            for e in chosen:
                own[e] += 1
            for e, p in enumerate(probs[s]):
                own_mass[e] += p
                entropy -= p * math.log(p) if p else 0.0
            own_squares.append(math.log(sum(math.exp(v) for v in logits[s])) ** 2)
            if (s + 1) % each and ids[s + 1][0] >= 0:
                pairs += 1
                switches += ids[s + 1][0] != chosen[0]
        if own_squares:
            n = len(own_squares)
            share = [c / sum(own) * m / n for c, m in zip(own, own_mass, strict=True)]
            balances.append(num_experts * sum(share))
            squares.append(sum(own_squares) / n)
        segments += len(own_squares)
        counts = [a + b for a, b in zip(counts, own, strict=True)]
        mass = [a + b for a, b in zip(mass, own_mass, strict=True)]
    found = {"token_counts": counts, "prob_mass": mass, "num_tokens": segments}
    found |= {"entropy": entropy / segments, "switch_rate": switches / max(pairs, 1)}
    found["entropy_norm"] = found["entropy"] / math.log(num_experts) if num_experts > 1 else 0.0
    for name, values in (("hard", counts), ("soft", mass)):
        fraction = [v / sum(values) for v in values]
        mean = 1 / num_experts
        spread = math.sqrt(sum((f - mean) ** 2 for f in fraction) / num_experts)
        found |= {f"{name}_fraction": fraction, f"cv_{name}": spread / mean}
    found["dead_experts"] = counts.count(0)
    found["load_max_over_mean"] = max(counts) / (sum(counts) / num_experts)
    found |= {"drop_rate": 0.0, "aux_loss": aux_weight * sum(balances) / max(len(balances), 1)}
    return found | {"z_loss": z_weight * sum(squares) / max(len(squares), 1)}


def assert_stats(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        got = actual[key].tolist() if key in VECTORS else actual[key]
        assert got == pytest.approx(value, rel=1e-12, abs=1e-12), key


def same(first, second):
    """Entries are equal, bit for bit."""
    assert first["global"].keys() == second["global"].keys()
    groups = [first["global"], *first["layers"].values()]
    for a, b in zip(groups, [second["global"], *second["layers"].values()], strict=True):
        for key, value in a.items():
            assert torch.equal(value, b[key]) if key in VECTORS else value == b[key], key
    return True


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_statistics_equal_plain_loops(top_k, num_experts, masked):
    top_k = min(top_k, num_experts)
    options = {"top_k": top_k, "aux_loss_weight": 0.3, "z_loss_weight": 0.2, "segment_size": 2}
    layer = make_layer(num_experts, router_dropout=0.3, **options)
    with collect_routing_stats(layer) as stats:
        calls = []
        for shape in ((3, 9), (1, 1), (7,), (2, 0), (2, 2, 4), (0, 5)):
            x = torch.randn(*shape, 4)
            mask = torch.rand(shape) < 0.5 if masked else None
            calls.append((layer.forward_with_routing(x, mask)[1], -(-shape[-1] // 2)))
        entry = stats.end_step()
    expected = loops(calls, num_experts, 0.3, 0.2)
    if masked:
        assert expected["num_tokens"] < sum(len(routing.topk_ids) for routing, _ in calls)
    assert_stats(entry["layers"][0], expected)
    assert_stats(entry["global"], expected)
    assert stats.step_history == [entry]


def given(layer, ids, probs):
    """Make a layer route as it is told: ids (S, top_k), probabilities (S, E)."""
    ids, probs = tensor(ids, dtype=torch.int32), tensor(probs)
    counts = torch.stack([(ids == e).sum() for e in range(layer.num_experts)]).int()
    layer._run = lambda x, *_, **__: (x, Routing(probs, probs, ids, ids, counts))


def test_losses_are_those_of_training():
    model = nn.Sequential(
        make_layer(aux_loss_weight=0.1, z_loss_weight=0.2), make_layer(aux_loss_weight=0.3)
    )
    found, totals = [], []
    with collect_routing_stats(model) as stats:
        for _ in range(2):
            model(torch.randn(2, 10, 4))
            totals.append([layer.aux_loss.item() for layer in model])
            found.append(stats.end_step())
        epoch = stats.end_epoch()
        model.eval()(torch.randn(2, 10, 4))
        assert stats.end_step()["global"]["aux_loss"] > 0
    for entry, values in zip(found, totals, strict=True):
        own = entry["layers"]
        assert own[0]["aux_loss"] + own[0]["z_loss"] == pytest.approx(values[0], rel=1e-5)
        assert own[1]["aux_loss"] == pytest.approx(values[1], rel=1e-5)
        total = entry["global"]["aux_loss"] + entry["global"]["z_loss"]
        assert total == pytest.approx(sum(values), rel=1e-5)
    mean = (totals[0][1] + totals[1][1]) / 2
    assert epoch["layers"][1]["aux_loss"] == pytest.approx(mean, rel=1e-5)


def test_global_pools_layers_experts_by_index():
    layers = [make_layer(2, segment_size=1), make_layer(4, segment_size=1)]
    given(layers[0], [[0], [1]], [[0.5, 0.5]] * 2)
    given(layers[1], [[0], [0], [2]], [[0.25] * 4] * 3)
    with collect_routing_stats(nn.Sequential(*layers)) as stats:
        layers[0](torch.zeros(1, 2, 4))
        layers[1](torch.zeros(1, 3, 4))
        entry = stats.compute()
    assert entry["global"]["token_counts"].tolist() == [3, 1, 1, 0]
    assert entry["global"]["num_tokens"] == 5
    assert entry["global"]["entropy"] == pytest.approx((2 * math.log(2) + 3 * math.log(4)) / 5)
    assert entry["global"]["entropy_norm"] == pytest.approx(1.0)
    assert entry["global"]["switch_rate"] == pytest.approx(2 / 3)
    assert [entry["layers"][i]["dead_experts"] for i in range(2)] == [0, 2]
    assert len(entry["layers"][0]["hard_fraction"]) == 2


def test_nothing_routed_counts_nothing():
    layer = make_layer(3, aux_loss_weight=0.1, z_loss_weight=0.1)
    with collect_routing_stats(layer) as stats:
        for shape in ((0, 5), (2, 0), (2, 5)):
            layer(torch.randn(*shape, 4), torch.zeros(shape, dtype=torch.bool))
        found = stats.end_step()["global"]
        assert found.pop("dead_experts") == 3
        assert not any(v.any() if key in VECTORS else v for key, v in found.items())
        layer(torch.randn(2, 5, 4))
        assert stats.end_step()["global"]["num_tokens"] == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_layers_count_once(reentrant, compiled):
    layer = make_layer(top_k=2, router_dropout=0.2, aux_loss_weight=0.1)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x, entries, grads = torch.randn(2, 12, 4, requires_grad=True), [], []
    with collect_routing_stats(layer) as stats:
        for again in (False, True):
            layer.zero_grad()
            torch.manual_seed(3)
            y = checkpoint(call, x, use_reentrant=reentrant) if again else call(x)
            y.square().sum().backward()
            grads.append(layer.router.weight.grad.clone())
            entries.append(stats.end_step())
    assert entries[0]["global"]["num_tokens"] == 2 * 3
    assert same(*entries)
    assert torch.equal(*grads)  # it was run again


def test_frozen_and_evaluated_layers_are_counted():
    """Neither the mode nor what needs a gradient decides what is counted."""
    layer = make_layer()
    x = torch.randn(2, 12, 4)
    with collect_routing_stats(layer) as stats:
        layer(x)
        layer.eval()(x)
        layer.requires_grad_(False)(x)
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        torch.func.grad(lambda z: layer(z).sum())(x)
        assert stats.end_step()["global"]["num_tokens"] == 6 * 2 * 3
        with torch.inference_mode():
            layer(x)
            stats.reset()
            layer(x)
        layer(x)
        assert stats.end_step()["global"]["num_tokens"] == 2 * 2 * 3


WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


def forbid_waits(monkeypatch):
    def wait(*_, **__):
        raise AssertionError("the host waits for a value")

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, wait)


@pytest.mark.parametrize("top_k", [1, 3])
def test_counting_needs_no_value(top_k):
    """What would make the host wait for a GPU raises under fake tensors."""
    with FakeTensorMode():
        layer = make_layer(top_k=top_k)
        mask = torch.ones(2, 12, dtype=torch.bool)
        with collect_routing_stats(layer) as stats:
            routing = layer.forward_with_routing(torch.randn(2, 12, 4), mask)[1]
        sums = measure(routing, 3, 0.1, 0.1)
        assert sums.shape == stats._counters[0].sums.shape == (2 * 3 + 7,)


def test_forward_and_steps_between_readings_do_not_wait(monkeypatch):
    layer = make_layer(2, aux_loss_weight=0.1, z_loss_weight=0.1).eval()
    x = torch.randn(2, 12, 4)
    # The experts of the CPU backend read their offsets.
    given(layer, [[0]] * 6, [[0.7, 0.3]] * 6)
    with collect_routing_stats(layer, every=3) as stats:
        with monkeypatch.context() as patch:
            forbid_waits(patch)
            for _ in range(2):
                layer(x)
                assert stats.end_step() is None
            with pytest.raises(AssertionError, match="the host waits"):
                stats.compute()
        layer(x)
        assert stats.end_step()["global"]["num_tokens"] == 3 * 2 * 3


def test_compiled_layers_count_in_one_graph():
    layer = make_layer(top_k=2)
    x = torch.randn(2, 12, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    counts = []
    with collect_routing_stats(layer) as stats:
        for call in (layer, compiled, compiled):
            call(x)
            counts.append(stats.end_step())
    assert counts[0]["global"]["num_tokens"] == 2 * 3
    assert same(counts[0], counts[1])
    assert same(counts[0], counts[2])
    compiled(x)
    assert stats.end_step()["global"]["num_tokens"] == 0


def test_layers_are_found_wherever_they_are():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2)
    replace_ffn(encoder, segment_sizes=3, num_experts=2)
    model = nn.ModuleDict({"encoder": encoder, "moe": WithRouterLogits(make_layer(segment_size=2))})
    model["dense"] = make_layer(0)
    model["again"] = model["moe"].layer
    x = torch.randn(2, 6, 4)
    with collect_routing_stats(model) as stats:
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[0, 3:] = True
        model["encoder"](x, src_key_padding_mask=padding)
        model["moe"](x)
        model["dense"](x)
        found = stats.compute()["layers"]
    names = ["encoder.layers.0.seg_moe", "encoder.layers.1.seg_moe", "moe.layer"]
    assert stats.layer_names == names
    assert [found[i]["num_tokens"] for i in range(3)] == [3, 3, 2 * 3]


def test_a_layer_may_move():
    layer = make_layer(device="meta")
    with collect_routing_stats(layer) as stats:
        layer(torch.randn(2, 12, 4, device="meta"))
        layer.to_empty(device="cpu").reset_parameters()
        layer(torch.randn(2, 12, 4))
        assert stats.compute()["global"]["num_tokens"] == 2 * 3


def test_statistics_are_read_whatever_the_default_device():
    """As when a script makes its models on the GPU by default; "meta" stands for it."""
    layer, x = make_layer(top_k=2), torch.randn(2, 12, 4)
    with torch.device("meta"), collect_routing_stats(layer) as stats:
        routing = layer.forward_with_routing(x)[1]
        entry = stats.end_step()
        inputs = make_inputs(2, 12, 4, masked=0.5)
    assert_stats(entry["global"], loops([(routing, 3)], 3))
    assert all(tensor.device.type == "cpu" for tensor in inputs)


@pytest.mark.gpu
def test_counts_move_with_their_layer_and_the_host_does_not_wait(device):
    layer = make_layer(top_k=2, aux_loss_weight=0.1, backend="auto")
    x = torch.randn(2, 12, 4)
    with collect_routing_stats(layer) as stats:
        layer(x)
        layer.to(device)(x.to(device))
        x = x.to(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert stats.compute()["global"]["num_tokens"] == 3 * 2 * 3


def test_a_collector_made_in_inference_mode_counts_in_training():
    layer = make_layer()
    with torch.inference_mode():
        stats = collect_routing_stats(layer)
    layer(torch.randn(2, 12, 4)).sum().backward()
    assert stats.compute()["global"]["num_tokens"] == 2 * 3
