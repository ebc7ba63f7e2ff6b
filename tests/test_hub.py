"""The kernel that .ci/hub.py makes for Hugging Face's Hub: beside the package, and as its own."""

import ast
import copy
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import nn

import segmoe_kernels
from segmoe_kernels.layer.modules import Experts
from segmoe_kernels.testing import make_inputs, run_layer

ROOT = Path(__file__).resolve().parents[1]
# What the Hub lets a kernel import; triton comes with torch there.
ALLOWED = {*sys.stdlib_module_names, "torch", "triton", "einops"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / ".ci" / "hub.py", place], check=True, timeout=60)
    return place


@pytest.fixture(scope="module")
def hub(folder):
    """The kernel of a backend that this machine hasn't, imported as the Hub's library does it."""
    place = folder / "build" / "torch-rocm"
    name = json.loads((place / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, place / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_kernel_imports_itself_and_what_the_hub_has(folder):
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert base.with_suffix(".py").exists() or (base / "__init__.py").exists()
                assert folder / "build" in base.parents
        for node in tree.body:
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.partition(".")[0] for name in names} <= ALLOWED, path
        assert "from segmoe_kernels" not in path.read_text(encoding="utf-8")


def test_kernels_of_all_backends_have_names_of_their_own(folder):
    found = {p.parent.name: json.loads(p.read_text()) for p in folder.rglob("metadata.json")}
    assert set(found) == {"torch-cpu", "torch-cuda", "torch-rocm"}
    assert {f"torch-{about['backend']['type']}" for about in found.values()} == set(found)
    assert len({about["id"] for about in found.values()}) == 3
    assert all(about["id"].isidentifier() for about in found.values())


OPTIONS = {
    "official": {"aux_loss_weight": 0.02, "z_loss_weight": 0.01, "dropout": 0.3},
    "two choices": {"top_k": 2, "gated": True, "bias": True, "shared_expert": "token"},
    "causal": {"causal": True, "shared_expert": None, "pooling": "mean", "activation": "silu"},
    "whole segments": {"expert_scope": "segment", "router_dropout": 0.2},
    "projected": {"expert_scope": "projected", "bias": True, "renormalize": True},
}


def results(layer, device, backend, **options):
    """What `run_layer` gives; the dropout is the same in each call."""
    torch.manual_seed(0)
    return run_layer(layer, *make_inputs(2, 8, 6, device=device, **options), backend=backend)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_it_computes_what_the_package_does_beside_it(hub, device, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    layer = segmoe_kernels.SegMoE(6, 8, 3, segment_size=3, top_k=2, device=device)
    theirs = hub.SegMoE(6, 8, 3, segment_size=3, top_k=2, device=device)
    theirs.load_state_dict(layer.state_dict())
    assert_equal(results(theirs, device, backend), results(layer, device, backend))


def test_its_operators_are_under_its_own_name(hub):
    pytest.importorskip("triton")
    for package in (segmoe_kernels, hub):
        importlib.import_module(f"{package.__name__}.stages")
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    ours, reference, theirs = (
        {name for space, name in names if space == wanted}
        for wanted in ("segmoe_kernels", "segmoe_reference", hub.__name__)
    )
    assert theirs == ours | reference


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_its_layer_is_the_forward_of_a_module_with_the_tensors(hub, device, name, training):
    layer = segmoe_kernels.SegMoE(6, 8, 3, segment_size=3, **OPTIONS[name], device=device)
    replaced = copy.deepcopy(layer.train(training))
    replaced.forward = MethodType(hub.layers.SegMoE.forward, replaced)
    found = results(replaced, device, None, masked=0.2)
    assert_equal(found, results(layer, device, None, masked=0.2))
    assert len(found) == 2 + len(list(layer.parameters()))


class Plain(nn.Module):
    """A token-wise mixture as anybody writes it: no option but what it needs."""

    def __init__(self):
        super().__init__()
        self.segment_size = 1
        self.router = nn.Linear(6, 3, bias=False)
        self.experts = Experts(3, 6, 8)

    def forward(self, x, padding_mask=None):
        """Run every expert on all steps, then choose."""
        weight, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        hidden = nn.functional.gelu(torch.einsum("btd,efd->btef", x, self.experts.up_proj))
        every = torch.einsum("btef,edf->bted", hidden, self.experts.down_proj)
        y = weight * every.take_along_dim(chosen[..., None], -2).squeeze(-2)
        return y if padding_mask is None else y * padding_mask[..., None]


def test_its_layer_replaces_a_plain_one_in_compiled_code_too(hub):
    plain = Plain()
    replaced = copy.deepcopy(plain)
    replaced.forward = MethodType(hub.layers.SegMoE.forward, replaced)
    compiled = torch.compile(replaced, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 6)
    for module in (replaced, compiled):
        plain.zero_grad()
        replaced.zero_grad()
        expected, found = plain(x), module(x)
        torch.testing.assert_close(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
        for ours, theirs in zip(replaced.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_library_loads_it_and_puts_its_layer_into_a_model(folder):
    kernels = pytest.importorskip("kernels")
    rust = importlib.import_module("kernels._rust")

    kernel = kernels.get_local_kernel(folder)
    (loaded,) = kernels.get_loaded_kernels()
    assert loaded.module is kernel
    assert kernel.__name__ == loaded.metadata.id
    place = Path(kernel.__file__).parent
    loaded.metadata.digest.validate(
        rust.Digest.hash_variant(loaded.metadata.digest.algorithm, place)
    )
    extensible = kernels.use_kernel_forward_from_hub("SegMoE")(type("Own", (Plain,), {}))
    model = nn.Sequential(nn.Linear(6, 6), extensible())
    x = torch.randn(2, 5, 6)
    expected = model(x)
    repository = kernels.LocalLayerRepository(folder, layer_name="SegMoE")
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({"SegMoE": {"cpu": {mode: repository}}}):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert model[1].forward.__func__ is kernel.layers.SegMoE.forward
    torch.testing.assert_close(model(x), expected)
