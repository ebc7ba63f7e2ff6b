"""The grouped matrix product of the reference backend, as one library operator.

``torch.nn.functional.grouped_mm`` has no float64, rejects expanded gradients and takes bfloat16
only under fake tensors (torch 2.13), so the reference brings its own. Two modes, closed under
differentiation: the gradient of each is expressed by the two, to any order.

* ``rows``: ``(M, K), (E, N, K) -> (M, N)``, row m of expert e is ``a[m] @ b[e].T``;
* ``contract``: ``(M, N), (M, K) -> (E, N, K)``, ``c[e] = a[rows of e].T @ b[rows of e]``.

Rows from ``expert_offsets[E]`` on belong to no expert: zeros in ``rows``, ignored in ``contract``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels.flops import register_flops

_LIBRARY = torch.library.Library("segmoe_reference", "FRAGMENT")
_LIBRARY.define("grouped_mm(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor")
_LIBRARY.define("grouped_mm_contract(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor")


def _rows(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    offsets = expert_offsets.tolist()
    if offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > a.shape[0]:
        rule = f"ascend from 0 to at most M={a.shape[0]}"  # else some rows were never written
        check.fail_value("grouped_gemm", "expert_offsets", rule, offsets)
    for e in range(b.shape[0]):
        lo, hi = offsets[e], offsets[e + 1]
        if lo < hi:
            torch.mm(a[lo:hi], b[e].t(), out=out[lo:hi])
    out[offsets[-1] :].zero_()
    return out


def _contract(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    offsets = expert_offsets.tolist()
    out = a.new_empty(len(offsets) - 1, a.shape[1], b.shape[1])
    for e in range(out.shape[0]):
        lo, hi = offsets[e], offsets[e + 1]
        torch.mm(a[lo:hi].t(), b[lo:hi], out=out[e])  # zeros where the expert has no row
    return out


def _rows_fake(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:  # noqa: ARG001  schema
    return a.new_empty(a.shape[0], b.shape[1])


def _contract_fake(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    return a.new_empty(expert_offsets.shape[0] - 1, a.shape[1], b.shape[1])


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
        out: Tensor = torch.ops.segmoe_reference.grouped_mm(a, b, expert_offsets)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grads
        a, b, expert_offsets = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            da = grouped_mm(dout, b.transpose(1, 2), expert_offsets)
        if ctx.needs_input_grad[1]:
            db = grouped_mm_contract(dout, a, expert_offsets)
        return da, db, None


class _GroupedMMContract(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
        out: Tensor = torch.ops.segmoe_reference.grouped_mm_contract(a, b, expert_offsets)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grads
        a, b, expert_offsets = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            da = grouped_mm(b, dout, expert_offsets)
        if ctx.needs_input_grad[1]:
            db = grouped_mm(a, dout.transpose(1, 2), expert_offsets)
        return da, db, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # noqa: ARG004
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, inverse = ctx.saved_tensors
        return gather_rows(grads[0], inverse, index), None, None


def register_operator(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function],
) -> None:
    """Give an operator that a library defines its kernel, its shapes and its gradients.

    Args:
        library: of the namespace "segmoe_reference".
        name: of the operator.
        kernel: for every device.
        fake: returns tensors of the right shapes without a value.
        function: what runs the operator outside of compiled and exported programs, which call the
            operator alone and get the same gradients.
    """
    library.impl(name, kernel, "CompositeExplicitAutograd")
    qualified = f"segmoe_reference::{name}"
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(
        qualified, function.backward, setup_context=function.setup_context, lib=library
    )
    register_flops(getattr(torch.ops.segmoe_reference, name), name)


register_operator(_LIBRARY, "grouped_mm", _rows, _rows_fake, _GroupedMM)
register_operator(_LIBRARY, "grouped_mm_contract", _contract, _contract_fake, _GroupedMMContract)


def grouped_mm(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    """``(M, K), (E, N, K), (E + 1,) int32 -> (M, N)``; see the module's docstring."""
    out: Tensor = _GroupedMM.apply(a, b, expert_offsets)
    return out


def grouped_mm_contract(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    """``(M, N), (M, K), (E + 1,) int32 -> (E, N, K)``; see the module's docstring."""
    out: Tensor = _GroupedMMContract.apply(a, b, expert_offsets)
    return out


def grouped_linear(a: Tensor, b: Tensor, bias: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """`grouped_mm` plus a bias (E, N); rows of no expert stay zero."""
    y = grouped_mm(a, b, expert_offsets)
    if bias is None:
        return y
    return y + grouped_mm(a.new_ones(a.shape[0], 1), bias[..., None], expert_offsets)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows of x in another order, ``x[index]``; a gather backwards too, as ``inverse`` is known.

    The gradient of ``index_select`` is a scatter-add, which is slower and, on a GPU, not
    deterministic.

    Args:
        x: (R, W).
        index: (R,) int32, a permutation.
        inverse: (R,) int32, its inverse.

    Returns:
        (R, W).
    """
    out: Tensor = _GatherRows.apply(x, index, inverse)
    return out
