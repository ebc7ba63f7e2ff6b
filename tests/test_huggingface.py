"""Our kernels as an experts implementation of the real transformers package."""

import copy
import importlib
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from segmoe_kernels.models import huggingface
from segmoe_kernels.models.huggingface import experts_forward, register_experts

transformers = pytest.importorskip("transformers", minversion="5.0")

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]


def tiny(kind, implementation, **options):
    """A tiny random model whose weights depend on its kind alone."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts_per_tok": 2, **options,
    }  # fmt: skip
    if kind == "mixtral":
        config = transformers.MixtralConfig(intermediate_size=24, num_local_experts=4, **sizes)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen2MoeConfig(
            moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=4, **sizes
        )
        model = transformers.Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.set_experts_implementation(implementation)
    return model


@pytest.fixture
def backend(request, monkeypatch):
    monkeypatch.setenv("SEGMOE_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.usefixtures("backend")
def test_unmodified_model_has_the_same_logits_and_gradients(kind, monkeypatch):
    register_experts()
    calls = []
    real = huggingface.functional.expert_ffn
    monkeypatch.setattr(
        huggingface.functional, "expert_ffn", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    expected, actual = tiny(kind, "eager"), tiny(kind, "segmoe")
    ids = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(1))
    results = []
    for model in (expected, actual):
        out = model(input_ids=ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        results.append(out)
    assert len(calls) == 2  # one for each layer, in one of the models
    torch.testing.assert_close(results[1].logits, results[0].logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1].aux_loss, results[0].aux_loss)
    theirs = dict(expected.named_parameters())
    for name, parameter in actual.named_parameters():
        grad = theirs[name].grad
        bound = 1e-4 * grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=bound, msg=name)


def test_configuration_chooses_the_implementation():
    register_experts("segmoe_by_config")
    config = tiny("mixtral", "eager").config
    config._experts_implementation = "segmoe_by_config"
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.config._experts_implementation == "segmoe_by_config"
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 31)


def experts_module(*, gated=True, bias=False, transposed=False, concatenated=True, act=None):
    """The interface of a module under ``use_experts_implementation``, and its weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    module = nn.Module()
    module.act_fn = act or nn.SiLU()
    module.has_gate, module.has_bias = gated, bias
    module.is_transposed, module.is_concatenated = transposed, concatenated
    hidden = 10 if gated else 5
    name = "gate_up_proj" if gated else "up_proj"
    up, down = (4, hidden, 3), (4, 3, 5)
    if transposed:
        up, down = (4, 3, hidden), (4, 5, 3)
    setattr(module, name, draw(*up))
    module.down_proj = draw(*down)
    if bias:
        setattr(module, f"{name}_bias", draw(4, hidden))
        module.down_proj_bias = draw(4, 3)
    return module


def brute_force(module, x, ids, weights):
    """Row by row, from the flags' documentation."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    out = torch.zeros_like(x)
    for row, choice in torch.cartesian_prod(torch.arange(len(x)), torch.arange(ids.shape[1])):
        e = int(ids[row, choice])
        if not 0 <= e < 4:
            continue
        up, down = getattr(module, name)[e], module.down_proj[e]
        if module.is_transposed:
            up, down = up.T, down.T
        hidden = up @ x[row]
        if module.has_bias:
            hidden = hidden + getattr(module, f"{name}_bias")[e]
        if module.has_gate:
            half = len(hidden) // 2
            gate, up = hidden[:half], hidden[half:]
            if not module.is_concatenated:
                gate, up = hidden[0::2], hidden[1::2]
            hidden = module.act_fn(gate) * up
        else:
            hidden = module.act_fn(hidden)
        y = down @ hidden
        if module.has_bias:
            y = y + module.down_proj_bias[e]
        out[row] += weights[row, choice] * y
    return out


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"gated": False, "act": nn.GELU()},
        {"gated": False, "bias": True, "act": nn.ReLU()},
        {"transposed": True, "bias": True},
        {"transposed": True, "concatenated": False, "bias": True},
        {"concatenated": False},
    ],
    ids=lambda o: " ".join(k for k in o) or "plain",
)
@pytest.mark.usefixtures("backend")
def test_every_layout_of_the_interface_and_experts_of_other_ranks(options):
    module = experts_module(**options)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    ids = torch.randint(4, (9, 2), generator=generator)
    ids[:, 1] = (ids[:, 0] + 1) % 4
    ids[2] = 4  # what expert parallelism gives for experts of another rank
    ids[3, 1] = 4
    weights = torch.rand(9, 2, generator=generator, dtype=torch.float64)
    leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    dy = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    results = []
    for function in (brute_force, experts_forward):
        y = function(module, x, ids, weights)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_half_precision_and_weights_of_another_dtype():
    module = experts_module().to(torch.bfloat16)
    x = torch.randn(6, 3, dtype=torch.bfloat16)
    ids, weights = torch.randint(4, (6, 2)), torch.rand(6, 2)
    ids[:, 1] = (ids[:, 0] + 1) % 4
    y = experts_forward(module, x, ids, weights)
    assert y.dtype == torch.bfloat16
    expected = brute_force(copy.deepcopy(module).float(), x.float(), ids, weights)
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)


MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)


def classes_of_the_interface():
    """``(module, class)`` of everything in the installed transformers that has the interface."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for name in DECORATED.findall(path.read_text(encoding="utf-8")):
            yield f"transformers.models.{path.parent.name}.{path.stem}", name


class SmallConfig:
    """Answers as a model's own configurations would, in small sizes."""

    def __init__(self, module):
        configs = [value for name, value in vars(module).items() if name.endswith("Config")]
        self.real = [config() for config in configs if config is not transformers.PreTrainedConfig]

    def __getattr__(self, name):
        sizes = {"expert": 4, "intermediate": 12, "hidden_size": 8}
        known = (size for part, size in sizes.items() if part in name)
        return next(known, None) or next(getattr(c, name) for c in self.real if hasattr(c, name))


@pytest.mark.parametrize(
    ("module", "name"), list(classes_of_the_interface()), ids=lambda text: text
)
def test_experts_of_every_model_are_as_eager_or_refused(module, name):
    register_experts()
    module = importlib.import_module(module)
    experts = getattr(module, name)(SmallConfig(module)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(9, 4, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(9, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    own_gate = type(experts)._apply_gate.__module__ == module.__name__
    activation = type(getattr(experts, "act_fn", None)).__name__
    other = activation in {"ReLUSquaredActivation"} or experts.has_post_expert_norm
    results = []
    for implementation in ("eager", "segmoe"):
        experts.config._experts_implementation = implementation
        if implementation == "segmoe" and (own_gate or other):
            with pytest.raises(ValueError, match=f"experts_forward: expected {name} to "):
                experts(x, ids, weights)
            return
        y = experts(x, ids, weights)
        leaves = [x, weights, *experts.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for actual, expected in zip(results[1], results[0], strict=True):
        bound = 1e-9 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=bound)


def test_every_model_of_transformers_was_found():
    names = {name for _, name in classes_of_the_interface()}
    assert {"MixtralExperts", "Qwen2MoeExperts", "GptOssExperts"} <= names
    assert len(names) > 20


def test_names_and_missing_packages_are_said(monkeypatch):
    with pytest.raises(TypeError, match="expected name to be a str, got int"):
        register_experts(3)
    monkeypatch.setitem(
        __import__("sys").modules, "transformers.integrations.moe", types.ModuleType("old")
    )
    with pytest.raises(ImportError, match="transformers >= 5"):
        register_experts()
