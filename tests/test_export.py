"""Exported programs of the reference: any length, on runtimes that don't know the package."""

import subprocess
import sys
from itertools import product

import pytest
import torch
from layers import STATES, make_layer
from torch import nn

from segmoe_kernels import collect_routing_stats, collect_routings, functional
from segmoe_kernels.testing import make_inputs

AUTO = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
NAMED = {0: torch.export.Dim("batch", min=2, max=99), 1: torch.export.Dim("time", min=2, max=99)}
OPTIONS = {
    **{name: options for name, (options, _) in STATES.items()},
    "segment_top2": {"expert_scope": "segment", "top_k": 2},
    "mean_top2": {"pooling": "mean", "top_k": 2, "gated": True, "bias": True},
    "first": {"pooling": "first", "renormalize": True},
    "max_top3": {"pooling": "max", "top_k": 3, "shared_expert": None},
}
# Exporting takes seconds: some cases that cover the traced code, all of them with -m slow.
CHOSEN = {
    ("default", 5, False): AUTO,
    ("segment_top2", 3, True): NAMED,
    ("causal", 1, False): NAMED,
}
EXPORTED = [
    pytest.param(*case, dims, marks=[] if CHOSEN.get(case) is dims else pytest.mark.slow)
    for case in product(OPTIONS, (1, 3, 5), (False, True))
    for dims in (AUTO, NAMED)
]


class WithRouting(nn.Module):
    """Returns the routing as well, as tensors."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, padding_mask=None):
        """Return y and the fields of its routing."""
        y, routing = self.layer.forward_with_routing(x, padding_mask)
        return y, *routing


def inputs_of(batch, length, masked, dtype=torch.float64):
    x, _, mask = make_inputs(batch, length, 4, dtype=dtype, masked=0.4, seed=length)
    return (x, mask) if masked else (x,)


def export(model, masked, dims, dtype=torch.float64):
    inputs = inputs_of(3, 8, masked, dtype)
    return torch.export.export(model, inputs, dynamic_shapes=(dims,) * len(inputs))


def namespaces(program):
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}


def assert_same(actual, expected):
    """Equal to rounding: an exported layer groups the same products otherwise."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "segment_size", "masked", "dims"), EXPORTED)
def test_exported_layer_equals_eager_at_any_length(name, segment_size, masked, dims):
    layer = make_layer(**OPTIONS[name], segment_size=segment_size, dtype=torch.float64).eval()
    program = export(WithRouting(layer), masked, dims)
    assert namespaces(program) == {"aten"}
    run, eager = program.module(), WithRouting(layer)
    for length in range(2, 2 * segment_size + 3):
        inputs = inputs_of(2 + length % 3, length, masked)
        assert_same(run(*inputs), eager(*inputs))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A layer and the file of its program."""
    options = {"expert_scope": "projected", "num_experts": 2, "top_k": 2, "bias": True}
    layer = make_layer(**options, activation="silu", segment_size=3, dtype=torch.float64)
    path = tmp_path_factory.mktemp("saved") / "layer.pt2"
    torch.export.save(export(layer, True, AUTO), path)
    return layer, path


def test_exported_layer_has_the_gradients_of_the_layer(saved):
    layer, path = saved
    run = torch.export.load(path).module()
    for length in (5, 7, 9):
        inputs = inputs_of(2, length, True)
        expected = torch.autograd.grad(layer(*inputs).square().sum(), [*layer.parameters()])
        actual = torch.autograd.grad(run(*inputs).square().sum(), [*run.parameters()])
        assert_same(actual, expected)


def test_saved_program_runs_where_the_package_is_not(saved, tmp_path):
    layer, path = saved
    calls = [inputs_of(2, length, True) for length in (2, 6, 7)]
    torch.save([(inputs, layer(*inputs).detach()) for inputs in calls], tmp_path / "calls.pt")
    script = f"""
import sys, torch
sys.modules["segmoe_kernels"] = None  # importing it fails
run = torch.export.load({str(path)!r}).module()
for inputs, y in torch.load("calls.pt"):
    torch.testing.assert_close(run(*inputs), y, rtol=1e-12, atol=1e-14)
print("equal")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_what_watches_a_layer_is_not_exported():
    layer = make_layer(dtype=torch.float64)
    expected = export(layer, False, AUTO).graph
    with collect_routings(layer) as routings, collect_routing_stats(layer) as stats:
        program = export(layer, False, AUTO)
    assert [str(n.target) for n in program.graph.nodes] == [str(n.target) for n in expected.nodes]
    assert not routings
    assert stats.compute()["global"]["num_tokens"] == 0


def assert_onnx_equals_eager(program, layer, masked, dtype, path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    for batch, length in [(1, 1), (1, 7), *((2, length) for length in range(2, 9))]:
        inputs = inputs_of(batch, length, masked, dtype)
        feed = {n: t.numpy() for n, t in zip(names, inputs, strict=True)}
        torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), layer(*inputs))


def test_onnx_model_equals_eager_at_any_length(saved, tmp_path):
    layer, path = saved
    program = torch.export.load(path)
    assert_onnx_equals_eager(program, layer, True, torch.float64, tmp_path / "layer.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_onnx_model_of_every_kind_equals_eager(name, masked, tmp_path):
    layer = make_layer(**OPTIONS[name], segment_size=3).eval()
    program = export(layer, masked, AUTO, torch.float32)
    assert_onnx_equals_eager(program, layer, masked, torch.float32, tmp_path / "layer.onnx")


@pytest.mark.slow  # more than a minute in the C++ compiler
def test_ahead_of_time_compiled_layer_equals_eager_at_any_length(tmp_path):
    layer = make_layer(top_k=2, segment_size=3).eval()
    program = export(layer, True, AUTO, torch.float32)
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/layer.pt2")
    run = torch._inductor.aoti_load_package(path)
    for length in range(2, 9):
        inputs = inputs_of(2, length, True, torch.float32)
        torch.testing.assert_close(run(*inputs), layer(*inputs))


class Gemm(nn.Module):
    """`functional.grouped_gemm` with weights of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3, 6, dtype=torch.float64))

    def forward(self, x, expert_offsets):
        """Return the products."""
        return functional.grouped_gemm(x, self.weight, expert_offsets, self.bias, "gelu")


def test_exported_grouped_gemm_equals_eager():
    gemm, x = Gemm(), torch.randn(9, 4, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    dims = ({0: torch.export.Dim.AUTO}, None)
    program = torch.export.export(gemm, (x, offsets), dynamic_shapes=dims)
    assert namespaces(program) == {"aten"}
    for found in (offsets, torch.tensor([0, 0, 4, 5], dtype=torch.int32)):
        for rows in (x, x[:7]):
            assert_same(program.module()(rows, found), gemm(rows, found))
