"""The whole layer on the Triton backend against the float64 oracle, every option, every plan."""

import itertools

import pytest
import torch
from stage_runs import strided_views

from segmoe_kernels import SegMoE
from segmoe_kernels.testing import assert_as_accurate, make_inputs, oracle, route_ids, run_layer

pytest.importorskip("triton")

SHAPE = (2, 11, 8)
DEFAULTS = {"d_model": 8, "d_ff": 20, "num_experts": 4, "top_k": 2, "segment_size": 3}
OPTIONS = [
    {},
    {"top_k": 1},
    {"top_k": 4},
    {"num_experts": 1, "top_k": 1},
    {"num_experts": 5, "top_k": 3, "segment_size": 1},
    {"segment_size": 20},
    {"segment_size": 4, "shared_expert": None},
    {"shared_expert": "token"},
    {"shared_d_ff": 7, "bias": True},
    {"shared_expert": "token", "shared_d_ff": 33, "gated": True},
    {"gated": True, "activation": "silu"},
    {"gated": True, "activation": "relu", "bias": True},
    {"bias": True, "shared_expert": None, "top_k": 1},
    {"activation": "gelu_tanh"},
    {"activation": "relu", "renormalize": False},
    {"renormalize": True, "top_k": 1},
    {"router_temperature": 0.6},
    {"pooling": "mean"},
    {"pooling": "max"},
    {"pooling": "first"},
    {"pooling": "last"},
    {"causal": True, "shared_expert": "token"},
    {"causal": True, "shared_expert": None, "pooling": "mean"},
    {"expert_scope": "segment"},
    {"expert_scope": "segment", "gated": True, "bias": True, "activation": "silu"},
    {"expert_scope": "segment", "pooling": "max", "shared_expert": None, "top_k": 1},
    {"expert_scope": "projected", "bias": True},
    {"num_experts": 0},
]


def name_of(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "defaults"


def make_layer(dtype=torch.float32, device="cpu", **options):
    torch.manual_seed(1)
    settings = {**DEFAULTS, **options}
    layer = SegMoE(**settings, backend="triton", dtype=dtype, device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return layer.eval()


def masked_or_slow():
    """Every layer with padding; without it, which every other test is, under ``slow``."""
    for masked, name, marks in ((0.35, "masked", []), (0.0, "full", pytest.mark.slow)):
        for options in OPTIONS:
            yield pytest.param(options, masked, id=f"{name_of(options)}-{name}", marks=marks)


@pytest.mark.parametrize(("options", "masked"), [*masked_or_slow()])
def test_layer_equals_reference_in_float64(options, masked, device):
    layer = make_layer(torch.float64, device, **options)
    inputs = make_inputs(*SHAPE, dtype=torch.float64, device=device, masked=masked)
    if masked:
        inputs.padding_mask[0, :3] = False
        inputs.padding_mask[1] = False
    check_close(layer, inputs)


def check_close(layer, inputs):
    """Require the results of both backends to be equal but for roundings of float64."""
    actual = run_layer(layer, *inputs)
    expected = run_layer(layer, *inputs, backend="reference")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11, msg=name)
    return actual


def check_accuracy(layer, inputs):
    ids = route_ids(layer, *inputs)
    actual = run_layer(layer, *inputs)
    eager = run_layer(layer, *inputs, backend="reference", topk_ids=ids)
    exact = oracle(layer, *inputs, topk_ids=ids)
    assert_as_accurate(actual, eager, exact)


def test_told_choices_are_refused_where_the_kernels_make_their_own(device):
    layer, inputs = make_layer(torch.float32, device), make_inputs(*SHAPE, device=device)
    ids = route_ids(layer, *inputs)
    with pytest.raises(ValueError, match="expected topk_ids to be None unless backend='reference'"):
        run_layer(layer, *inputs, topk_ids=ids)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float16, torch.bfloat16)),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1, "bias": True},
        {"gated": True, "activation": "silu", "bias": True},
        {"expert_scope": "segment", "pooling": "mean"},
        {"shared_expert": "token", "pooling": "max", "causal": True},
        {"activation": "gelu_tanh", "shared_expert": None},
    ],
    ids=name_of,
)
def test_layer_is_as_accurate_as_eager(options, dtype, device):
    layer = make_layer(dtype, device, d_model=24, d_ff=72, **options)
    check_accuracy(layer, make_inputs(4, 37, 24, dtype=dtype, device=device, masked=0.1))


@pytest.mark.parametrize(
    "width",
    [64, pytest.param(130, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.slow)],
)
def test_layer_is_as_accurate_as_eager_beyond_one_tile(width, device):
    layer = make_layer(torch.float32, device, d_model=width, d_ff=2 * width, segment_size=5)
    check_accuracy(layer, make_inputs(3, 66, width, device=device))


@pytest.mark.parametrize("shape", [(0, 7, 8), (2, 0, 8), (1, 1, 8), (5, 8), (2, 3, 7, 8)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"expert_scope": "segment"}, {"expert_scope": "projected"},
     {"causal": True, "shared_expert": None}],
    ids=name_of,
)  # fmt: skip
def test_layer_takes_any_leading_shape(options, shape, device):
    layer = make_layer(torch.float64, device, **options)
    check_close(layer, make_inputs(*shape, dtype=torch.float64, device=device))


@pytest.mark.parametrize(
    "options", [{"expert_scope": "token"}, {"segment_size": 1, "top_k": 2}], ids=name_of
)
def test_layer_reads_any_strides(options, device):
    """Steps that are segments are one sequence to the kernels, which not all strides can be."""
    layer = make_layer(torch.float64, device, **options)
    x, dy, _ = make_inputs(*SHAPE, dtype=torch.float64, device=device)
    expected = run_layer(layer, x, dy)
    for x_strided, dy_strided in zip(strided_views(x), strided_views(dy), strict=True):
        leaf = x_strided.detach().requires_grad_()
        y = layer(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy_strided)
        assert torch.equal(y, expected["y"])
        assert torch.equal(dx, expected["dx"])
    one = dy[:1, :1].expand(dy.shape)
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf), leaf, one)
    assert torch.equal(dx, run_layer(layer, x, one.contiguous())["dx"])


@pytest.mark.parametrize(
    ("scope", "gated"),
    [
        *itertools.product(("token", "projected"), (False, True)),
        ("segment", False),
        pytest.param("segment", True, marks=pytest.mark.slow),
    ],
)
def test_layer_passes_gradcheck(scope, gated, device):
    layer = make_layer(
        torch.float64, device, expert_scope=scope, gated=gated, d_model=3, d_ff=4, bias=True
    )
    x = torch.randn(1, 5, 3, dtype=torch.float64, device=device, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("order", ["reverse", pytest.param("shuffled 1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("scope", "shared"),
    [("token", "segment"), pytest.param("segment", None, marks=pytest.mark.slow)],
)
@pytest.mark.interpreter
def test_layer_does_not_depend_on_program_order(scope, shared, order, program_order):
    options = {"gated": True, "activation": "silu", "bias": True, "segment_size": 2}
    layer = make_layer(expert_scope=scope, shared_expert=shared, **options)
    inputs = make_inputs(3, 90, 8, masked=0.2)
    expected = run_layer(layer, *inputs)
    kind, seed = order.split()[0], ord(order[-1])
    with program_order(kind, seed):
        actual = run_layer(layer, *inputs)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_layer_repeats_bitwise(device):
    layer = make_layer(torch.float32, device, d_model=16)
    inputs = make_inputs(4, 60, 16, device=device)
    first, second = run_layer(layer, *inputs), run_layer(layer, *inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_parameters_get_no_gradient_and_change_no_other(device):
    layer = make_layer(torch.float64, device, bias=True, gated=True, shared_expert=None)
    inputs = make_inputs(*SHAPE, dtype=torch.float64, device=device)
    full = run_layer(layer, *inputs)
    names = [name for name, _ in layer.named_parameters()]
    # Each stage's own tensors one by one: see test_stage_properties.py.
    experts = {name for name in names if name.startswith("experts")}
    for frozen in (experts, set(names) - experts, {"experts.up_proj"}, set(names)):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        some = run_layer(layer, *inputs)
        assert some.keys() == full.keys() - {f"d{name}" for name in frozen}
        assert all(torch.equal(some[name], full[name]) for name in some)


@pytest.mark.parametrize("scope", ["token", "segment"])
def test_dropout_backward_sees_the_mask_of_forward(scope, device):
    layer = make_layer(
        torch.float64, device, expert_scope=scope, d_model=3, d_ff=6, dropout=0.4,
        router_dropout=0.3, shared_expert=None, gated=True,
    ).train()  # fmt: skip
    x = torch.randn(1, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        torch.manual_seed(5)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_masked_steps_are_never_read(device):
    layer = make_layer(torch.float32, device, pooling="mean")
    x, dy, mask = make_inputs(2, 12, 8, device=device, masked=0.4)
    clean = run_layer(layer, x, dy, mask)
    dirty = run_layer(
        layer, x.masked_fill(~mask[..., None], torch.nan),
        dy.masked_fill(~mask[..., None], torch.nan), mask,
    )  # fmt: skip
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name
    assert not clean["y"][~mask].any()
    assert not clean["dx"][~mask].any()


def test_training_on_the_kernels_is_training_on_the_reference(device):
    """Five steps of AdamW in float64, losses injected: parameters and loss stay together."""
    inputs = make_inputs(4, 20, 8, dtype=torch.float64, device=device, masked=0.1)
    ends = []
    for backend in ("triton", "reference"):
        layer = make_layer(
            torch.float64, device, aux_loss_weight=0.1, z_loss_weight=0.01, bias=True
        ).train()
        layer.backend = backend
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (layer(inputs.x, inputs.padding_mask) - inputs.dy).square().mean()
            loss.backward()
            optimizer.step()
        ends.append({"loss": loss.detach(), **layer.state_dict()})
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["spread", "one expert"])
def test_layer_repeats_bitwise_while_the_gpu_does_other_work(routing, dtype):
    """A side stream makes programs run at other times, beside others, in other memory."""
    layer = make_layer(dtype, "cuda", d_model=64, d_ff=128, top_k=2)
    if routing == "one expert":
        with torch.no_grad():
            layer.router.weight[0] *= 50
    inputs = make_inputs(16, 500, 64, dtype=dtype, device="cuda", masked=0.1)
    expected = run_layer(layer, *inputs)
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for turn in range(250):  # 1,000 in the four cases
        with torch.cuda.stream(side):
            noise = torch.tanh(noise @ noise)
        room = torch.empty((1 + turn % 7) << 20, device="cuda")
        actual = run_layer(layer, *inputs)
        del room
        assert all(torch.equal(actual[name], value) for name, value in expected.items()), turn
    torch.cuda.synchronize()


@pytest.mark.slow  # draws by their formula: test_experts.py
def test_dropout_keeps_the_mean_and_the_rate(device):
    layer = SegMoE(
        1, 4000, 1, dropout=0.25, shared_expert=None, activation="relu", backend="triton",
        device=device,
    )  # fmt: skip
    with torch.no_grad():
        layer.experts.up_proj.fill_(1)
        layer.experts.down_proj.fill_(1 / 4000)
    y = layer(torch.ones(1, 30, 1, device=device))
    # Each step is a mean of 4000 independent 0 or 4/3: standard deviation 0.0091.
    assert (y - 1).abs().max() < 5 * 0.0092
    assert y.unique().numel() > 15  # steps differ
    kept = (y * 4000 * 0.75).round()
    assert torch.allclose(kept, y * 4000 * 0.75, atol=0.05)
    assert torch.equal(layer.eval()(torch.ones(1, 3, 1, device=device)).round(decimals=4).unique(),
                       torch.ones(1, device=device))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"shared_expert": None, "top_k": 1}, {}], ids=name_of)
def test_cuda_graph_computes_forward_and_backward_anew(options):
    """Captured behind calls that have written their launches down, then given other values."""
    layer = make_layer(device="cuda", dtype=torch.bfloat16, **options)
    x, dy, _ = make_inputs(*SHAPE, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_()

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
