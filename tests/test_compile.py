"""The reference backend under torch.compile, fake tensors, checkpointing and on meta."""

from types import SimpleNamespace

import pytest
import torch
from layers import STATES, make_layer, train_once
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import set_loss_scaler
from segmoe_kernels.testing import make_inputs

CASES = {
    **{name: options for name, (options, _) in STATES.items()},
    "top2": {"top_k": 2, "pooling": "max"},
    "losses": {"top_k": 2, "aux_loss_weight": 0.1, "z_loss_weight": 0.1},
}


# Compiling takes seconds: one case for each branch of the traced code.
COMPILED = ["default", "causal_last", "segment", "gated_bias", "projected_bias", "dense", "losses"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_training(first, second):
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for name, grad in first[2].items():
        assert torch.equal(grad, second[2][name]), name


def run_compiled(layer, x, dy, **options):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", **options)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    y.backward(dy)
    return y.detach(), leaf.grad, {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layer_equals_eager(name):
    layer = make_layer(**CASES[name])
    x, dy, _ = make_inputs(2, 12, 4)
    expected = train_once(layer, x, dy)
    expected = (*expected[:2], {key: grad.clone() for key, grad in expected[2].items()})
    assert_same_training(run_compiled(layer, x, dy), expected)


@pytest.mark.parametrize("scope", ["token", "projected"])
def test_compiled_layer_with_padding_and_routing_equals_eager(scope):
    layer = make_layer(expert_scope=scope, top_k=2)
    x, _, mask = make_inputs(2, 12, 4, masked=0.4)
    compiled = torch.compile(layer.forward_with_routing, fullgraph=True, backend="aot_eager")
    y, routing = compiled(x, mask)
    expected, expected_routing = layer.forward_with_routing(x, mask)
    assert torch.equal(y, expected)
    for field, value in expected_routing._asdict().items():
        assert torch.equal(getattr(routing, field), value), field


@pytest.mark.parametrize(
    "mode",
    [
        torch.enable_grad,
        *(pytest.param(m, marks=pytest.mark.slow) for m in (torch.no_grad, torch.inference_mode)),
    ],
)
def test_compiled_layer_of_any_length_recompiles_at_most_twice(mode):
    layer = make_layer(segment_size=3)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch, length in [(2, 12), (3, 12), (3, 10), (5, 7), (4, 31), (7, 8), (2, 12)]:
        x = make_inputs(batch, length, 4).x
        with mode():
            y = compiled(x)
            assert torch.equal(y, layer(x))
        assert y.requires_grad == (mode is torch.enable_grad)
    assert counter.frame_count <= 3


def test_compiled_layer_follows_new_routing():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    counts = set()
    for seed in range(6):
        x = make_inputs(2, 12, 4, seed=seed).x
        assert torch.equal(compiled(x), layer(x))
        counts.add(tuple(layer.forward_with_routing(x)[1].expert_counts.tolist()))
    assert len(counts) > 1


def test_compiled_layer_under_autocast_equals_eager():
    layer = make_layer(top_k=2)
    x, dy, _ = make_inputs(2, 12, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = train_once(layer, x, dy)
        expected = (*expected[:2], {key: grad.clone() for key, grad in expected[2].items()})
        assert_same_training(run_compiled(layer, x, dy), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_checkpoint_updates_the_loss_and_scales_it(backend):
    layer = make_layer(aux_loss_weight=0.1).double().float()
    falsy = type("Falsy", (torch.amp.GradScaler,), {"__bool__": lambda _: False})
    scaler = falsy("cpu", init_scale=4.0)
    # What can't be referred to weakly does as well.
    set_loss_scaler(layer, scaler if backend == "eager" else SimpleNamespace(scale=scaler.scale))

    def call(x):
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for scale in (4.0, 8.0):
        x = make_inputs(2, 12, 4, seed=int(scale)).x.requires_grad_()
        scaler.scale(torch.ones(()))
        scaler.update(scale)
        found = []
        for run in (layer, compiled):
            layer.zero_grad()
            (0 * run(x)).sum().backward()
            found.append((layer.aux_loss, layer.router.weight.grad.clone()))
            layer(torch.zeros_like(x))  # leaves another loss behind, and none before
            assert not torch.equal(found[-1][0], layer.aux_loss)
        (loss, grad), (compiled_loss, compiled_grad) = found
        assert torch.equal(compiled_loss, loss)
        assert torch.equal(compiled_grad, grad)
        assert grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layer_equals_eager(reentrant):
    layer = make_layer(top_k=2, dropout=0.3, router_dropout=0.2)
    x, dy, _ = make_inputs(2, 12, 4)
    torch.manual_seed(1)
    expected = train_once(layer, x, dy)
    expected = (*expected[:2], {key: grad.clone() for key, grad in expected[2].items()})
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = checkpoint(layer, leaf, use_reentrant=reentrant)
    y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert_same_training((y.detach(), leaf.grad, grads), expected)


@pytest.mark.parametrize("shape", [(2, 12, 4), (7, 4), (2, 3, 4, 4), (0, 12, 4)])
@pytest.mark.parametrize("name", CASES)
def test_layer_on_meta_gives_shapes(name, shape):
    layer = make_layer(**CASES[name], device="meta")
    x = torch.empty(shape, device="meta", requires_grad=True)
    mask = torch.empty(shape[:-1], dtype=torch.bool, device="meta")
    for chosen in (None, mask):
        y, routing = layer.forward_with_routing(x, chosen)
        assert y.device.type == routing.topk_ids.device.type == "meta"
        assert y.shape == shape
        real = make_layer(**CASES[name]).forward_with_routing(torch.zeros(shape))[1]
        for field, value in real._asdict().items():
            assert getattr(routing, field).shape == value.shape, field
            assert getattr(routing, field).dtype == value.dtype, field
        y.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_layer_on_fake_tensors_needs_no_value(name, padded):
    """What would make the host wait for a GPU raises here; grouped_ffn alone is opaque."""
    with FakeTensorMode():
        layer = make_layer(**CASES[name], dropout=0.1, router_dropout=0.1)
        x = torch.randn(2, 12, 4, requires_grad=True)
        mask = torch.ones(2, 12, dtype=torch.bool) if padded else None
        y = layer(x, mask)
        y.backward(torch.randn(2, 12, 4))
        assert y.shape == x.grad.shape == x.shape
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize(
    "wait", [torch.Tensor.item, torch.Tensor.tolist, torch.nonzero, lambda t: bool(t.sum() > 0)]
)
def test_fake_tensors_notice_a_wait(wait):
    with FakeTensorMode():
        x = torch.zeros(1)
        with pytest.raises((RuntimeError, DynamicOutputShapeException)):
            wait(x)


@pytest.mark.parametrize("wrong", ["other order", "column", "flat", "floats"])
def test_a_wrong_mask_is_refused_in_compiled_code_too(wrong):
    """All have as many elements as the mask: used as they are, they would hide other steps."""
    x, mask = make_inputs(2, 12, 4).x, torch.rand(2, 12) > 0.4
    masks = {"other order": mask.t(), "column": mask[..., None], "flat": mask.flatten()}
    masks["floats"] = torch.zeros(2, 12).masked_fill(~mask, -torch.inf)
    compiled = torch.compile(make_layer(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"SegMoE\.forward: expected padding_mask to have"):
        compiled(x, masks[wrong])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("top_k", 9, r"top_k to be in \[1, num_experts=4\]"),
        ("segment_size", 4, "router_weight to have shape"),
        ("pooling", "min", "pooling to be one of"),
        ("expert_scope", "steps", "expert_scope to be one of"),
        ("activation", "tanh", "activation to be one of"),
        ("dropout", 1.5, "dropout to be in"),
        ("router_temperature", float("nan"), "router_temperature to be finite"),
        ("router_temperature", -1.0, "router_temperature to be finite"),
        ("shared_gate", torch.nn.Linear(4, 1, bias=False), "shared_gate to have shape"),
    ],
)
def test_a_wrong_option_is_refused_in_compiled_code_too(option, value, words):
    """Set on the layer after it was made, also after code was compiled for the old one."""
    layer, x = make_layer(num_experts=4, segment_size=3), make_inputs(2, 12, 4).x
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    if not isinstance(value, float):  # which become symbols then, that no message can print
        compiled(x)
    setattr(layer, option, value)
    for call in (layer, compiled):
        with pytest.raises(Exception, match=rf"segmoe_kernels\.seg_moe: expected {words}"):
            call(x)


def test_a_scaler_set_on_the_layer_acts_in_compiled_code():
    layer, x = make_layer(aux_loss_weight=0.1), make_inputs(2, 12, 4).x
    layer.loss_scaler = SimpleNamespace(scale=lambda loss: 8.0 * loss)
    grads = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        (0 * call(x)).sum().backward()
        grads.append(layer.router.weight.grad.clone())
    layer.loss_scaler = None
    layer.zero_grad()
    (0 * layer(x)).sum().backward()
    assert grads[0].any()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], 8 * layer.router.weight.grad)
