"""Layers under torch.compile, export, autocast, fake tensors and on meta, on both backends."""

from types import SimpleNamespace

import pytest
import torch
from layers import STATES, assert_same_bits, both_backends, make_layer, needs_triton, place
from layers import train_once as train
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import set_loss_scaler
from segmoe_kernels.testing import make_inputs

CASES = {
    **{name: options for name, (options, _) in STATES.items()},
    "top2": {"top_k": 2, "pooling": "max"},
    "losses": {"top_k": 2, "aux_loss_weight": 0.1, "z_loss_weight": 0.1},
    "wide": {"d_model": 260, "shared_expert": None, "segment_size": 2},
}
# Compiling takes seconds: one case for each branch of the traced code.
COMPILED = ["default", "causal_last", "segment", "gated_bias", "projected_bias", "losses"]


def cases(names, reference=(), triton=()):
    found = [("reference", name) for name in (*names, *reference)]
    marked = (pytest.param("triton", name, marks=needs_triton) for name in (*names, *triton))
    return pytest.mark.parametrize(("backend", "name"), [*found, *marked])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name, backend, **options):
    return make_layer(**{**CASES[name], "backend": backend, "device": place(backend), **options})


def inputs_for(layer, backend, **options):
    return make_inputs(2, 12, layer.d_model, device=place(backend), **options)


def compiled(layer, backend="aot_eager", **options):
    return torch.compile(layer, fullgraph=True, backend=backend, **options)


@cases(COMPILED, reference=["dense"], triton=["wide"])
def test_compiled_layer_equals_eager(name, backend):
    layer = make(name, backend)
    x, dy, _ = inputs_for(layer, backend)
    assert_same_bits(train(layer, x, dy, run=compiled(layer)), train(layer, x, dy))


@needs_triton
@pytest.mark.parametrize(
    ("name", "mode"),
    [*(("default", getattr(torch, m)) for m in ("no_grad", "inference_mode", "enable_grad")),
     ("wide", torch.no_grad)],
)  # fmt: skip
def test_compiled_layer_equals_eager_in_every_grad_mode(name, mode):
    layer = make(name, "triton")
    x = inputs_for(layer, "triton").x
    with mode():
        assert torch.equal(compiled(layer, "eager")(x), layer(x))


@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
@both_backends
def test_compiled_layer_with_padding_and_routing_equals_eager(scope, backend):
    """Also with dropout, which the reference's compiled code draws otherwise."""
    rates = {"dropout": 0.3, "router_dropout": 0.2} if backend == "triton" else {}
    layer = make("default", backend, expert_scope=scope, top_k=2, **rates)
    x, dy, mask = inputs_for(layer, backend, masked=0.4)
    found = []
    for call in (layer.forward_with_routing, compiled(layer.forward_with_routing)):
        torch.manual_seed(1)
        routings = []

        def run(x, mask, call=call, routings=routings):
            y, routing = call(x, mask)
            routings.append(routing)
            return y

        results = train(layer, x, dy, mask, run=run)
        found.append({**results, **routings[0]._asdict()})
    assert_same_bits(*found)


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
    call = compiled(layer, counter)
    for batch, length in [(2, 12), (3, 12), (3, 10), (5, 7), (4, 31), (7, 8), (2, 12)]:
        x = make_inputs(batch, length, 4).x
        with mode():
            y = call(x)
            assert torch.equal(y, layer(x))
        assert y.requires_grad == (mode is torch.enable_grad)
    assert counter.frame_count <= 3


@needs_triton
def test_compiled_kernels_of_any_length_equal_eager():
    layer = make("default", "triton", segment_size=3)
    call = compiled(layer, dynamic=True)
    for batch, length in [(2, 12), (3, 10), (5, 7)]:
        x, dy, _ = make_inputs(batch, length, layer.d_model, device=place("triton"))
        assert_same_bits(train(layer, x, dy, run=call), train(layer, x, dy))


@both_backends
def test_compiled_layer_under_autocast_equals_eager(backend):
    layer = make("gated_bias", backend)
    x, dy, _ = inputs_for(layer, backend)
    with torch.autocast(place(backend), dtype=torch.bfloat16):
        actual, expected = train(layer, x, dy, run=compiled(layer)), train(layer, x, dy)
    assert actual["y"].dtype == torch.float32
    assert_same_bits(actual, expected)
    assert not torch.equal(actual["y"], train(layer, x, dy)["y"])


@needs_triton
@pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="torch 2.9 loses a size that depends on the batch"
)
@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
def test_exported_kernels_equal_eager(scope):
    layer = make("default", "triton", expert_scope=scope, top_k=2, segment_size=3).eval()
    x = inputs_for(layer, "triton").x
    dims = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("time", min=2, max=64)}
    run = torch.export.export(layer, (x,), dynamic_shapes=(dims,)).module()
    for batch, length in ((2, 12), (5, 2), (3, 3), (2, 4), (2, 5)):
        other = make_inputs(batch, length, layer.d_model, device=place("triton"), seed=length).x
        assert torch.equal(run(other), layer(other))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_checkpoint_updates_the_loss_and_scales_it(backend):
    layer = make_layer(aux_loss_weight=0.1).double().float()
    falsy = type("Falsy", (torch.amp.GradScaler,), {"__bool__": lambda _: False})
    scaler = falsy("cpu", init_scale=4.0)
    # What can't be referred to weakly does as well.
    set_loss_scaler(layer, scaler if backend == "eager" else SimpleNamespace(scale=scaler.scale))
    call = compiled(lambda x: checkpoint(layer, x, use_reentrant=False), backend)
    for scale in (4.0, 8.0):
        x = make_inputs(2, 12, 4, seed=int(scale)).x.requires_grad_()
        scaler.scale(torch.ones(()))
        scaler.update(scale)
        found = []
        for run in (layer, call):
            layer.zero_grad()
            (0 * run(x)).sum().backward()
            found.append((layer.aux_loss, layer.router.weight.grad.clone()))
            layer(torch.zeros_like(x))  # leaves another loss behind, and none before
            assert not torch.equal(found[-1][0], layer.aux_loss)
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        assert found[0][1].any()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 12, 4)])
@pytest.mark.parametrize("name", [name for name in CASES if name != "wide"])
def test_layer_on_meta_gives_shapes(name, shape):
    layer = make_layer(**CASES[name], device="meta")
    x = torch.empty(shape, device="meta", requires_grad=True)
    real = make_layer(**CASES[name]).forward_with_routing(torch.zeros(shape))[1]
    for mask in (None, torch.empty(shape[:-1], dtype=torch.bool, device="meta")):
        y, routing = layer.forward_with_routing(x, mask)
        assert y.is_meta
        assert y.shape == shape
        for field, value in real._asdict().items():
            found = getattr(routing, field)
            assert (found.shape, found.dtype, found.is_meta) == (value.shape, value.dtype, True)
        y.sum().backward()
        assert x.grad.shape == shape


@cases([name for name in CASES if name not in {"wide", "dense"}], ["dense"], ["wide"])
def test_layer_on_fake_tensors_needs_no_value(name, backend):
    """What would make the host wait for a GPU raises here; no kernel runs."""
    for padded in (False, True):
        with FakeTensorMode():
            layer = make_layer(**CASES[name], backend=backend, dropout=0.1, router_dropout=0.1)
            x = torch.randn(2, 12, layer.d_model, requires_grad=True)
            y = layer(x, torch.ones(2, 12, dtype=torch.bool) if padded else None)
            y.backward(torch.randn(2, 12, layer.d_model))
            assert y.shape == x.grad.shape == x.shape
            assert all(p.grad.shape == p.shape for p in layer.parameters())


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of one of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "segmoe_kernels":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize(
    "name",
    ["causal_last", "segment", "gated_bias", "top2", pytest.param("wide", marks=pytest.mark.slow)],
)
def test_operators_pass_opcheck(name):
    """Schemas tell the truth about mutation and aliasing; fake kernels about the outputs."""
    layer = make(name, "triton", dropout=0.2, router_dropout=0.2)
    x, dy, mask = inputs_for(layer, "triton", masked=0.3)
    with Recorder() as recorder:
        train(layer, x, dy)
        layer(x.requires_grad_(), mask).backward(dy)
    assert recorder.calls
    for operator, args in recorder.calls.items():
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(operator, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("wrong", ["other order", "column", "flat", "floats"])
def test_a_wrong_mask_is_refused_in_compiled_code_too(wrong):
    """All have as many elements as the mask: used as they are, they would hide other steps."""
    x, mask = make_inputs(2, 12, 4).x, torch.rand(2, 12) > 0.4
    masks = {"other order": mask.t(), "column": mask[..., None], "flat": mask.flatten()}
    masks["floats"] = torch.zeros(2, 12).masked_fill(~mask, -torch.inf)
    with pytest.raises(Exception, match=r"SegMoE\.forward: expected padding_mask to have"):
        compiled(make_layer(), "eager")(x, masks[wrong])


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
    call = compiled(layer, "eager")
    if not isinstance(value, float):  # which become symbols then, that no message can print
        call(x)
    setattr(layer, option, value)
    for refusing in (layer, call):
        with pytest.raises(Exception, match=rf"segmoe_kernels\.seg_moe: expected {words}"):
            refusing(x)
