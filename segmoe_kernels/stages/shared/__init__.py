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

from torch import Tensor

from segmoe_kernels._triton.launch import define_operator, step_flags, within_reach
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


def _laid_out(given: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors as kernels read them, in the order of the operators' arguments."""
    x, padding_mask, *weights, shared_gate, seed = given
    x = x.to(weights[0].dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    matrices = [w if w is None else within_reach(w) for w in weights[:3]]
    biases = [None if b is None else b.contiguous() for b in weights[3:]]
    flags = step_flags(padding_mask, x.dtype)
    return x, *matrices, *biases, shared_gate.contiguous(), flags, seed


def shared_fwd(
    expert_out: Tensor, given: Sequence[Any], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """y, and what backward needs: logits (M,), then rows and hidden layers as far as kept.

    Args:
        expert_out: of the choices.
        given: x, padding_mask, weights, shared_gate, seed.
        options: ``(segment_size, activation, dropout, keep)``.
    """
    if expert_out.stride(-1) != 1:
        expert_out = expert_out.contiguous()
    y, logits, *kept = _shared_fwd_op(expert_out, *_laid_out(given), *options)
    # One dimension is for what is not kept.
    return y, logits, *(t for t in kept if t.ndim == 2)


def shared_bwd(
    dy: Tensor,
    given: Sequence[Any],
    options: tuple[Any, ...],
    kept: Sequence[Tensor],
    need: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, the weights and the gate, those that are needed; ``kept`` of `shared_fwd`."""
    logits, *layers = kept
    nothing = dy.new_empty(0)
    gate_pre = nothing if given[4] is None else layers.pop()
    pre = layers.pop()
    rows = layers.pop() if layers else nothing
    saved = (logits, rows, pre, gate_pre)
    found = _shared_bwd_op(dy, *_laid_out(given), *saved, *options[:-1], list(need))
    return [g if n else None for g, n in zip(found, need, strict=True)]
