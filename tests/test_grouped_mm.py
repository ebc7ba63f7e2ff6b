"""The reference's grouped product: both modes against loops, and as registered operators."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from segmoe_kernels import functional
from segmoe_kernels.grouped_mm import gather_rows, grouped_mm, grouped_mm_contract

OFFSETS = {
    "even": [0, 2, 4, 6],
    "empty_first": [0, 0, 3, 6],
    "empty_middle": [0, 3, 3, 6],
    "empty_last": [0, 4, 6, 6],
    "one_takes_all": [0, 0, 6, 6],
    "rows_beyond": [0, 1, 3, 4],
    "all_rows_beyond": [0, 0, 0, 0],
    "one_expert": [0, 6],
}
OPS = torch.ops.segmoe_reference


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def expert_of(row, offsets):
    owners = [e for e in range(len(offsets) - 1) if offsets[e] <= row < offsets[e + 1]]
    return owners[0] if owners else None


@pytest.mark.parametrize("name", OFFSETS)
def test_grouped_mm_equals_loop(name):
    offsets = OFFSETS[name]
    a, b = draw(6, 3), draw(len(offsets) - 1, 4, 3)
    out = grouped_mm(a, b, torch.tensor(offsets, dtype=torch.int32))
    for row in range(6):
        e = expert_of(row, offsets)
        expected = torch.zeros(4).double() if e is None else b[e] @ a[row]
        torch.testing.assert_close(out[row], expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", OFFSETS)
def test_grouped_mm_contract_equals_loop(name):
    offsets = OFFSETS[name]
    a, b = draw(6, 4), draw(6, 3)
    out = grouped_mm_contract(a, b, torch.tensor(offsets, dtype=torch.int32))
    expected = torch.zeros(len(offsets) - 1, 4, 3).double()
    for row in range(6):
        e = expert_of(row, offsets)
        if e is not None:
            expected[e] += torch.outer(a[row], b[row])
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)


def test_grouped_mm_ignores_what_rows_beyond_hold():
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    a, b = draw(6, 3), draw(2, 4, 3)
    with torch.no_grad():
        a[4:] = torch.nan
    out = grouped_mm(a, b, offsets)
    out.sum().backward()
    assert not out[4:].any()
    assert not a.grad[4:].any()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_grouped_mm_gradients(check, name):
    offsets = torch.tensor(OFFSETS[name], dtype=torch.int32)
    experts = len(OFFSETS[name]) - 1
    rows = (draw(6, 2), draw(experts, 3, 2))
    assert check(lambda a, b: grouped_mm(a, b, offsets), rows, nondet_tol=0.0)
    contract = (draw(6, 3), draw(6, 2))
    assert check(lambda a, b: grouped_mm_contract(a, b, offsets), contract, nondet_tol=0.0)


def test_grouped_mm_takes_expanded_gradients():
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    grads = []
    for upstream in (torch.ones(1, 1).double().expand(6, 4), torch.ones(6, 4).double()):
        a, b = torch.arange(18.0).double().reshape(6, 3), torch.arange(36.0).double()
        a, b = a.requires_grad_(), b.reshape(3, 4, 3).requires_grad_()
        grouped_mm(a, b, offsets).backward(upstream)
        grads.append((a.grad, b.grad))
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_grouped_mm_takes_strided_operands(dtype):
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    a, b = torch.randn(3, 6).to(dtype).t(), torch.randn(2, 3, 8).to(dtype)[..., ::2].transpose(1, 2)
    # Not bit for bit: some BLAS sum in another order for other strides.
    torch.testing.assert_close(
        grouped_mm(a, b, offsets), grouped_mm(a.contiguous(), b.contiguous(), offsets)
    )


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_grouped_mm_computes_only_needed_gradients(needed):
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    operands = [
        draw(*shape).detach().requires_grad_(wanted)
        for shape, wanted in zip([(6, 3), (2, 4, 3)], needed, strict=True)
    ]
    calls = []

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    out = grouped_mm(*operands, offsets)
    with Counter():
        out.backward(torch.ones_like(out))
    ours = [call for call in calls if call.startswith("segmoe_reference")]
    suffix = "grouped_mm.default" if needed[0] else "grouped_mm_contract.default"
    assert ours == [f"segmoe_reference.{suffix}"]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gather_rows_equals_indexing(rows):
    index = torch.randperm(rows)
    inverse = torch.argsort(index)
    x = draw(rows, 3)
    out = gather_rows(x, index.int(), inverse.int())
    dout = torch.randn(rows, 3).double()
    out.backward(dout)
    assert torch.equal(out, x[index])
    assert torch.equal(x.grad, dout[inverse])
    assert gradgradcheck(lambda z: gather_rows(z, index.int(), inverse.int()), draw(rows, 3))


@pytest.mark.parametrize("name", ["even", "empty_middle", "rows_beyond"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_pass_opcheck(dtype, name):
    offsets = torch.tensor(OFFSETS[name], dtype=torch.int32)
    a, b = draw(6, 3, dtype=dtype), draw(3, 4, 3, dtype=dtype)
    torch.library.opcheck(OPS.grouped_mm.default, (a, b, offsets))
    torch.library.opcheck(OPS.grouped_mm_contract.default, (draw(6, 4, dtype=dtype), a, offsets))


@pytest.mark.parametrize("name", ["even", "empty_middle", "rows_beyond"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_operators_alone_have_gradients(check, name):
    """Exported programs call them without the functions around them."""
    offsets = torch.tensor(OFFSETS[name], dtype=torch.int32)
    assert check(lambda a, b: OPS.grouped_mm(a, b, offsets), (draw(6, 2), draw(3, 3, 2)))
    assert check(lambda a, b: OPS.grouped_mm_contract(a, b, offsets), (draw(6, 3), draw(6, 2)))


@pytest.mark.parametrize("offsets", [[1, 2, 4], [0, 3, 2], [0, -1, 4], [0, 2, 5]])
def test_offsets_that_leave_rows_unwritten_are_refused(offsets):
    a, b = torch.randn(4, 3), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="expert_offsets to ascend from 0 to at most M=4, got"):
        functional.grouped_gemm(a, b, torch.tensor(offsets, dtype=torch.int32))
