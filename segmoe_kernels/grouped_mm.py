"""The grouped matrix product of the reference backend, as one library operator.

``torch.nn.functional.grouped_mm`` has no float64, rejects expanded gradients and takes bfloat16
only under fake tensors (torch 2.13), so the reference brings its own. Two modes, closed under
differentiation: the gradient of each is expressed by the two, to any order.

* ``rows``: ``(M, K), (E, N, K) -> (M, N)``, row m of expert e is ``a[m] @ b[e].T``;
* ``contract``: ``(M, N), (M, K) -> (E, N, K)``, ``c[e] = a[rows of e].T @ b[rows of e]``.

Rows from ``expert_offsets[E]`` on belong to no expert: zeros in ``rows``, ignored in ``contract``.
"""

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("segmoe_reference", "FRAGMENT")
_LIBRARY.define("grouped_mm(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor")
_LIBRARY.define("grouped_mm_contract(Tensor a, Tensor b, Tensor expert_offsets) -> Tensor")


def _rows(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    offsets = expert_offsets.tolist()
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


_LIBRARY.impl("grouped_mm", _rows, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_mm_contract", _contract, "CompositeExplicitAutograd")
torch.library.register_fake("segmoe_reference::grouped_mm", _rows_fake, lib=_LIBRARY)
torch.library.register_fake("segmoe_reference::grouped_mm_contract", _contract_fake, lib=_LIBRARY)


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


# An exported program calls the operators, not the functions above: the same formulas for both.
for _name, _function in (("grouped_mm", _GroupedMM), ("grouped_mm_contract", _GroupedMMContract)):
    torch.library.register_autograd(
        f"segmoe_reference::{_name}",
        _function.backward,
        setup_context=_function.setup_context,
        lib=_LIBRARY,
    )


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
