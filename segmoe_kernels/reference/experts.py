"""The experts' FFN in plain PyTorch: a loop over experts, differentiable to any order.

One expert's rows at a time stay in cache between its products. Compilers and tensors without values
can't be asked how many rows an expert has: for them the loop is an operator, as is its gradient.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import _C, Tensor
from torch._subclasses.fake_tensor import is_fake

from segmoe_kernels import validation as check
from segmoe_kernels.activations import ACTIVATIONS
from segmoe_kernels.autograd import apply, is_followed, no_autocast
from segmoe_kernels.flops import register_flops
from segmoe_kernels.routing import FFNWeights, Permutation
from segmoe_kernels.segments import segments


def dense_ffn(
    x: Tensor, weights: FFNWeights, activation: str, dropout: float | Tensor = 0.0
) -> Tensor:
    """One FFN on every row: (..., D) -> (..., D); dropout is a probability or a drawn scale."""
    function = ACTIVATIONS[activation].function
    hidden = F.linear(x, weights.up_proj, weights.up_proj_bias)
    if weights.gate_proj is None:
        hidden = function(hidden)
    else:
        hidden = function(F.linear(x, weights.gate_proj, weights.gate_proj_bias)) * hidden
    if isinstance(dropout, Tensor):
        hidden = hidden * dropout
    elif dropout:
        hidden = F.dropout(hidden, dropout)
    return F.linear(hidden, weights.down_proj, weights.down_proj_bias)


_INPUTS = (
    "Tensor rows, Tensor up_proj, Tensor? down_proj, Tensor? gate_proj, Tensor? up_proj_bias, "
    "Tensor? gate_proj_bias, Tensor? down_proj_bias, Tensor? scale, Tensor offsets, str? activation"
)
_LIBRARY = torch.library.Library("segmoe_reference", "FRAGMENT")
_LIBRARY.define(f"grouped_ffn({_INPUTS}) -> Tensor")
_LIBRARY.define(f"grouped_ffn_bwd(Tensor dout, {_INPUTS}, bool[] need) -> Tensor[]")


def _loop(rows: Any, *args: Any) -> Tensor:
    *weights, scale, expert_offsets, activation = args
    offsets = expert_offsets.tolist()
    if offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > rows.shape[0]:
        rule = f"ascend from 0 to at most M={rows.shape[0]}"
        name = "grouped_gemm" if weights[1] is None else "expert_ffn"
        check.fail_value(name, "expert_offsets", rule, offsets)
    sizes = [hi - lo for lo, hi in itertools.pairwise([*offsets, rows.shape[0]])]
    scales = itertools.repeat(0.0) if scale is None else scale.split(sizes)
    # Not w[e], whose gradient is as large as w for each expert.
    experts = zip(
        *(itertools.repeat(None) if w is None else w.unbind() for w in weights), strict=False
    )
    out = []
    for part, kept, expert in zip(rows.split(sizes), scales, experts, strict=False):
        if expert[1] is None:
            y = F.linear(part, expert[0], expert[3])
            out.append(y if activation is None else ACTIVATIONS[activation].function(y))
        else:
            out.append(dense_ffn(part, FFNWeights(*expert), activation, kept))
    if sizes[-1] or not out:
        width = weights[0 if weights[1] is None else 1].shape[1]
        out.append(rows.new_zeros(sizes[-1], width))
    return torch.cat(out)


def _loop_fake(rows: Tensor, up: Tensor, down: Tensor | None, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], (up if down is None else down).shape[1])


def _loop_bwd(dout: Tensor, *args: Any) -> list[Tensor]:
    *inputs, offsets, activation, need = args
    # Operators run below autograd, at least under a mode such as a counter of FLOPs.
    included, excluded = _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()
    for key in (_C.DispatchKey.AutogradCPU, _C.DispatchKey.AutogradCUDA):
        excluded = excluded.remove(key)
    with _C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(n)
            for t, n in zip(inputs, need, strict=True)
        ]
        out = _loop(*leaves, offsets, activation)
        asked = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, asked, dout.detach()))
    return [next(found).contiguous() if n else dout.new_empty(0) for n in need]


def _loop_bwd_fake(dout: Tensor, *args: Any) -> list[Tensor]:
    return [dout.new_empty(t.shape if n else 0) for t, n in zip(args, args[-1], strict=False)]


for _name, _kernel, _fake in (
    ("grouped_ffn", _loop, _loop_fake),
    ("grouped_ffn_bwd", _loop_bwd, _loop_bwd_fake),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"segmoe_reference::{_name}", _fake, lib=_LIBRARY)
    register_flops(getattr(torch.ops.segmoe_reference, _name), _name)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:8])
    operator = torch.ops.segmoe_reference.grouped_ffn_bwd
    found = operator(dout, *ctx.saved_tensors, ctx.activation, need)
    return *(g if n else None for g, n in zip(found, need, strict=True)), None, None


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:  # noqa: ARG001
    raise RuntimeError(
        "segmoe_kernels: no second derivatives in compiled code or of tensors without values; "
        "differentiate eager code with backend='reference'."
    )


torch.library.register_autograd(
    "segmoe_reference::grouped_ffn", _backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "segmoe_reference::grouped_ffn_bwd", _refuse_second_derivative, lib=_LIBRARY
)


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


def _is_recorded() -> bool:
    """Whether a graph is made of what runs, into which today's number of rows must not go."""
    proxy = _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY)
    return _C._get_tracing_state() is not None or proxy is not None


def grouped_ffn(
    rows: Tensor,
    weights: Sequence[Tensor | None],
    scale: Tensor | None,
    expert_offsets: Tensor,
    activation: str | None,
) -> Tensor:
    """Each expert's FFN on its rows (M, K), sorted by expert; rows of no expert give zeros.

    Weights are the fields of `FFNWeights`; without a down_proj the hidden layer, (M, F), is the
    result, and there may be no activation. Dropout multiplies it by ``scale`` (M, F).
    """
    blind = torch.compiler.is_compiling() or _is_recorded() or rows.is_meta or is_fake(rows)
    run = torch.ops.segmoe_reference.grouped_ffn if blind else _loop
    # As the kernels, which autocast doesn't reach: who wants other dtypes casts the weights.
    with no_autocast(rows.device.type):
        out: Tensor = run(rows, *weights, scale, expert_offsets, activation)
    return out


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows of x in another order, ``x[index]``; a gather backwards too, as ``inverse`` is known.

    The gradient of ``index_select`` is a scatter-add, which is slower and, on a GPU, not
    deterministic.
    """
    out: Tensor = apply(_GatherRows, x, index, inverse, followed=is_followed(x))
    return out


def composed_ffn(
    x: Tensor,
    topk_weights: Tensor,
    experts: FFNWeights,
    permutation: Permutation,
    padding_mask: Tensor | None,
    segment_size: int,
    activation: str,
    dropout: float = 0.0,
) -> Tensor:
    """`functional.expert_ffn` in token scope; 0 where masked and for the slots of no expert."""
    batch, length, d_model = x.shape
    top_k = topk_weights.shape[-1]
    # PyTorch's own methods here: those of einops take as long as a small product.
    slots = segments(x, segment_size, padding_mask).flatten(2).flatten(0, 1)
    if top_k > 1:
        slots = repeat(slots, "s w -> (s k) w", k=top_k)
    order = permutation.sorted_to_slot, permutation.slot_to_sorted
    rows = gather_rows(slots, *order).reshape(-1, d_model)
    scale = None
    if dropout:
        scale = F.dropout(rows.new_ones(rows.shape[0], experts.up_proj.shape[1]), dropout)
    offsets = permutation.expert_offsets * segment_size
    rows = grouped_ffn(rows, experts, scale, offsets, activation)
    slots = gather_rows(rows.reshape(slots.shape), *reversed(order))
    shape = (batch, -(-length // segment_size), top_k)
    slots = slots.reshape(*shape, segment_size, d_model).permute(2, 0, 1, 3, 4)
    weights = topk_weights.to(slots.dtype).reshape(*shape, 1, 1).permute(2, 0, 1, 3, 4)
    out = (slots * weights).flatten(2, 3)[:, :, :length]
    return out if padding_mask is None else out.masked_fill(~padding_mask[..., None], 0)
