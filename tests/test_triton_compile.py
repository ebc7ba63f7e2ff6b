"""The Triton backend under torch.compile, export, autocast, checkpointing and fake tensors."""

import pytest
import torch
from layers import STATES, make_layer, train_once
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from segmoe_kernels.testing import make_inputs

pytest.importorskip("triton")

CASES = {
    **{name: options for name, (options, _) in STATES.items() if name != "dense"},
    "top2": {"top_k": 2, "pooling": "max"},
    "losses": {"top_k": 2, "aux_loss_weight": 0.1, "z_loss_weight": 0.1},
    "wide": {"d_model": 260, "shared_expert": None, "segment_size": 2},
}
# Compiling takes seconds: one case for each branch of the traced code.
COMPILED = ["default", "causal_last", "segment", "gated_bias", "projected_bias", "losses", "wide"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name, device, **options):
    return make_layer(**{**CASES[name], "backend": "triton", "device": device, **options})


def inputs_for(layer, device, **options):
    return make_inputs(2, 12, layer.d_model, device=device, **options)


def run(function, layer, x, dy):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.backward(dy)
    # Cloned: zero_grad and a graph may write into the same memory again.
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"y": y.detach().clone(), "dx": leaf.grad, **grads}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layer_equals_eager(name, device):
    layer = make(name, device)
    x, dy, _ = inputs_for(layer, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, layer, x, dy), run(layer, layer, x, dy))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("default", torch.no_grad),
        ("default", torch.inference_mode),
        ("default", torch.enable_grad),
        ("wide", torch.no_grad),
    ],
)
def test_compiled_layer_equals_eager_in_every_grad_mode(name, mode, device):
    layer = make(name, device)
    x = inputs_for(layer, device).x
    with mode():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("scope", ["token", "segment"])
def test_compiled_layer_with_padding_and_dropout_equals_eager(scope, device):
    layer = make("top2", device, expert_scope=scope, dropout=0.3, router_dropout=0.2)
    x, dy, mask = inputs_for(layer, device, masked=0.4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    actual = run(lambda x: compiled(x, mask), layer, x, dy)
    torch.manual_seed(1)
    assert_same(actual, run(lambda x: layer(x, mask), layer, x, dy))


def test_compiled_layer_of_any_length_equals_eager(device):
    layer = make("default", device, segment_size=3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in [(2, 12), (3, 10), (5, 7)]:
        x, dy, _ = make_inputs(batch, length, layer.d_model, device=device)
        assert_same(run(compiled, layer, x, dy), run(layer, layer, x, dy))


def test_compiled_layer_under_autocast_equals_eager(device):
    layer = make("gated_bias", device)
    x, dy, _ = inputs_for(layer, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual, expected = run(compiled, layer, x, dy), run(layer, layer, x, dy)
    assert actual["y"].dtype == torch.float32
    assert_same(actual, expected)
    assert not torch.equal(actual["y"], run(layer, layer, x, dy)["y"])


@pytest.mark.skipif(
    torch.__version__ < (2, 10), reason="torch 2.9 loses a size that depends on the batch"
)
@pytest.mark.parametrize("scope", ["token", "segment", "projected"])
def test_exported_layer_equals_eager(scope, device):
    layer = make("default", device, expert_scope=scope, top_k=2, segment_size=3).eval()
    x = inputs_for(layer, device).x
    dims = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("time", min=2, max=64)}
    run = torch.export.export(layer, (x,), dynamic_shapes=(dims,)).module()
    for batch, length in ((2, 12), (5, 2), (3, 3), (2, 4), (2, 5)):
        other = make_inputs(batch, length, layer.d_model, device=device, seed=length).x
        assert torch.equal(run(other), layer(other))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layer_equals_eager(reentrant, device):
    layer = make("top2", device, dropout=0.3, router_dropout=0.2)
    x, dy, _ = inputs_for(layer, device)
    torch.manual_seed(1)
    expected = run(layer, layer, x, dy)
    torch.manual_seed(1)
    actual = run(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x, dy)
    assert_same(actual, expected)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("name", CASES)
def test_layer_on_fake_tensors_needs_no_value(name, padded):
    """What would make the host wait for a GPU raises here; no kernel runs."""
    with FakeTensorMode():
        layer = make(name, "cpu", dropout=0.1, router_dropout=0.1)
        x = torch.randn(2, 12, layer.d_model, requires_grad=True)
        mask = torch.ones(2, 12, dtype=torch.bool) if padded else None
        y = layer(x, mask)
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


@pytest.mark.parametrize("name", ["causal_last", "segment", "gated_bias", "top2", "wide"])
def test_operators_pass_opcheck(name, device):
    """Schemas tell the truth about mutation and aliasing; fake kernels about the outputs."""
    layer = make(name, device, dropout=0.2, router_dropout=0.2)
    x, dy, mask = inputs_for(layer, device, masked=0.3)
    with Recorder() as recorder:
        train_once(layer, x, dy)
        layer(x.requires_grad_(), mask).backward(dy)
    assert recorder.calls
    for operator, args in recorder.calls.items():
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(operator, detached, test_utils=("test_schema", "test_faketensor"))
