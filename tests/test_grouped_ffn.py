"""The reference's experts as one operator: equal to the plain form, forward and backward."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from segmoe_kernels import grouped_ffn as module
from segmoe_kernels.composed_ffn import composed_ffn
from segmoe_kernels.grouped_ffn import grouped_ffn
from segmoe_kernels.reference import permute
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


def run(function, tensors, permutation, mask, options):
    x, topk_weights, *weights = tensors
    maps = [permutation.sorted_to_slot, permutation.slot_to_sorted, permutation.expert_offsets]
    if function is grouped_ffn:
        del maps[1]
    return function(x, topk_weights, FFNWeights(*weights), *maps, mask, **options)


def differentiate(function, tensors, *args):
    out = run(function, tensors, *args)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return out, torch.autograd.grad(out, leaves, dout, allow_unused=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", CASES)
def test_grouped_ffn_equals_plain_form(name, routing, masked):
    inputs = make_inputs(name, routing, masked)
    out, grads = differentiate(grouped_ffn, *inputs)
    expected, expected_grads = differentiate(composed_ffn, *inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for actual, grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ragged", "top2", "gated"])
def test_grouped_ffn_in_many_chunks_equals_plain_form(name, monkeypatch):
    inputs = make_inputs(name)
    expected, expected_grads = differentiate(composed_ffn, *inputs)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2 * F * 8 // torch.get_num_threads())
    sorted_to_slot, offsets = inputs[1].sorted_to_slot, inputs[1].expert_offsets
    rows = module._rows(inputs[0][0], CASES[name][1], sorted_to_slot, offsets, None, CASES[name][2])
    chunks = module._chunks(*inputs[0][:3], *rows)
    assert len(chunks) > len({c.expert for c in chunks}) + 1
    out, grads = differentiate(grouped_ffn, *inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for actual, grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ragged", "top2", "gated"])
def test_grouped_ffn_in_16_bits_is_as_close_as_plain_form(name, dtype):
    tensors, *where = make_inputs(name)
    short = tuple(None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in short]
    oracle, oracle_grads = differentiate(composed_ffn, exact, *where)
    out, grads = differentiate(grouped_ffn, short, *where)
    plain, plain_grads = differentiate(composed_ffn, short, *where)
    for value, other, right in zip(
        (out, *grads), (plain, *plain_grads), (oracle, *oracle_grads), strict=True
    ):
        allowed = (other - right).square().mean().sqrt() + torch.finfo(dtype).eps * right.std()
        assert (value - right).square().mean().sqrt() <= 1.5 * allowed


def test_grouped_ffn_reads_nothing_behind_a_mask():
    tensors, permutation, mask, options = make_inputs("top2", masked=True)
    with torch.no_grad():
        tensors[0][~mask] = torch.nan
    out, grads = differentiate(grouped_ffn, tensors, permutation, mask, options)
    assert not out[:, ~mask].any()
    assert all(grad.isfinite().all() for grad in (out, *grads))
    assert not grads[0][~mask].any()


@pytest.mark.parametrize("position", range(8))
def test_grouped_ffn_gradient_of_one_tensor(position):
    tensors, *where = make_inputs("gated")
    _, expected = differentiate(composed_ffn, tensors, *where)
    frozen = [t.detach().requires_grad_(i == position) for i, t in enumerate(tensors)]
    _, grads = differentiate(grouped_ffn, frozen, *where)
    torch.testing.assert_close(grads[0], expected[position], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("name", ["ragged", "top2", "gated"])
def test_grouped_ffn_gradients(check, name):
    tensors, *where = make_inputs(name, masked=name == "top2")
    leaves = [t for t in tensors if t is not None]

    def function(*given):
        rest = iter(given)
        return run(grouped_ffn, [None if t is None else next(rest) for t in tensors], *where)

    assert check(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("name", ["ragged", "gated"])
def test_operators_pass_opcheck(name, save):
    tensors, permutation, mask, options = make_inputs(name)
    maps = (permutation.sorted_to_slot, permutation.expert_offsets, mask)
    where = (*maps, *options.values())
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.grouped_ffn.default, (*tensors, *where, save), test_utils=tests)
    inputs = [None if t is None else t.detach() for t in tensors]
    out, *saved = OPS.grouped_ffn(*inputs, *where, save)
    need = [t is not None for t in tensors]
    arguments = (torch.ones_like(out), *inputs, *maps, *saved, *options.values(), need)
    torch.library.opcheck(OPS.grouped_ffn_bwd.default, arguments, test_utils=tests)


def test_backward_recomputes_what_was_not_saved():
    tensors, permutation, mask, options = make_inputs("gated")
    maps = (permutation.sorted_to_slot, permutation.expert_offsets, mask)
    inputs = [t.detach() for t in tensors]
    found = []
    for save in (False, True):
        out, *saved = OPS.grouped_ffn(*inputs, *maps, *options.values(), save)
        assert all(bool(t.numel()) == save for t in saved)
        need = [True] * 8
        found.append(
            OPS.grouped_ffn_bwd(
                torch.ones_like(out), *inputs, *maps, *saved, *options.values(), need
            )
        )
    for lean, full in zip(*found, strict=True):
        assert torch.equal(lean, full)
