"""Plan "block": what it must do beyond giving the layer's results (test_triton_layer.py)."""

import contextlib

import pytest
import torch

from segmoe_kernels import SegMoE
from segmoe_kernels.testing import assert_as_accurate, make_inputs, oracle, route_ids, run_layer

pytest.importorskip("triton")
from segmoe_kernels._triton import plans, tiles


@pytest.fixture(autouse=True)
def _block_plan(monkeypatch):
    monkeypatch.setenv("SEGMOE_PLAN", "block")


def make_layer(device="cpu", dtype=torch.float64, **options):
    torch.manual_seed(2)
    settings = {"d_model": 8, "d_ff": 20, "num_experts": 4, "segment_size": 3, **options}
    settings.setdefault("shared_expert", None)
    layer = SegMoE(**settings, backend="triton", device=device, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:  # they start at 0, which hides what is done to them
                parameter.normal_()
    return layer


def check_equal(layer, inputs):
    actual = run_layer(layer, *inputs)
    expected = run_layer(layer, *inputs, backend="reference")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11, msg=name)
    return actual


def launches(run):
    """Names of the kernels that ``run`` launches, in order."""
    from triton.runtime.interpreter import GridExecutor

    names = []
    real = GridExecutor.__call__

    def spy(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", spy)
        run()
    return names


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 1), (5, 3), (16, 2)])
def test_block_serves_several_programs_and_unrouted_segments(experts, top_k, device):
    layer = make_layer(device, num_experts=experts, top_k=top_k, d_ff=16, segment_size=2)
    inputs = make_inputs(3, 70, 8, dtype=torch.float64, device=device, masked=0.3)
    inputs.padding_mask[1, 30:50] = False  # some segments have no expert at all
    check_equal(layer, inputs)


def test_block_serves_hidden_layers_of_several_chunks(device):
    layer = make_layer(device, torch.float32, num_experts=3, d_ff=130)
    inputs = make_inputs(3, 50, 8, device=device, masked=0.3)
    inputs.padding_mask[1, 20:40] = False
    ids = route_ids(layer, *inputs)
    eager = run_layer(layer, *inputs, backend="reference", topk_ids=ids)
    exact = oracle(layer, *inputs, topk_ids=ids)
    assert_as_accurate(run_layer(layer, *inputs), eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_is_as_accurate_as_eager(dtype, device):
    layer = make_layer(device, dtype, d_model=24, d_ff=72, bias=True)
    inputs = make_inputs(3, 37, 24, dtype=dtype, device=device, masked=0.1)
    ids = route_ids(layer, *inputs)
    eager = run_layer(layer, *inputs, backend="reference", topk_ids=ids)
    exact = oracle(layer, *inputs, topk_ids=ids)
    assert_as_accurate(run_layer(layer, *inputs), eager, exact)


@pytest.mark.parametrize("segment_size", [1, 5, 7, 40])
def test_block_handles_segments_of_any_size(segment_size, device):
    # 40 is longer than a tile.
    layer = make_layer(device, segment_size=segment_size)
    check_equal(layer, make_inputs(2, 43, 8, dtype=torch.float64, device=device))


@pytest.mark.parametrize("d_ff", [16, 15, 17, 40])
def test_block_handles_hidden_layers_of_one_chunk_and_of_more(d_ff, device):
    layer = make_layer(device, d_ff=d_ff, gated=True, bias=True, top_k=2)
    check_equal(layer, make_inputs(2, 20, 8, dtype=torch.float64, device=device))


@pytest.mark.parametrize("top_k", [1, 2])
def test_block_differentiates_every_routing_output(top_k, device):
    layer = make_layer(device, top_k=top_k, router_temperature=0.7)
    x, _, _ = make_inputs(2, 20, 8, dtype=torch.float64, device=device)
    names = ("router_logits", "router_probs", "topk_weights")
    generator = torch.Generator().manual_seed(3)
    upstream = {}

    def gradients(backend):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        y, routing = layer.forward_with_routing(leaf)
        outputs = [y, *(getattr(routing, name) for name in names)]
        for name, out in zip(("y", *names), outputs, strict=True):
            if name not in upstream:
                draw = torch.randn(out.shape, generator=generator, dtype=out.dtype)
                upstream[name] = draw.to(device)
        return torch.autograd.grad(
            outputs, [leaf, *layer.parameters()], [upstream[n] for n in ("y", *names)]
        )

    for actual, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_block_differentiates_the_losses_alone(device):
    layer = make_layer(device)
    x, _, _ = make_inputs(2, 20, 8, dtype=torch.float64, device=device)

    def gradient(backend):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        probs = layer.forward_with_routing(leaf)[1].router_probs
        return torch.autograd.grad(probs.square().sum(), leaf)[0]

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("top_k", [1, 2])
def test_block_saves_x_logits_ids_and_seeds_only(top_k, device):
    layer = make_layer(device, top_k=top_k, dropout=0.1, router_dropout=0.1).train()
    x, _, _ = make_inputs(4, 60, 8, dtype=torch.float64, device=device)
    leaf = x.clone().requires_grad_()
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(t):
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(leaf)
    segments = 4 * 20
    allowed = leaf.numel() * 8 + segments * 4 * 8 + segments * top_k * 4 + 2 * 8
    assert sum(kept.values()) <= allowed


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [1, 2])
def test_block_launches_few_kernels(top_k):
    layer = make_layer(top_k=top_k)
    x, dy, _ = make_inputs(4, 60, 8, dtype=torch.float64)
    with torch.no_grad():
        assert launches(lambda: layer(x)) == ["block_fwd_kernel"]
    assert len(launches(lambda: run_layer(layer, x, dy))) <= 9


@pytest.mark.interpreter
def test_block_launches_nothing_for_frozen_parameters():
    layer = make_layer()
    x, dy, _ = make_inputs(4, 60, 8, dtype=torch.float64)

    def kernels(frozen, *, x_grad):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        leaf = x.clone().requires_grad_(x_grad)
        y = layer(leaf)
        return set(launches(lambda: y.backward(dy)))

    experts, rows = "expert_ffn_dw_kernel", "expert_ffn_dx_kernel"
    everything = kernels(("none",), x_grad=True)
    assert {experts, rows, "reduce_partials_kernel", "sum_splits_kernel"} <= everything
    assert experts not in kernels(("experts",), x_grad=True)
    assert "reduce_partials_kernel" not in kernels(("experts",), x_grad=True)
    assert rows not in kernels(("router",), x_grad=False)
    assert "sum_splits_kernel" not in kernels(("router",), x_grad=True)
    probs = layer.requires_grad_().forward_with_routing(x)[1].router_probs
    assert not {experts, rows} & set(launches(lambda: probs.sum().backward()))


@contextlib.contextmanager
def stores_seen_behind_barriers():
    """Let a program read what it has stored only behind a barrier: other threads stored it."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    store, waiting = InterpreterBuilder.create_masked_store, []

    def flush(*_):
        while waiting:
            store(*waiting.pop(0))

    def flushed(function):
        def replacement(*args, **kwargs):
            flush()
            result = function(*args, **kwargs)
            flush()
            return result

        return replacement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_store", lambda *args: waiting.append(args))
        patch.setattr(InterpreterBuilder, "create_barrier", flush)
        for owner, name in ((InterpreterBuilder, "set_grid_idx"), (GridExecutor, "__call__")):
            patch.setattr(owner, name, flushed(getattr(owner, name)))
        yield


@pytest.mark.interpreter
@pytest.mark.parametrize("d_ff", [16, 40])
@pytest.mark.parametrize("top_k", [1, 3])
def test_block_reads_what_it_stored_behind_barriers_only(top_k, d_ff):
    layer = make_layer(dtype=torch.float32, top_k=top_k, d_ff=d_ff)
    x, _, mask = make_inputs(2, 25, 8, masked=0.2)
    with torch.no_grad():
        expected = layer(x, mask)
        with stores_seen_behind_barriers():
            actual = layer(x, mask)
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ["block", "grouped"])
def test_what_lies_beside_a_segment_changes_none_of_its_bits(plan, dtype, device, monkeypatch):
    monkeypatch.setenv("SEGMOE_PLAN", plan)
    layer = make_layer(device, dtype, top_k=2)
    x = make_inputs(3, 11, 8, dtype=dtype, device=device).x
    with torch.no_grad():
        before = layer(x)
        x[1:] = 3 * x[1:].flip(0)
        after = layer(x)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_block_gives_a_segment_the_same_numbers_in_any_batch(device, monkeypatch):
    """The same bits, however many segments a program has."""
    layer = make_layer(device, torch.float16, top_k=2)
    x = make_inputs(60, 21, 8, dtype=torch.float16, device=device).x
    with torch.no_grad():
        few, more = layer(x[:3]), layer(x[:9])
        # As if a GPU were full of the rows at hand: longer runs of segments.
        monkeypatch.setattr(tiles, "_NUM_SMS", 1)
        many = layer(x)
    options = {"dtype": torch.float16, "gated": False, "extras": False}
    segments = [tiles.block_fwd_tile(8, 20, 4, 2, 3, 7 * n, **options).segments for n in (9, 60)]
    assert segments[0] < segments[1]
    assert torch.equal(more[:3], few)
    assert torch.equal(many[:3], few)


def test_block_is_planned_for_few_experts_on_narrow_rows_of_nvidia(monkeypatch):
    few, many = plans.MIN_BLOCK_ROWS - 1, plans.MIN_BLOCK_ROWS
    for wanted, rows in (("auto", many), ("block", 1)):
        monkeypatch.setenv("SEGMOE_PLAN", wanted)
        assert {plans.choose_plan(64, n, 2, rows, "token") for n in range(2, 17)} == {"block"}
        assert {plans.choose_plan(d, 4, 2, rows, "token") for d in (1, 33, 64)} == {"block"}
        for sizes in ((64, 17, 2, rows, "token"), (65, 4, 2, rows, "token")):
            assert plans.choose_plan(*sizes) == "grouped"
        assert plans.choose_plan(64, 4, 2, rows, "segment") == "grouped"
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "hip", "6.4")
            assert plans.choose_plan(64, 4, 2, rows, "token") == "grouped"
    assert plans.choose_plan(64, 4, 1, 1, "token") == "block"
    monkeypatch.setenv("SEGMOE_PLAN", "auto")
    assert plans.choose_plan(64, 4, 2, few, "token") == "grouped"
    assert plans.choose_plan(64, 4, 1, many, "token") == "grouped"
    monkeypatch.setenv("SEGMOE_PLAN", "grouped")
    assert plans.choose_plan(64, 4, 2, many, "token") == "grouped"


@pytest.mark.parametrize("top_k", [1, 2])
def test_block_draws_the_dropout_of_the_grouped_plan(top_k, device, monkeypatch):
    layer = make_layer(device, top_k=top_k, dropout=0.4, router_dropout=0.3).train()
    inputs = make_inputs(2, 30, 8, dtype=torch.float64, device=device)

    def run():
        torch.manual_seed(11)
        return run_layer(layer, *inputs)

    block = run()
    monkeypatch.setenv("SEGMOE_PLAN", "grouped")
    for name, value in run().items():
        torch.testing.assert_close(block[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize(("top_k", "d_model"), [(1, 24), (2, 24), (1, 136)])
def test_block_runs_under_autocast(top_k, d_model, device):
    layer = make_layer(device, torch.float32, top_k=top_k, d_model=d_model, d_ff=48)
    x, dy, _ = make_inputs(3, 41, d_model, device=device)

    def run(backend):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return run_layer(layer, x, dy, backend=backend, topk_ids=ids)

    ids = None
    actual = run("triton")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ids = route_ids(layer, x)
    eager = run("reference")
    assert {name: value.dtype for name, value in actual.items()} == {
        name: value.dtype for name, value in eager.items()
    }
    assert_as_accurate(actual, eager, oracle(layer, x, dy, topk_ids=ids))


def test_block_returns_ties_to_the_lowest_expert_and_counts(device):
    layer = make_layer(device, top_k=2)
    with torch.no_grad():
        layer.router.weight.zero_()
    x, _, _ = make_inputs(2, 30, 8, dtype=torch.float64, device=device)
    routing = layer.forward_with_routing(x)[1]
    assert torch.equal(routing.topk_ids.cpu(), torch.tensor([[0, 1]] * 20, dtype=torch.int32))
    assert routing.expert_counts.tolist() == [20, 20, 0, 0]


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{}, {"d_ff": 40}, {"top_k": 2, "segment_size": 5}], ids=str)
def test_block_touches_its_tensors_alone(options):
    """Every address of every load and store, those whose values nobody uses too."""
    from benchmarks.traffic_meter import TrafficMeter

    layer = make_layer(dtype=torch.float32, d_model=5, bias=True, gated=True, **options)
    inputs = make_inputs(2, 47, 5, masked=0.3)
    with TrafficMeter():
        run_layer(layer, *inputs)


@pytest.mark.parametrize("top_k", [1, 2])
def test_block_reads_any_strides(top_k, device):
    """Those of dy are its own."""
    layer = make_layer(device, top_k=top_k)
    x, dy, _ = make_inputs(2, 13, 8, dtype=torch.float64, device=device)
    expected = run_layer(layer, x, dy)
    columns = torch.cat([dy, x], 2)
    for other in (dy.transpose(0, 1).contiguous().transpose(0, 1), columns[..., :8]):
        for name, value in run_layer(layer, x, other).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    for name, value in run_layer(layer, columns[..., 8:], dy).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("d_ff", [16, 20, 40])
def test_block_adds_the_last_bias_once(d_ff, device):
    """Whether the hidden layer is one chunk or more."""
    layer = make_layer(device, d_ff=d_ff, bias=True)
    check_equal(layer, make_inputs(2, 13, 8, dtype=torch.float64, device=device))


def test_block_counts_the_segments_of_every_program(device):
    layer = make_layer(device, num_experts=3, top_k=2)
    x, _, mask = make_inputs(2, 250, 8, dtype=torch.float64, device=device, masked=0.2)
    routing = layer.forward_with_routing(x, mask)[1]
    expected = routing.topk_ids[routing.topk_ids >= 0].flatten().bincount(minlength=3)
    assert routing.expert_counts.tolist() == expected.tolist()
    assert routing.expert_counts.sum() > 2 * 128


@pytest.mark.parametrize("top_k", [1, 2])
def test_block_gives_unrouted_segments_no_gradient(top_k, device):
    """Their logits and probabilities are constants, whatever comes back for them."""
    layer = make_layer(device, top_k=top_k)
    x, dy, mask = make_inputs(2, 30, 8, dtype=torch.float64, device=device, masked=0.2)
    mask[1, 10:25] = False
    results = {}
    for backend in ("triton", "reference"):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        y, routing = layer.forward_with_routing(leaf, mask)
        torch.manual_seed(4)
        outputs = (y, routing.router_logits, routing.router_probs, routing.topk_weights)
        upstream = [dy, *(torch.randn_like(out) for out in outputs[1:])]
        wanted = [leaf, layer.router.weight]
        results[backend] = torch.autograd.grad(outputs, wanted, upstream)
    assert (routing.topk_ids < 0).any()
    for actual, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
