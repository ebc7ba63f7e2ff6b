"""`SegMoE.step`: chunks of a sequence give what one call over all of it gives."""

import io
import random

import pytest
import torch
from layers import make_layer
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from segmoe_kernels import collect_routings
from segmoe_kernels.layer.decoding import StepState
from segmoe_kernels.testing import make_inputs

T = 11


def draw_cuts(seed):
    """Lengths of chunks of T steps, 0 among them."""
    chosen = random.Random(seed)
    places = sorted(chosen.choices(range(T + 1), k=4))
    return [b - a for a, b in zip([0, *places], [*places, T], strict=True)]


CUTS = {
    "whole": [T],
    "singles": [1] * T,
    "nothing_first": [0, 4, 0, 7],
    **{f"drawn_{seed}": draw_cuts(seed) for seed in range(3)},
}
# Options, and the share of masked steps.
CASES = {
    "concat": ({"segment_size": 4}, 0.0),
    "mean": ({"pooling": "mean", "segment_size": 3, "top_k": 2, "shared_expert": "token"}, 0.6),
    "max": ({"pooling": "max", "segment_size": 2, "top_k": 3, "gated": True, "bias": True}, 0.5),
    "first": ({"pooling": "first", "segment_size": 4, "renormalize": True}, 0.5),
    "last": ({"pooling": "last", "segment_size": 1, "router_temperature": 0.3}, 0.3),
    "shared": ({"segment_size": 3, "shared_expert": "token", "top_k": 2}, 0.7),
    "longer_than_all": ({"segment_size": 20, "pooling": "mean"}, 0.2),
    "dense": ({"num_experts": 0}, 0.4),
}


def causal(**options):
    return make_layer(**{"causal": True, "shared_expert": None, **options})


def in_chunks(layer, x, mask, cuts, **options):
    """``(y, state)`` of calls one behind the other."""
    out, state, start = [], None, 0
    for count in cuts:
        real = None if mask is None else mask[..., start : start + count]
        y, state = layer.step(x[..., start : start + count, :], state, real, **options)
        out.append(y)
        start += count
    return torch.cat(out, -2), state


def assert_chunks_equal_a_call(layer, inputs, cuts, **tolerance):
    """Outputs and all gradients."""
    x, dy, mask = inputs
    wanted = [x.requires_grad_(), *layer.parameters()]
    expected, (actual, _) = layer(x, mask), in_chunks(layer, x, mask, cuts)
    torch.testing.assert_close(actual, expected, **tolerance)
    found, grads = (torch.autograd.grad(y, wanted, dy) for y in (actual, expected))
    torch.testing.assert_close(found, grads, **tolerance)
    return actual, expected


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_one_call(name, cuts):
    options, masked = CASES[name]
    layer = causal(**options, dtype=torch.float64)
    inputs = make_inputs(3, T, 4, dtype=torch.float64, masked=masked)
    actual, expected = assert_chunks_equal_a_call(layer, inputs, cuts)
    if cuts == [T]:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "name", ["shared", *(pytest.param(n, marks=pytest.mark.slow) for n in ("max", "last"))]
)
def test_chunks_on_the_kernels_equal_one_call(name, device):
    pytest.importorskip("triton")
    options, masked = CASES[name]
    layer = causal(**options, backend="triton").to(device)
    inputs = make_inputs(2, 5, 4, device=device, masked=masked)
    assert_chunks_equal_a_call(layer, inputs, [2, 3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_any_batch_dimensions(batch):
    layer = causal(segment_size=3)
    x = make_inputs(*batch, T, 4).x
    y, state = in_chunks(layer, x, None, [5, 6])
    torch.testing.assert_close(y, layer(x))
    assert state.steps.shape == (*batch, 3, 4)
    assert state.place.shape == batch


def test_maps_that_are_called_and_autocast():
    layer = causal(segment_size=3, shared_expert="token", top_k=2)
    called = []
    layer.shared_expert.up_proj.register_forward_hook(lambda *_: called.append(1))
    x = make_inputs(2, T, 4).x
    torch.testing.assert_close(in_chunks(layer, x, None, [4, 6, 1])[0], layer(x))
    assert len(called) == 4
    with torch.autocast("cpu", torch.bfloat16):
        y, state = in_chunks(layer, x, None, [4, 6, 1])
        torch.testing.assert_close(y, layer(x), rtol=2**-6, atol=2**-6)
    assert y.dtype == state.steps.dtype == torch.float32


@pytest.mark.parametrize("cuts", [CUTS["whole"], CUTS["singles"], CUTS["drawn_1"]])
@pytest.mark.parametrize("name", ["concat", "mean", "last"])
def test_skipped_padding_gives_each_sequence_what_it_has_alone(name, cuts):
    layer = causal(**CASES[name][0])
    x, _, mask = make_inputs(3, T, 4, masked=0.3)
    mask[0, :5] = mask[1] = False  # padding on the left; nothing real
    x = x.masked_fill(~mask[..., None], torch.nan)
    y, _ = in_chunks(layer, x, mask, cuts, skip_padding=True)
    assert not y[~mask].any()
    for own, steps, real in zip(y, x, mask, strict=True):
        torch.testing.assert_close(own[real], layer(steps[real]))


def test_state_is_reordered_saved_and_left_as_it_was():
    layer = causal(segment_size=4, top_k=2).eval()
    x = make_inputs(3, T, 4).x
    _, state = layer.step(x[:, :6])
    before = [tensor.clone() for tensor in state]
    order = torch.tensor([2, 0, 0, 1])
    y, _ = layer.step(x[order, 6:], state.index_select(order))
    torch.testing.assert_close(y, layer(x[order])[:, 6:])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is StepState
    moved = state.to("meta").to("meta")
    assert {tensor.device.type for tensor in moved} == {"meta"}
    for kept in (state, loaded):
        assert all(map(torch.equal, kept, before))
    assert [t.dtype for t in moved] == [t.dtype for t in state]


@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_steps_compile_once(grad):
    """In one graph, hence without a question to the device."""
    torch._dynamo.reset()
    layer = causal(segment_size=3)
    counter = CompileCounter()
    compiled = torch.compile(layer.step, fullgraph=True, backend=counter)
    x = make_inputs(2, T, 4).x
    with torch.set_grad_enabled(grad):
        out, state = [], None
        for start, end in [(0, 4), *((t, t + 1) for t in range(4, T))]:
            y, state = compiled(x[:, start:end], state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), layer(x))
    assert counter.frame_count == 2  # a prompt, one step
    torch._dynamo.reset()


def test_a_step_costs_one_row_of_the_experts():
    layer = causal(segment_size=8, pooling="last", top_k=2)
    x = make_inputs(1, 24, 4).x
    _, state = layer.step(x[:, :11])
    flops = []
    for call in (lambda: layer.step(x[:, 11:12], state), lambda: layer(x[:, :1])):
        with FlopCounterMode(display=False) as counter:
            call()
        flops.append(counter.get_total_flops())
    row, router = 2 * 2 * 2 * 4 * 6, 2 * 4 * 3
    assert flops[0] == row + 2 * router
    assert flops[1] == 8 * row + router


def test_training_draws_dropout_and_the_routers_once_a_segment():
    x = make_inputs(4, 16, 4).x
    layer = causal(segment_size=4, dropout=0.5)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer.step(x)[0], expected)
    assert not torch.equal(in_chunks(layer, x, None, [4] * 4)[0], layer.eval()(x))

    layer = causal(segment_size=4, router_dropout=0.5)
    state, seen = None, []
    for t in range(16):
        _, state = layer.step(x[:, t : t + 1], state)
        seen.append(state.topk_weights)
    seen = torch.stack(seen).squeeze(-1)  # (16, 4), of the segment that runs behind each step
    assert torch.equal(seen[:3], seen[:1].expand(3, -1))
    assert torch.equal(seen[3:7], seen[3:4].expand(4, -1))
    # Kept probabilities are doubled: above what any softmax of these gives.
    assert (layer.eval().step(x)[1].topk_weights < seen[15]).any()


def test_calls_are_not_counted():
    layer = causal(segment_size=4)
    with collect_routings(layer) as routings:
        layer.step(make_inputs(2, T, 4).x)
    assert not routings
