"""Routing and experts together: what they must do beyond the results (test_triton_layer.py)."""

import pytest
import torch

from segmoe_kernels import SegMoE
from segmoe_kernels.testing import assert_as_accurate, make_inputs, oracle, route_ids, run_layer

pytest.importorskip("triton")


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


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_part_differentiates_every_routing_output(top_k, device):
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


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_part_saves_nothing_but_x_and_the_routing(top_k, device):
    layer = make_layer(device, top_k=top_k, dropout=0.1, router_dropout=0.1).train()
    x, _, _ = make_inputs(4, 60, 8, dtype=torch.float64, device=device)
    leaf = x.clone().requires_grad_()
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(t):
        if t.data_ptr() not in parameters:  # a view that repeats costs nothing
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(leaf)
    segments, offsets, seeds = 4 * 20, 4 * 5, 2 * 8
    # Of a segment the logits, of a choice its id, weight and place.
    allowed = leaf.numel() * 8 + segments * (4 * 8 + top_k * (4 + 8 + 4)) + offsets + seeds
    assert sum(kept.values()) <= allowed


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_part_launches_few_kernels(top_k):
    layer = make_layer(top_k=top_k)
    x, dy, _ = make_inputs(2, 40, 8, dtype=torch.float64)
    with torch.no_grad():
        assert len(launches(lambda: layer(x))) == 3 + (top_k > 1)
    assert len(launches(lambda: run_layer(layer, x, dy))) <= 10


@pytest.mark.interpreter
def test_routed_part_launches_nothing_for_frozen_parameters():
    layer = make_layer()
    x, dy, _ = make_inputs(2, 40, 8, dtype=torch.float64)

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


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_beside_a_segment_changes_none_of_its_bits(dtype, device):
    layer = make_layer(device, dtype, top_k=2)
    x = make_inputs(3, 11, 8, dtype=dtype, device=device).x
    with torch.no_grad():
        before = layer(x)
        x[1:] = 3 * x[1:].flip(0)
        after = layer(x)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_routed_part_gives_a_segment_the_same_numbers_in_any_batch(device):
    """The same bits, however many rows an expert has."""
    layer = make_layer(device, torch.float16, top_k=2)
    x = make_inputs(60, 21, 8, dtype=torch.float16, device=device).x
    with torch.no_grad():
        few, more, many = layer(x[:3]), layer(x[:9]), layer(x)
    assert torch.equal(more[:3], few)
    assert torch.equal(many[:3], few)


@pytest.mark.parametrize(("top_k", "d_model"), [(1, 24), (2, 24), (1, 136)])
def test_routed_part_runs_under_autocast(top_k, d_model, device):
    options = {"top_k": top_k, "d_model": d_model, "d_ff": 48, "shared_expert": "segment"}
    layer = make_layer(device, torch.float32, **options)
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
