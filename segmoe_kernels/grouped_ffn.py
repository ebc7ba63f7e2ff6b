"""The experts' FFN of the reference backend as one operator for a CPU.

`composed_ffn` takes a few passes over the whole batch, and on a CPU each of them moves megabytes
through memory. `grouped_ffn` gathers some of one expert's rows, runs its FFN on them in cache and
scatters the result. Missing and masked steps are left out, so nothing is padded. For backward it
saves the hidden layer before the activation. Equal to rounding, with gradients to any order: the
first is an operator of the same kind, the others are those of the plain form.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from segmoe_kernels.composed_ffn import composed_ffn
from segmoe_kernels.grouped_mm import register_operator
from segmoe_kernels.routing import FFNWeights

_ATEN = torch.ops.aten
_ACTIVATE: dict[str, Callable[..., Tensor]] = {
    "gelu": _ATEN.gelu.out,
    "gelu_tanh": lambda x, out: _ATEN.gelu.out(x, approximate="tanh", out=out),
    "silu": _ATEN.silu.out,
    "relu": lambda x, out: torch.clamp_min(x, 0, out=out),
}
# In place: the gradient of the hidden layer becomes that of what the activation saw.
_ACTIVATE_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda d, x: _ATEN.gelu_backward.grad_input(d, x, grad_input=d),
    "gelu_tanh": lambda d, x: _ATEN.gelu_backward.grad_input(
        d, x, approximate="tanh", grad_input=d
    ),
    "silu": lambda d, x: _ATEN.silu_backward.grad_input(d, x, grad_input=d),
    "relu": lambda d, x: _ATEN.threshold_backward.grad_input(d, x, 0, grad_input=d),
}

# Bytes of the hidden layer that one thread works on at a time: half of a usual L2 cache.
_CHUNK_BYTES = 1 << 20

_LIBRARY = torch.library.Library("segmoe_reference", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor topk_weights, "
    "Tensor up_proj, Tensor down_proj, Tensor? gate_proj, "
    "Tensor? up_proj_bias, Tensor? gate_proj_bias, Tensor? down_proj_bias, "
    "Tensor sorted_to_slot, Tensor expert_offsets, Tensor? padding_mask"
)
_LIBRARY.define(
    f"grouped_ffn({_INPUTS}, int segment_size, str activation, bool save)"
    f" -> ({', '.join(['Tensor'] * 6)})"
)
_LIBRARY.define(
    f"grouped_ffn_bwd(Tensor dout, {_INPUTS}, Tensor pre, Tensor pre_gate, Tensor steps,"
    " Tensor slots, Tensor row_offsets, int segment_size, str activation, bool[] need)"
    f" -> ({', '.join(['Tensor'] * 8)})"
)


def grouped_ffn(
    x: Tensor,
    topk_weights: Tensor,
    experts: FFNWeights,
    sorted_to_slot: Tensor,
    expert_offsets: Tensor,
    padding_mask: Tensor | None,
    *,
    segment_size: int,
    activation: str,
) -> Tensor:
    """`composed_ffn` without dropout, an expert at a time."""
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, topk_weights, *experts)
    )
    # A compiler takes the operator: it would look into the function, which is no use to it. Without
    # gradients the function's way to the operator only costs time.
    function: Callable[..., tuple[Tensor, ...]] = torch.ops.segmoe_reference.grouped_ffn
    # The function refuses forward-mode derivatives, which the operator would drop in silence.
    tangents = forward_ad._current_level >= 0
    if (save or tangents) and not torch.compiler.is_compiling():
        function = _GroupedFFN.apply
    return function(
        x,
        topk_weights,
        *experts,
        sorted_to_slot,
        expert_offsets,
        padding_mask,
        segment_size,
        activation,
        save,
    )[0]


class _Chunk(NamedTuple):
    """Rows of one expert that are worked on together."""

    expert: int
    first: bool  # of its expert
    rows: slice  # among the rows in the experts' order
    steps: Tensor  # (n,) int64: where they are in x
    outputs: Tensor  # (n,) int64: where they are in the output
    slots: Tensor  # (n,) int64: whose weight they take
    weights: Tensor  # (n, 1)


def _rows(
    x: Tensor,
    top_k: int,
    sorted_to_slot: Tensor,
    expert_offsets: Tensor,
    padding_mask: Tensor | None,
    segment_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The real steps of each expert's segments, in the experts' order.

    Args:
        x: (B, T, D).
        top_k: slots of a segment.
        sorted_to_slot: (R,) int32.
        expert_offsets: (E + 1,) int32, in slots.
        padding_mask: (B, T) bool or None.
        segment_size: P.

    Returns:
        ``(steps, slots, row_offsets)``: int64, the step in x and the slot of each row, in room for
        (R * P,) of which the first ``row_offsets[E]`` are used; (E + 1,).
    """
    batch, length, _ = x.shape
    per_sequence = max(1, -(-length // segment_size))
    # Thousands of small integers: NumPy takes a quarter of the time of as many operators.
    step = np.full((batch, per_sequence * segment_size), -1)
    step[:, :length] = np.arange(batch * length).reshape(batch, length)
    if padding_mask is not None:
        step[:, :length][~padding_mask.numpy()] = -1
    offsets = expert_offsets.numpy()
    sorted_slots = sorted_to_slot.numpy()[: offsets[-1]]
    segment = sorted_slots // top_k if top_k > 1 else sorted_slots
    found = step.reshape(-1, segment_size).take(segment, axis=0).ravel()
    kept = np.flatnonzero(found >= 0)
    steps, slots = np.empty((2, sorted_to_slot.shape[0] * segment_size), dtype=np.int64)
    steps[: kept.size] = found.take(kept)
    slots[: kept.size] = sorted_slots.take(kept // segment_size)
    row_offsets = kept.searchsorted(offsets.astype(np.int64) * segment_size)
    return torch.from_numpy(steps), torch.from_numpy(slots), torch.from_numpy(row_offsets)


def _chunks(
    x: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    steps: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> list[_Chunk]:
    """Cut each expert's rows into pieces that fit the caches; the last three from `_rows`."""
    batch, length, _ = x.shape
    top_k, offsets = topk_weights.shape[1], row_offsets.tolist()
    steps, slots = steps[: offsets[-1]], slots[: offsets[-1]]
    outputs = steps if top_k == 1 else steps + slots % top_k * (batch * length)
    weights = topk_weights.flatten().to(x.dtype).index_select(0, slots)[:, None]
    size = max(1, torch.get_num_threads() * _CHUNK_BYTES // (up.element_size() * up.shape[1]))
    bounds, owners = [0], []
    for e, (start, end) in enumerate(pairwise(offsets)):
        # Sums over chunks would be rounded to 16 bits.
        count = 1 if up.element_size() < 4 else -(-(end - start) // size)
        bounds += [start + (end - start) * (i + 1) // count for i in range(count)]
        owners += [(e, i == 0) for i in range(count)]
    sizes = [hi - lo for lo, hi in pairwise(bounds)]
    columns = (t.split(sizes) for t in (steps, outputs, slots, weights))
    return [
        _Chunk(e, first, slice(*span), *tensors)
        for (e, first), span, *tensors in zip(owners, pairwise(bounds), *columns, strict=True)
        if tensors[0].shape[0]
    ]


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None, e: int, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(a, weight[e].t(), out=out)
    return torch.addmm(bias[e], a, weight[e].t(), out=out)


def _hidden(pre: Tensor, pre_gate: Tensor | None, activation: str, out: Tensor) -> Tensor:
    if pre_gate is None:
        return _ACTIVATE[activation](pre, out=out)
    return _ACTIVATE[activation](pre_gate, out=out).mul_(pre)


def _ffn(
    x: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    sorted_to_slot: Tensor,
    expert_offsets: Tensor,
    padding_mask: Tensor | None,
    segment_size: int,
    activation: str,
    save: bool,
) -> tuple[Tensor, ...]:
    top_k = topk_weights.shape[1]
    where = _rows(x, top_k, sorted_to_slot, expert_offsets, padding_mask, segment_size)
    chunks = _chunks(x, topk_weights, up, *where)
    most = max((c.steps.shape[0] for c in chunks), default=0)
    _, d_ff, width = up.shape
    x_rows = x.reshape(-1, width)
    out = x.new_empty(top_k, *x.shape)
    out_rows = out.view(-1, width)
    if (chunks[-1].rows.stop if chunks else 0) < out_rows.shape[0]:
        out.zero_()
    kept = sorted_to_slot.shape[0] * segment_size if save else most
    pre = x.new_empty(kept, d_ff)
    pre_gate = x.new_empty(0 if gate is None else kept, d_ff)
    # Room that stays in cache from chunk to chunk; what nobody needs again is written over.
    room = x.new_empty(most, width)
    hidden = x.new_empty(most, d_ff) if save else pre if gate is None else pre_gate
    for c in chunks:
        size = c.steps.shape[0]
        span = c.rows if save else slice(0, size)
        rows, g = torch.index_select(x_rows, 0, c.steps, out=room[:size]), None
        u = _linear(rows, up, up_bias, c.expert, pre[span])
        if gate is not None:
            g = _linear(rows, gate, gate_bias, c.expert, pre_gate[span])
        h = _hidden(u, g, activation, hidden[:size])
        y = _linear(h, down, down_bias, c.expert, rows)
        out_rows.index_copy_(0, c.outputs, y.mul_(c.weights))
    if save:
        return out, pre, pre_gate, *where
    nothing = (x.new_empty(0, d_ff) for _ in range(2))
    return out, *nothing, *(index.new_empty(0) for index in where)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, c: _Chunk) -> None:
    """Add ``a.T @ b`` to what the expert's chunks have so far."""
    if total is not None:
        total[c.expert].addmm_(a.t(), b, beta=0 if c.first else 1)


def _add_sum(total: Tensor | None, a: Tensor, c: _Chunk) -> None:
    """Add the sum of the rows."""
    if total is not None and c.first:
        total[c.expert].copy_(a.sum(0))
    elif total is not None:
        total[c.expert].add_(a.sum(0))


def _new_gradients(inputs: Sequence[Tensor | None], need: Sequence[bool]) -> tuple[Tensor, ...]:
    """Contiguous room for each gradient, of size 0 where none is asked for."""
    x = inputs[0]
    assert x is not None
    return tuple(
        x.new_empty(0) if t is None or not needed else t.new_empty(t.shape)
        for t, needed in zip(inputs, need, strict=True)
    )


def _ffn_bwd(
    dout: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    sorted_to_slot: Tensor,
    expert_offsets: Tensor,
    padding_mask: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    steps: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    segment_size: int,
    activation: str,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = (x, topk_weights, up, down, gate, up_bias, gate_bias, down_bias)
    where: tuple[Tensor, ...] = (steps, slots, row_offsets)
    if not row_offsets.numel():  # the forward saw nobody who would ask
        permutation = (sorted_to_slot, expert_offsets, padding_mask)
        saved = _ffn(*inputs, *permutation, segment_size, activation, save=True)
        pre, pre_gate, where = saved[1], saved[2], saved[3:]
    grads = _new_gradients(inputs, need)
    dx, dtopk_weights, *weight_grads = (
        grad if needed else None for grad, needed in zip(grads, need, strict=True)
    )
    dup, ddown, dgate, dup_bias, dgate_bias, ddown_bias = weight_grads
    chunks = _chunks(x, topk_weights, up, *where)
    _zero_idle(weight_grads, {c.expert for c in chunks})
    width = up.shape[2]
    x_rows, dout_rows = x.reshape(-1, width), dout.reshape(-1, width)
    # A step of exactly one row is written, else rows are added up.
    once = topk_weights.shape[1] == 1 and sum(c.steps.shape[0] for c in chunks) == x_rows.shape[0]
    if dx is not None and not once:
        dx.zero_()
    dweights = None if dtopk_weights is None else dtopk_weights.zero_().flatten()
    through = any(need[i] for i in (0, 2, 4, 5, 6))  # the activation
    most = max((c.steps.shape[0] for c in chunks), default=0)
    # Room that stays in cache from chunk to chunk.
    rooms = [x.new_empty(most, n) for n in (width, width, up.shape[1], up.shape[1])]
    for c in chunks:
        e = c.expert
        a, dy, hidden, du = (room[: c.steps.shape[0]] for room in rooms)
        u, g = pre[c.rows], None if gate is None else pre_gate[c.rows]
        torch.index_select(dout_rows, 0, c.outputs, out=dy)
        torch.mm(dy, down[e], out=du)
        _hidden(u, g, activation, hidden)
        if dweights is not None:
            _add_row_weights(
                dweights, du, hidden, dy, None if down_bias is None else down_bias[e], c
            )
        dy.mul_(c.weights)
        _add_product(ddown, dy, hidden, c)
        _add_sum(ddown_bias, dy, c)
        if not through:
            continue
        du.mul_(c.weights)
        torch.index_select(x_rows, 0, c.steps, out=a)
        if g is None:
            _ACTIVATE_BACKWARD[activation](du, u)
        else:
            dg = _ACTIVATE_BACKWARD[activation](du * u, g)
            du.mul_(_ACTIVATE[activation](g, out=hidden))
            _add_product(dgate, dg, a, c)
            _add_sum(dgate_bias, dg, c)
        _add_product(dup, du, a, c)
        _add_sum(dup_bias, du, c)
        if dx is not None:
            da = torch.mm(du, up[e], out=dy)
            if gate is not None:
                da.addmm_(dg, gate[e])
            # An expert meets a step once: no two rows of a chunk add to the same.
            add = dx.view(-1, width).index_copy_ if once else dx.view(-1, width).index_add_
            add(0, c.steps, da)
    return grads


def _add_row_weights(
    total: Tensor, dhidden: Tensor, hidden: Tensor, dy: Tensor, down_bias: Tensor | None, c: _Chunk
) -> None:
    """Add ``<dy, down @ hidden + bias>`` of each row to its slot."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    found = (dhidden.to(wide) * hidden.to(wide)).sum(-1)
    if down_bias is not None:
        found += (dy.to(wide) * down_bias.to(wide)).sum(-1)
    total.index_add_(0, c.slots, found.to(total.dtype))


def _zero_idle(grads: Sequence[Tensor | None], busy: set[int]) -> None:
    """Zero the gradients of the experts without a row."""
    for grad in grads:
        if grad is not None:
            for e in set(range(grad.shape[0])) - busy:
                grad[e].zero_()


def _ffn_fake(x: Tensor, topk_weights: Tensor, *args: Any) -> tuple[Tensor, ...]:
    up, gate, sorted_to_slot, expert_offsets = args[0], args[2], args[6], args[7]
    segment_size, save = args[9], args[11]
    rows = sorted_to_slot.shape[0] * segment_size if save else 0
    return (
        x.new_empty(topk_weights.shape[1], *x.shape),
        x.new_empty(rows, up.shape[1]),
        x.new_empty(rows if gate is not None else 0, up.shape[1]),
        *(
            expert_offsets.new_empty(size, dtype=torch.int64)
            for size in (rows, rows, expert_offsets.shape[0] if save else 0)
        ),
    )


def _ffn_bwd_fake(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:  # noqa: ARG001  schema
    return _new_gradients(args[:8], args[-1])


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.segmoe_reference.grouped_ffn(*inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.segment_size, ctx.activation, _ = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)  # nobody asks for those of the hidden layer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None:
            return (None,) * 14
        need = list(ctx.needs_input_grad[:8])
        found = _GroupedFFNBackward.apply(  # type: ignore[no-untyped-call]
            grads[0], *ctx.saved_tensors, ctx.segment_size, ctx.activation, need
        )
        asked = (grad if needed else None for grad, needed in zip(found, need, strict=True))
        return (*asked, *(None,) * 6)


class _GroupedFFNBackward(torch.autograd.Function):
    """Its own derivatives are those of the plain form's gradients."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.segmoe_reference.grouped_ffn_bwd(*inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        *tensors, ctx.segment_size, ctx.activation, ctx.need = inputs
        ctx.save_for_backward(*tensors[:12])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor | None) -> tuple[Any, ...]:
        create_graph = torch.is_grad_enabled()
        found: list[Any] = [None] * 20
        with torch.enable_grad():
            # Views, so that derivatives stop here while the graph behind them goes on.
            tensors: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            dout, x, topk_weights, *weights = tensors[:9]
            sorted_to_slot, expert_offsets, padding_mask = ctx.saved_tensors[9:]
            count, device = sorted_to_slot.shape[0], sorted_to_slot.device
            slots = torch.arange(count, dtype=torch.int32, device=device)
            out = composed_ffn(
                x,
                topk_weights,
                FFNWeights(*weights),
                sorted_to_slot,
                slots.scatter(0, sorted_to_slot.long(), slots),
                expert_offsets,
                padding_mask,
                segment_size=ctx.segment_size,
                activation=ctx.activation,
            )
            asked = [
                (t, dgrad)
                for t, needed, dgrad in zip(tensors[1:9], ctx.need, dgrads, strict=True)
                if needed and dgrad is not None
            ]
            wanted = [
                (i, t) for i, t in enumerate(tensors[:9]) if t is not None and t.requires_grad
            ]
            if asked and wanted:
                firsts = torch.autograd.grad(out, [t for t, _ in asked], dout, create_graph=True)
                seconds = torch.autograd.grad(
                    firsts,
                    [t for _, t in wanted],
                    [dgrad for _, dgrad in asked],
                    create_graph=create_graph,
                    allow_unused=True,
                )
                for (i, _), second in zip(wanted, seconds, strict=True):
                    found[i] = second
        return tuple(found)


register_operator(_LIBRARY, "grouped_ffn", _ffn, _ffn_fake, _GroupedFFN)
register_operator(_LIBRARY, "grouped_ffn_bwd", _ffn_bwd, _ffn_bwd_fake, _GroupedFFNBackward)
