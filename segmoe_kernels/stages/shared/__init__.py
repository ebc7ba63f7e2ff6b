"""Stage 4 of 4 where a shared expert exists: its FFN, its gate, and the sum with the choices.

Data flow: ``expert_out (top_k, B, T, D), x (B, T, D) -> y (B, T, D)``. A row of the shared expert
is a segment of P steps (or one step), W = P * D wide; M rows, H = P * F hidden columns. The matrix
products are PyTorch's; one pass of ours comes before (rows and the gate's logits), one between
(bias, activation, gating, dropout), one behind (gate, choices, mask, crop).

Kept is the hidden layer before its activation, 2 * H bytes a row in bfloat16 (4 * H gated): at
P = 5, D = 128, F = 256 that is 512 bytes a step, and saves a product of 2 * W * H FLOPs a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segmoe_kernels._triton.launch import define_operator, step_flags, within_reach
from segmoe_kernels._triton.tape import taped
from segmoe_kernels.autograd import apply, is_followed
from segmoe_kernels.routing import FFNWeights
from segmoe_kernels.stages.shared.launch import SharedCall, backward, forward

# y, the gate's logits, and what backward keeps: rows, pre and gate_pre.
_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _call(tensors: Sequence[Any], *options: Any) -> SharedCall:
    """The call that an operator's arguments describe."""
    x, *weights, shared_gate, padding_mask, seed = tensors
    return SharedCall(x, FFNWeights(*weights), shared_gate, padding_mask, seed, *options)


def _shared_fwd_fake(expert_out: Tensor, *args: Any) -> _Forward:
    return _outputs(_call(args[:10], *args[10:-1]), expert_out, args[-1])


def _outputs(call: SharedCall, expert_out: Tensor, keep: bool) -> _Forward:
    y = expert_out.new_empty(expert_out.shape[1:])
    logits = call.new_scalars(call.num_rows)
    copied = keep and not call.are_rows(call.x)
    rows = call.x.new_empty((call.num_rows, call.width) if copied else (0,))
    pre = call.new_hidden() if keep else call.x.new_empty(0)
    gate_pre = call.new_hidden() if keep and call.gated else call.x.new_empty(0)
    return y, logits, rows, pre, gate_pre


def _shared_fwd(
    expert_out: Tensor,
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate_proj: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    shared_gate: Tensor,
    padding_mask: Tensor | None,
    seed: Tensor | None,
    segment_size: int,
    activation: str,
    dropout: float,
    keep: bool,
) -> _Forward:
    weights = FFNWeights(up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias)
    call = SharedCall(
        x, weights, shared_gate, padding_mask, seed, segment_size, activation, dropout
    )
    if x.numel() == 0:
        return _outputs(call, expert_out, keep)
    return forward(call, expert_out, keep)


def _gradients(x: Tensor, weights: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor]:
    tensors = [x, *weights]
    return [
        x.new_empty(t.shape if n and t is not None else (0,))
        for t, n in zip(tensors, need, strict=True)
    ]


def _shared_bwd_fake(dy: Tensor, *args: Any) -> list[Tensor]:  # noqa: ARG001  schema
    return _gradients(args[0], args[1:8], args[-1])


def _shared_bwd(
    dy: Tensor,
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate_proj: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    shared_gate: Tensor,
    padding_mask: Tensor | None,
    seed: Tensor | None,
    logits: Tensor,
    rows: Tensor,
    pre: Tensor,
    gate_pre: Tensor,
    segment_size: int,
    activation: str,
    dropout: float,
    need: list[bool],
) -> list[Tensor]:
    weights = FFNWeights(up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias)
    found = _gradients(x, [*weights, shared_gate], need)
    if x.numel() == 0:
        return [t.zero_() for t in found]
    call = SharedCall(
        x, weights, shared_gate, padding_mask, seed, segment_size, activation, dropout
    )
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    wanted = [g if n else None for g, n in zip(found, need, strict=True)]
    backward(call, dy, logits, rows, pre, gate_pre if call.gated else None, wanted)
    return found


_shared_fwd_op = define_operator("shared_combine_fwd", _shared_fwd, _shared_fwd_fake)
_shared_bwd_op = define_operator("shared_combine_bwd", _shared_bwd, _shared_bwd_fake, gradient=True)


def _laid_out(x: Tensor, *given: Any) -> tuple[Any, ...]:
    """X and the next ten tensors as kernels read them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    matrices = [w if w is None else within_reach(w) for w in given[:3]]
    biases = [None if b is None else b.contiguous() for b in given[3:6]]
    return x, *matrices, *biases, given[6].contiguous(), step_flags(given[7], x.dtype), given[8]


@taped
def _forward(expert_out: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """y, logits and what backward needs, without what is not there."""
    if expert_out.stride(-1) != 1:
        expert_out = expert_out.contiguous()
    y, logits, *kept = _shared_fwd_op(expert_out, *_laid_out(*given[:10]), *given[10:])
    # One dimension is for what is not kept.
    return y, logits, *(t for t in kept if t.ndim == 2)


@taped
def _backward(dy: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, the weights and the gate; those that are wanted."""
    tensors, (options, need, logits, *kept) = given[:10], given[10:]
    nothing = dy.new_empty(0)
    gate_pre = nothing if tensors[3] is None else kept.pop()
    pre = kept.pop()
    rows = kept.pop() if kept else nothing
    laid_out = _laid_out(*tensors)
    found = _shared_bwd_op(dy, *laid_out, logits, rows, pre, gate_pre, *options, list(need))
    return tuple(g if n else None for g, n in zip(found, need, strict=True))


class _SharedCombine(torch.autograd.Function):
    """Keeps x, the weights, the logits and the hidden layer before its activation.

    Also x laid out as rows, where that is a copy.
    """

    @staticmethod
    def forward(
        expert_out: Tensor,
        x: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        gate_proj: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        down_bias: Tensor | None,
        shared_gate: Tensor,
        padding_mask: Tensor | None,
        seed: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        # The parameters are written out: torch.compile counts them.
        out: tuple[Tensor, ...] = _forward(
            *(expert_out, x, up_proj, down_proj, gate_proj, up_bias, gate_bias, down_bias),
            *(shared_gate, padding_mask, seed, *options),
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        expert_out, *tensors, ctx.options = inputs
        _, *kept = output
        ctx.num_choices = expert_out.shape[0]
        ctx.mark_non_differentiable(*kept)
        # Else a backward would fill a tensor of zeros for each of them.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 12
        need = ctx.needs_input_grad
        found: tuple[Tensor | None, ...] = (None,) * 8
        if any(need[1:9]):
            saved = ctx.saved_tensors
            found = _backward(dy, *saved[:10], ctx.options[:-1], need[1:9], *saved[10:])
        return dy.expand(ctx.num_choices, *dy.shape), *found, None, None, None


def shared_combine(
    expert_out: Tensor,
    x: Tensor,
    shared: FFNWeights,
    shared_gate: Tensor,
    *,
    segment_size: int,
    activation: str = "gelu",
    dropout: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Run the shared expert, gate it and add the choices; see `reference.shared_combine`."""
    seed = None
    if dropout > 0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    tensors = (expert_out, x, *shared, shared_gate)
    # An exported program has no backward; what backward keeps has another shape at some lengths.
    followed = is_followed(*tensors)
    keep = not torch.compiler.is_exporting() and followed
    options = (segment_size, activation, float(dropout), keep)
    found = apply(_SharedCombine, *tensors, padding_mask, seed, options, followed=followed)
    y: Tensor = found[0]
    return y
