"""The reference's loop over experts: against single rows, to any order, and as an operator."""

import contextlib

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from segmoe_kernels import SegMoE, functional
from segmoe_kernels.reference import permute
from segmoe_kernels.reference.experts import composed_ffn, dense_ffn, gather_rows, grouped_ffn
from segmoe_kernels.routing import FFNWeights

OPS = torch.ops.segmoe_reference
# num_experts, top_k, segment_size, sequences, length, gated, biased, activation
CASES = {
    "plain": (3, 1, 2, 2, 6, False, False, "gelu"),
    "ragged": (3, 1, 4, 2, 7, False, True, "gelu_tanh"),
    "top2": (4, 2, 3, 2, 7, False, True, "silu"),
    "gated": (3, 2, 2, 1, 5, True, True, "silu"),
    "relu_all": (2, 2, 1, 2, 3, True, False, "relu"),
    "one_expert": (1, 1, 5, 1, 3, False, False, "gelu"),
    "no_sequence": (3, 1, 2, 0, 6, True, True, "gelu"),
    "no_step": (3, 2, 2, 2, 0, False, True, "gelu"),
}
ROUTINGS = ("random", "one_takes_all", "some_without_expert")
D, F = 3, 5


def make_inputs(name, routing="random", masked=False, dtype=torch.float64):
    """Return ``(differentiable tensors, the other arguments, options)``; None where absent."""
    experts, top_k, size, batch, length, gated, biased, activation = CASES[name]
    num_segments = batch * -(-length // size)
    ids = torch.rand(num_segments, experts).argsort(-1)[:, :top_k]
    if routing == "one_takes_all":
        ids = torch.arange(top_k).expand(num_segments, top_k)
    if routing == "some_without_expert":
        ids = torch.where(torch.rand(num_segments, 1) < 0.5, -1, ids)
    permutation = permute(ids.int(), experts)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    weights = FFNWeights(
        draw(experts, F, D),
        draw(experts, D, F),
        draw(experts, F, D) if gated else None,
        draw(experts, F) if biased else None,
        draw(experts, F) if gated and biased else None,
        draw(experts, D) if biased else None,
    )
    mask = None
    if masked:
        mask = torch.rand(batch, length) < 0.6
    topk_weights = torch.rand(num_segments, top_k, dtype=dtype, requires_grad=True)
    tensors = (draw(batch, length, D), topk_weights, *weights)
    return tensors, permutation, mask, {"segment_size": size, "activation": activation}


def run(tensors, permutation, mask, options):
    x, topk_weights, *weights = tensors
    return composed_ffn(x, topk_weights, FFNWeights(*weights), permutation, mask, **options)


def step_by_step(tensors, permutation, mask, options):
    """Every step by itself, at its place among zeros."""
    x, topk_weights, *weights = tensors
    size = options["segment_size"]
    per_sequence, top_k = -(-x.shape[1] // size), topk_weights.shape[1]
    owners = torch.bucketize(
        permutation.slot_to_sorted, permutation.expert_offsets[1:], right=True
    ).tolist()
    out = x.new_zeros(top_k, *x.shape) + 0 * sum(t.sum() for t in weights if t is not None)
    out = out + 0 * topk_weights.sum() + 0 * torch.where(x.isnan(), 0, x).sum()
    for slot, owner in enumerate(owners):
        segment, choice = divmod(slot, top_k)
        batch, j = divmod(segment, per_sequence)
        for t in range(j * size, min(x.shape[1], (j + 1) * size)):
            if owner < len(weights[0]) and (mask is None or mask[batch, t]):
                own = FFNWeights(*(None if w is None else w[owner] for w in weights))
                y = dense_ffn(x[batch, t], own, options["activation"])
                place = torch.zeros(out.shape[:3], dtype=x.dtype)
                place[choice, batch, t] = 1
                out = out + place[..., None] * y * topk_weights[segment, choice]
    return out


def differentiate(function, tensors, *args):
    out = function(tensors, *args)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return out, torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", CASES)
def test_composed_ffn_equals_single_steps(name, routing, masked):
    inputs = make_inputs(name, routing, masked)
    out, grads = differentiate(run, *inputs)
    expected, expected_grads = differentiate(step_by_step, *inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for actual, grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ragged", "top2", "gated"])
def test_composed_ffn_in_16_bits_is_as_close_as_single_steps(name, dtype):
    tensors, *where = make_inputs(name)
    short = tuple(None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in short]
    oracle, oracle_grads = differentiate(step_by_step, exact, *where)
    out, grads = differentiate(run, short, *where)
    plain, plain_grads = differentiate(step_by_step, short, *where)
    for value, other, right in zip(
        (out, *grads), (plain, *plain_grads), (oracle, *oracle_grads), strict=True
    ):
        allowed = (other - right).square().mean().sqrt() + torch.finfo(dtype).eps * right.std()
        assert (value - right).square().mean().sqrt() <= 1.5 * allowed


def test_composed_ffn_reads_nothing_behind_a_mask():
    tensors, permutation, mask, options = make_inputs("top2", masked=True)
    with torch.no_grad():
        tensors[0][~mask] = torch.nan
    out, grads = differentiate(run, tensors, permutation, mask, options)
    assert not out[:, ~mask].any()
    assert all(grad.isfinite().all() for grad in (out, *grads))
    assert not grads[0][~mask].any()


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("name", ["ragged", "top2", "gated"])
def test_composed_ffn_gradients(check, name):
    tensors, *where = make_inputs(name, masked=name == "top2")
    leaves = [t for t in tensors if t is not None]

    def function(*given):
        rest = iter(given)
        return run([None if t is None else next(rest) for t in tensors], *where)

    assert check(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_operator_equals_the_loop_that_autograd_sees(down, counted):
    """Bit for bit: compiled layers are compared so. Also while a mode watches."""
    (_, _, *weights), *_ = make_inputs("gated", dtype=torch.float32)
    weights = weights if down else [weights[0], None, None, weights[3], None, None]
    rows = torch.randn(7, D, requires_grad=True)
    scale = torch.rand(7, F, requires_grad=True) if down else None
    leaves = [t for t in (rows, *weights, scale) if t is not None]
    found = []
    for function in (OPS.grouped_ffn, grouped_ffn):
        given = weights if function is OPS.grouped_ffn else [weights]
        with FlopCounterMode(display=False) if counted else contextlib.nullcontext():
            out = function(rows, *given, scale, torch.tensor([0, 3, 3, 6]), "silu")
            dout = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
            found.append((out, *torch.autograd.grad(out, leaves, dout)))
    for actual, expected in zip(*found, strict=True):
        # A counter takes operators apart, which rounds the loop otherwise.
        assert torch.allclose(actual, expected) if counted else torch.equal(actual, expected)


@pytest.mark.parametrize("down", [False, True])
def test_operators_pass_opcheck(down):
    (_, _, *weights), *_ = make_inputs("gated")
    weights = [None if w is None else w.detach() for w in weights]
    weights = weights if down else [weights[0], None, None, weights[3], None, None]
    args = (torch.randn(7, D).double(), *weights, None, torch.tensor([0, 3, 3, 6]), "silu")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.grouped_ffn.default, args, test_utils=tests)
    out = OPS.grouped_ffn(*args)
    need = [t is not None for t in args[:8]]
    torch.library.opcheck(OPS.grouped_ffn_bwd.default, (out, *args, need), test_utils=tests)


def test_operator_refuses_a_second_derivative():
    (_, _, *weights), *_ = make_inputs("gated")
    rows = torch.randn(7, D).double().requires_grad_()
    out = OPS.grouped_ffn(rows, *weights, None, torch.tensor([0, 3, 3, 6]), "silu")
    (drows,) = torch.autograd.grad(out.sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        drows.sum().backward()


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gather_rows_equals_indexing(rows):
    index = torch.randperm(rows)
    inverse = torch.argsort(index)
    x = torch.randn(rows, 3).double().requires_grad_()
    out = gather_rows(x, index.int(), inverse.int())
    dout = torch.randn(rows, 3).double()
    out.backward(dout)
    assert torch.equal(out, x[index])
    assert torch.equal(x.grad, dout[inverse])
    assert gradgradcheck(lambda z: gather_rows(z, index.int(), inverse.int()), x)


@pytest.mark.parametrize("offsets", [[1, 2, 4], [0, 3, 2], [0, -1, 4], [0, 2, 5]])
def test_offsets_that_leave_rows_unwritten_are_refused(offsets):
    a, b = torch.randn(4, 3), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="expert_offsets to ascend from 0 to at most M=4, got"):
        functional.grouped_gemm(a, b, torch.tensor(offsets, dtype=torch.int32))


def test_a_recorded_graph_serves_other_routings():
    """Rows an expert has today are no constants of a traced graph."""
    layer = SegMoE(4, 6, 3, segment_size=2, shared_expert=None, backend="reference").eval()
    x, other = torch.randn(2, 3, 8, 4).unbind()
    with torch.no_grad():
        for recorded in (torch.jit.trace(layer, x, check_trace=False), make_fx(layer)(x)):
            torch.testing.assert_close(recorded(other), layer(other))


def test_autocast_does_not_reach_stages_whose_weights_are_not_cast():
    (_, _, *weights), *_ = make_inputs("gated", dtype=torch.float32)
    rows, offsets = torch.randn(7, D), torch.tensor([0, 3, 3, 6])
    expected = grouped_ffn(rows, weights, None, offsets, "silu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_ffn(rows, weights, None, offsets, "silu"), expected)


def test_no_expert_gives_zeros():
    weights = [torch.zeros(0, 6, 4), None, None, None, None, None]
    out = grouped_ffn(torch.ones(3, 4), weights, None, torch.zeros(1, dtype=torch.int32), None)
    assert torch.equal(out, torch.zeros(3, 6))


def test_first_derivatives_of_tensors_without_values_may_ask_for_a_graph():
    layer = SegMoE(4, 6, 3, segment_size=2, shared_expert=None, backend="reference", device="meta")
    x = torch.zeros(1, 4, 4, device="meta", requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()
