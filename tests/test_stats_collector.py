"""A collector of statistics in a program: histories, epochs, copies, checkpoints, ranks."""

import copy
import io
import pickle

import pytest
import torch
from layers import make_layer
from test_stats import given, same
from torch import nn

from segmoe_kernels import SegMoE, collect_routing_stats


def test_close_leaves_layers_as_they_were():
    model = nn.Sequential(make_layer(), make_layer())
    before = [dict(layer.__dict__) for layer in model]
    x = torch.randn(2, 12, 4)
    outer = collect_routing_stats(model)
    with collect_routing_stats(model[1]) as inner:
        model(x)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    copied(x)
    pickled(x)
    model(x)
    assert inner.end_step()["global"]["num_tokens"] == 2 * 3
    outer.close()
    outer.close()
    model(x)
    assert [outer.compute()["layers"][i]["num_tokens"] for i in range(2)] == [12, 12]
    assert [set(layer.__dict__) for layer in model] == [set(kept) for kept in before]
    assert not any(layer._observers for layer in (*model, *copied, *pickled))


def test_close_happens_on_an_error():
    layer = make_layer()
    with pytest.raises(ZeroDivisionError), collect_routing_stats(layer):
        raise ZeroDivisionError
    assert not layer._observers


def test_histories_of_steps_and_epochs():
    layer = make_layer(segment_size=1)
    stats = collect_routing_stats(layer, every=2)
    returned = []
    for epoch in range(2):
        for size in (1, 2, 3, 4, 5):
            layer(torch.randn(size, 1, 4))
            returned.append(stats.end_step())
            middle = stats.compute()
            assert middle["global"]["num_tokens"] == sum(range(size + 1))
            assert middle["epoch"] == epoch
        stats.end_epoch()
    assert [entry is not None for entry in returned] == [False, True] * 5
    assert [entry for entry in returned if entry] == stats.step_history
    # The fifth step's segments went into the first epoch, and into no step of the second.
    assert [e["global"]["num_tokens"] for e in stats.step_history] == [3, 7, 1, 5, 9]
    assert [e["step"] for e in stats.step_history] == [2, 4, 6, 8, 10]
    assert [e["epoch"] for e in stats.step_history] == [0, 0, 1, 1, 1]
    assert [(e["step"], e["epoch"]) for e in stats.epoch_history] == [(5, 0), (10, 1)]
    assert [e["global"]["num_tokens"] for e in stats.epoch_history] == [15, 15]
    assert stats.compute()["global"]["num_tokens"] == 0


def test_reset_forgets_the_epoch_and_keeps_histories():
    layer = make_layer()
    stats = collect_routing_stats(layer)
    layer(torch.randn(2, 5, 4))
    kept = stats.end_step()
    layer(torch.randn(2, 5, 4))
    stats.reset()
    layer(torch.randn(3, 5, 4))
    assert stats.compute()["global"]["num_tokens"] == 3
    assert stats.step_history == [kept]


def test_state_dict_goes_on_where_it_was():
    layer = make_layer(top_k=2, aux_loss_weight=0.1)
    stats = collect_routing_stats(layer, every=2)
    inputs = torch.randn(6, 2, 10, 4)
    for x in inputs[:3]:
        layer(x)
        stats.end_step()
    layer(inputs[3])
    stream = io.BytesIO()
    held = stats.state_dict()
    torch.save(held, stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    again = copy.deepcopy(layer)
    restored = collect_routing_stats(again, every=2)
    restored.load_state_dict(state)
    for model, found in ((layer, stats), (again, restored)):
        for x in inputs[4:]:
            model(x)
            found.end_step()
        found.end_epoch()
    assert len(stats.step_history) == len(restored.step_history) == 2
    for one, other in zip(stats.step_history, restored.step_history, strict=True):
        assert one["step"] == other["step"]
        assert same(one, other)
    assert same(stats.epoch_history[0], restored.epoch_history[0])
    assert stats.epoch_history[0]["global"]["num_tokens"] == 6 * 2 * 2
    # What was saved and loaded is nobody's but its own.
    for kept in (state, held):
        assert kept["step"] == 3
        assert len(kept["step_history"]) == 1


def test_counts_beyond_float32_are_exact():
    layer = make_layer(2, segment_size=1)
    with collect_routing_stats(layer) as stats:
        state = stats.state_dict()
        state["totals"][0][0] = float(2**24)
        stats.load_state_dict(state)
        given(layer, [[0]], [[1.0, 0.0]])
        layer(torch.zeros(1, 1, 4))
        assert stats.compute()["global"]["token_counts"].tolist() == [2**24 + 1, 0]


def test_summing_ranks_needs_a_group():
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed: call"):
        collect_routing_stats(SegMoE(4, 6, 2), all_reduce=True)


@pytest.mark.parametrize("key", ["totals", "sums"])
@pytest.mark.parametrize(
    ("value", "exception", "words"),
    [
        ([], ValueError, r"have tensors of shapes \[\(13,\)\], got \[\]"),
        ([torch.tensor(7.0)], ValueError, r"have tensors of shapes \[\(13,\)\], got \[\(\)\]"),
        ([[0.0]], ValueError, r"have tensors of shapes \[\(13,\)\], got \['list'\]"),
        (torch.zeros(1, 13), TypeError, "be a list, got Tensor"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key, value, exception, words):
    layer = make_layer()
    stats = collect_routing_stats(layer)
    layer(torch.randn(2, 5, 4))
    before = stats.state_dict()
    with pytest.raises(exception, match=rf"expected state\['{key}'\] to {words}"):
        stats.load_state_dict({**before, "step": 9, "epoch": 9, key: value})
    assert torch.equal(stats.state_dict()["sums"][0], before["sums"][0])
    assert (stats.state_dict()["step"], stats.state_dict()["epoch"]) == (0, 0)
    assert stats.end_step()["global"]["num_tokens"] == 2
