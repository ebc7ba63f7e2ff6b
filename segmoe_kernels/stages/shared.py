"""Stage 4 of 4 where a shared expert exists: its FFN, its gate, and the sum with the choices.

Data flow: ``expert_out (top_k, B, T, D), x (B, T, D) -> y (B, T, D)``. A row of the shared expert
is a segment of P steps (or one step), W = P * D wide; M rows, H = P * F hidden columns. Two plans,
the same result up to rounding:

* "vendor": PyTorch's matrix products; one pass of ours before (rows and the gate's logits), one
  between (bias, activation, gating, dropout), one behind (gate, choices, mask, crop);
* "fused": two matrix products of ours, with all of that in their epilogues; x is read where it is.

Both keep the hidden layer before its activation, 2 * H bytes a row in bfloat16 (4 * H gated): at
P = 5, D = 128, F = 256 that is 512 bytes a step, and saves a product of 2 * W * H FLOPs a row.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from segmoe_kernels import validation as check
from segmoe_kernels._triton.launch import (
    accumulator,
    accumulator_dtype,
    define_operator,
    input_precision,
    padded,
    refuse_double_backward,
)
from segmoe_kernels._triton.tile_table import TileConfig
from segmoe_kernels._triton.tiles import (
    SHARED_GROUP_M,
    num_shared_splits,
    shared_gemm_dw_tile,
    shared_gemm_tile,
)
from segmoe_kernels.routing import FFNWeights
from segmoe_kernels.stages.combine import launch_combine
from segmoe_kernels.stages.shared_backward_kernels import (
    shared_dhidden_kernel,
    shared_dlogit_kernel,
    shared_dw_kernel,
    shared_reduce_kernel,
)
from segmoe_kernels.stages.shared_kernels import shared_steps_kernel, shared_up_kernel
from segmoe_kernels.stages.shared_passes import (
    shared_activate_bwd_kernel,
    shared_activate_kernel,
    shared_dx_kernel,
    shared_rows_kernel,
)

PLANS = ("auto", "vendor", "fused")


def choose_plan(width: int, hidden: int, dtype: torch.dtype) -> str:  # noqa: ARG001  see below
    """Say which plan runs: "vendor" or "fused".

    Args:
        width: W, columns of a row.
        hidden: H.
        dtype: of the products.

    Returns:
        What SEGMOE_SHARED says; else "vendor".

    Raises:
        ValueError: if SEGMOE_SHARED is not one of `PLANS`.
    """
    plan = os.environ.get("SEGMOE_SHARED", "auto")
    check.check_choice("shared_combine", "SEGMOE_SHARED", plan, PLANS)
    if plan != "auto":
        return plan
    # A measurement on a GPU decides, by width, hidden and dtype; none has been made. Predicted for
    # 69,888 rows of 640 x 1,280 in bfloat16 on an H200: a product takes 145 us and a separate pass
    # over the hidden layer 83 us, so ours wins from 85 % of the vendor's rate on.
    return "vendor"


class _Call:
    """One call's tensors and what the launches derive from them."""

    def __init__(
        self,
        x: Tensor,
        weights: FFNWeights,
        shared_gate: Tensor,
        padding_mask: Tensor | None,
        seed: Tensor | None,
        plan: str,
        segment_size: int,
        activation: str,
        dropout: float,
    ) -> None:
        self.x, self.weights, self.shared_gate = x, weights, shared_gate
        self.padding_mask, self.seed = padding_mask, seed
        self.plan, self.segment_size, self.dropout = plan, segment_size, dropout
        self.batch, self.length, self.d_model = x.shape
        self.hidden, self.width = weights.up_proj.shape
        self.segments_per_sequence = -(-self.length // segment_size)
        self.num_rows = self.batch * self.segments_per_sequence
        self.gated = weights.gate_proj is not None
        # Rows that x holds already, one behind the other.
        whole = self.length % segment_size == 0 and padding_mask is None
        self.is_rows = whole and x.is_contiguous()
        self.sizes = (self.num_rows, self.segments_per_sequence, self.length)
        self.places = {"D": self.d_model, "SEGMENT_SIZE": segment_size}
        self.activation = {"ACTIVATION": activation}
        self.acc = {"ACC": accumulator(x.dtype)}
        self.numerics = {**self.acc, "PRECISION": input_precision(x.dtype)}

    def new_hidden(self) -> Tensor:
        return self.x.new_empty(self.num_rows, self.hidden)

    def new_scalars(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=accumulator_dtype(self.x.dtype))

    def gate_stride(self) -> int:
        return 0 if self.weights.gate_proj is None else self.weights.gate_proj.stride(0)


def _options(tile: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _grid(num_rows: int, columns: int, tile: TileConfig) -> tuple[int]:
    # Kernels count rows in 32 bits, those of a partial tile included.
    check.check_programs("shared_combine", num_rows + tile.block_m)
    programs = triton.cdiv(num_rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    check.check_programs("shared_combine", programs)
    return (programs,)


def _pass_block(columns: int) -> tuple[int, int]:
    """Rows and columns of a program that computes on every element once."""
    block_n = min(padded(columns), 256)
    return 4096 // block_n, block_n


# ---- Plan "fused" ----


def _fused_fwd(
    call: _Call, expert_out: Tensor, y: Tensor, logits: Tensor, pre: Tensor | None,
    gate_pre: Tensor | None,
) -> None:  # fmt: skip
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    hidden = call.new_hidden()
    tile = shared_gemm_tile(
        call.hidden, call.width, call.x.dtype, accumulators=4 if call.gated else 2
    )
    shared_up_kernel[_grid(call.num_rows, call.hidden, tile)](
        call.x,
        up,
        gate,
        up_bias,
        gate_bias,
        call.shared_gate,
        call.padding_mask,
        call.seed,
        hidden,
        pre,
        gate_pre,
        logits,
        *call.sizes,
        *call.x.stride()[:2],
        up.stride(0),
        call.gate_stride(),
        call.dropout,
        H=call.hidden,
        W=call.width,
        **call.places,
        **call.activation,
        **call.numerics,
        GROUP_M=SHARED_GROUP_M,
        **_options(tile),
    )
    _rows_to_steps(call, hidden, down.t(), y, bias=down_bias, logits=logits, expert_out=expert_out)


def _rows_to_steps(
    call: _Call,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    *,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    dlogits: Tensor | None = None,
    expert_out: Tensor | None = None,
) -> None:
    """Launch `shared_steps_kernel`; the arguments are its own."""
    tile = shared_gemm_tile(call.width, call.hidden, call.x.dtype)
    shared_steps_kernel[_grid(call.num_rows, call.width, tile)](
        a,
        a2,
        b,
        b2,
        bias,
        logits,
        dlogits,
        call.shared_gate,
        expert_out,
        call.padding_mask,
        y,
        *call.sizes,
        *b.stride(),
        *((0, 0) if b2 is None else b2.stride()),
        *((0, 0, 0) if expert_out is None else expert_out.stride()[:3]),
        K=call.hidden,
        W=call.width,
        **call.places,
        TOP_K=0 if expert_out is None else expert_out.shape[0],
        **call.numerics,
        GROUP_M=SHARED_GROUP_M,
        **_options(tile),
    )


def _fused_bwd(
    call: _Call, dy: Tensor, logits: Tensor, pre: Tensor, gate_pre: Tensor | None,
    grads: "_Gradients",
) -> None:  # fmt: skip
    up, down, gate, _, _, down_bias = call.weights
    tile = shared_gemm_tile(
        call.hidden, call.width, call.x.dtype, accumulators=4 if call.gated else 2
    )
    column_tiles = triton.cdiv(call.hidden, tile.block_n)
    row_tiles = triton.cdiv(call.num_rows, tile.block_m)
    hidden, dpre = call.new_hidden(), call.new_hidden()
    dgate = call.new_hidden() if call.gated else None
    shares = call.new_scalars(column_tiles, call.num_rows)
    dbias = grads.bias_partials(call, row_tiles)
    shared_dhidden_kernel[_grid(call.num_rows, call.hidden, tile)](
        dy,
        down,
        down_bias,
        pre,
        gate_pre,
        logits,
        call.padding_mask,
        call.seed,
        hidden,
        dpre,
        dgate,
        shares,
        dbias,
        *call.sizes,
        *dy.stride()[:2],
        down.stride(0),
        call.dropout,
        H=call.hidden,
        W=call.width,
        **call.places,
        **call.activation,
        **call.numerics,
        GROUP_M=SHARED_GROUP_M,
        **_options(tile),
    )
    dlogits = call.new_scalars(call.num_rows)
    opened = None if grads.down_bias is None else torch.empty_like(dlogits)
    if grads.x is not None or grads.shared_gate is not None or opened is not None:
        shared_dlogit_kernel[(triton.cdiv(call.num_rows, 128),)](
            shares,
            logits,
            dlogits,
            opened,
            call.num_rows,
            column_tiles,
            **call.acc,
            BLOCK_M=128,
            num_warps=4,
        )
    if grads.x is not None:
        _rows_to_steps(call, dpre, up, grads.x, a2=dgate, b2=gate, dlogits=dlogits)
    _fused_dw(call, dy, hidden, dpre, dgate, dlogits, opened, grads)
    grads.reduce_bias(call, dbias)


def _fused_dw(
    call: _Call, dy: Tensor, hidden: Tensor, dpre: Tensor, dgate: Tensor | None, dlogits: Tensor,
    opened: Tensor | None, grads: "_Gradients",
) -> None:  # fmt: skip
    """Weight gradients, in partial sums over runs of rows."""
    # a, b, whether the sum is transposed, vector, the matrix and the vector that come out. Where
    # the vector alone is wanted, the matrix is made too.
    matrix = call.hidden * call.width
    products = [
        (call.x, dpre, True, dlogits, grads.up_proj, grads.shared_gate),
        (call.x, dgate, True, None, grads.gate_proj, None),
        (dy, hidden, False, opened, grads.down_proj, grads.down_bias),
    ]
    products = [p for p in products if p[-2] is not None or p[-1] is not None]
    if not products:
        return
    masked = call.padding_mask is not None
    tile = shared_gemm_dw_tile(call.width, call.hidden, call.x.dtype, masked=masked)
    columns = (triton.cdiv(call.width, tile.block_n), triton.cdiv(call.hidden, tile.block_k))
    splits = num_shared_splits(call.num_rows, tile.block_m, columns[0] * columns[1])
    grid = (splits, *columns)
    sizes = [[matrix] if p[-1] is None else [matrix, call.width] for p in products]
    outputs: list[tuple[Tensor | None, int]] = []
    partials = None
    if splits > 1 or any(p[-2] is None for p in products):
        partials = call.new_scalars(splits, sum(map(sum, sizes)))
    offset = 0
    for (a, b, transposed, vector, weight, along), parts in zip(products, sizes, strict=True):
        slots = [weight, along]
        if partials is not None:
            slots = [partials[:, offset:], partials[:, offset + matrix :]]
            outputs += zip((weight, along), parts, strict=False)
            offset += sum(parts)
        shared_dw_kernel[grid](
            a,
            b,
            None if along is None else vector,
            call.padding_mask,
            slots[0],
            None if along is None else slots[1],
            *call.sizes,
            splits,
            0 if partials is None else partials.shape[1],
            *a.stride()[:2],
            H=call.hidden,
            W=call.width,
            **call.places,
            TRANSPOSED=transposed,
            **call.numerics,
            **_options(tile),
        )
    if partials is not None:
        _reduce(partials, outputs, block_r=1)


def _reduce(partials: Tensor, outputs: Sequence[tuple[Tensor | None, int]], block_r: int) -> None:
    """Add up partial sums into outputs, which lie one behind the other in a slot."""
    outputs = [*outputs, *[(None, 0)] * (5 - len(outputs))]
    block = 1024 // block_r
    grid = (triton.cdiv(partials.shape[1], block),)
    shared_reduce_kernel[grid](
        partials,
        *(out for out, _ in outputs),
        *partials.shape,
        *(size for _, size in outputs),
        ACC=accumulator(partials.dtype),
        BLOCK_R=block_r,
        BLOCK=block,
        num_warps=4,
    )


# ---- Plan "vendor" ----


def _lay_out_rows(
    call: _Call, x: Tensor, vector: Tensor | None, *, copied: bool
) -> tuple[Tensor, Tensor | None]:
    """Return x as (M, W), and its product with vector, in one pass; none where neither needs it."""
    if copied:
        rows = x.new_empty(call.num_rows, call.width)
    else:
        rows = x.reshape(call.num_rows, call.width)
    along = None if vector is None else call.new_scalars(call.num_rows)
    if copied or vector is not None:
        block_m, block_n = _pass_block(call.width)
        shared_rows_kernel[(triton.cdiv(call.num_rows, block_m),)](
            x,
            vector,
            call.padding_mask,
            rows if copied else None,
            along,
            *call.sizes,
            *x.stride()[:2],
            W=call.width,
            **call.places,
            **call.acc,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return rows, along


def _vendor_fwd(call: _Call, expert_out: Tensor, keep: bool) -> tuple[Tensor, ...]:
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    rows, logits = _lay_out_rows(call, call.x, call.shared_gate, copied=not call.is_rows)
    assert logits is not None
    pre = torch.mm(rows, up.t())
    gate_pre = None if gate is None else torch.mm(rows, gate.t())
    hidden = torch.empty_like(pre) if keep else pre
    block_m, block_n = _pass_block(call.hidden)
    programs = triton.cdiv(call.num_rows, block_m) * triton.cdiv(call.hidden, block_n)
    check.check_programs("shared_combine", programs)
    shared_activate_kernel[(programs,)](
        pre,
        gate_pre,
        up_bias,
        gate_bias,
        call.seed,
        hidden,
        call.num_rows,
        call.dropout,
        H=call.hidden,
        **call.activation,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    if down_bias is None:
        out = torch.mm(hidden, down.t())
    else:
        out = torch.addmm(down_bias, hidden, down.t())
    shape = (call.batch, call.segments_per_sequence)
    y = launch_combine(
        expert_out, out.view(*shape, call.width), logits.view(shape), call.padding_mask
    )
    found = [None if call.is_rows else rows, pre, gate_pre]
    # Outputs may not alias each other: an empty tensor for each that is not there.
    kept = [call.x.new_empty(0) if t is None or not keep else t for t in found]
    return (y, logits, *kept)


def _vendor_bwd(
    call: _Call, dy: Tensor, logits: Tensor, rows: Tensor, pre: Tensor, gate_pre: Tensor | None,
    grads: "_Gradients",
) -> None:  # fmt: skip
    up, down, gate, up_bias, gate_bias, down_bias = call.weights
    if call.is_rows:
        rows = call.x.view(call.num_rows, call.width)
    whole = call.length % call.segment_size == 0 and call.padding_mask is None
    copied = not (whole and dy.is_contiguous())
    drows, from_bias = _lay_out_rows(call, dy, down_bias, copied=copied)
    dpre = torch.mm(drows, down)
    hidden = call.new_hidden()
    dgate = call.new_hidden() if call.gated else None
    dlogits = call.new_scalars(call.num_rows)
    block_m, block_n = 32, min(padded(call.hidden), 128)
    programs = triton.cdiv(call.num_rows, block_m)
    dbias = grads.bias_partials(call, programs)
    shared_activate_bwd_kernel[(programs,)](
        dpre,
        pre,
        gate_pre,
        up_bias,
        gate_bias,
        logits,
        from_bias,
        call.seed,
        hidden,
        dpre,
        dgate,
        dlogits,
        dbias,
        call.num_rows,
        call.dropout,
        H=call.hidden,
        **call.activation,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8,
    )
    grads.reduce_bias(call, dbias)
    if grads.down_proj is not None:
        torch.mm(drows.t(), hidden, out=grads.down_proj)
    if grads.down_bias is not None:
        opened = torch.sigmoid(logits).to(dy.dtype)
        torch.mv(drows.t(), opened, out=grads.down_bias)
    if grads.up_proj is not None:
        torch.mm(dpre.t(), rows, out=grads.up_proj)
    if grads.gate_proj is not None and dgate is not None:
        torch.mm(dgate.t(), rows, out=grads.gate_proj)
    if grads.shared_gate is not None:
        torch.mv(rows.t(), dlogits.to(rows.dtype), out=grads.shared_gate)
    if grads.x is None:
        return
    drows = torch.mm(dpre, up)
    if dgate is not None and gate is not None:
        drows = torch.addmm(drows, dgate, gate)
    block_m, block_d = _pass_block(call.d_model)
    num_steps = call.batch * call.length
    programs = triton.cdiv(num_steps, block_m) * triton.cdiv(call.d_model, block_d)
    check.check_programs("shared_combine", programs)
    shared_dx_kernel[(programs,)](
        drows,
        dlogits,
        call.shared_gate,
        call.padding_mask,
        grads.x,
        num_steps,
        call.segments_per_sequence,
        call.length,
        **call.places,
        **call.acc,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )


# ---- Operators ----


class _Gradients:
    """Where the gradients go; None for what nobody wants."""

    def __init__(self, found: Sequence[Tensor], need: Sequence[bool]) -> None:
        self.found = list(found)
        wanted = [g if n else None for g, n in zip(found, need, strict=True)]
        self.x, self.up_proj, self.down_proj, self.gate_proj = wanted[:4]
        self.up_bias, self.gate_bias, self.down_bias, self.shared_gate = wanted[4:]

    def bias_partials(self, call: _Call, slots: int) -> Tensor | None:
        """Slots for the partial sums of the hidden layer's bias gradients."""
        if self.up_bias is None and self.gate_bias is None:
            return None
        return call.new_scalars(slots, call.hidden * (2 if call.gated else 1))

    def reduce_bias(self, call: _Call, partials: Tensor | None) -> None:
        """Add up what `bias_partials` holds."""
        if partials is None:
            return
        outputs = [(self.up_bias, call.hidden)]
        if call.gated:
            outputs.append((self.gate_bias, call.hidden))
        _reduce(partials, outputs, block_r=32)


_WEIGHTS = (
    "Tensor x, Tensor up_proj, Tensor down_proj, Tensor? gate_proj, Tensor? up_bias, "
    "Tensor? gate_bias, Tensor? down_bias, Tensor shared_gate, Tensor? padding_mask, Tensor? seed"
)
_OPTIONS = "str plan, SymInt segment_size, str activation, float dropout"


def _call(tensors: Sequence[Any], *options: Any) -> _Call:
    """The call that an operator's arguments describe."""
    x, *weights, shared_gate, padding_mask, seed = tensors
    return _Call(x, FFNWeights(*weights), shared_gate, padding_mask, seed, *options)


def _shared_fwd_fake(expert_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _call(args[:10], *args[10:-1])
    keep = args[-1]
    y = expert_out.new_empty(expert_out.shape[1:])
    logits = call.new_scalars(call.num_rows)
    copied = keep and call.plan == "vendor" and not call.is_rows
    rows = call.x.new_empty((call.num_rows, call.width) if copied else (0,))
    pre = call.new_hidden() if keep else call.x.new_empty(0)
    gate_pre = call.new_hidden() if keep and call.gated else call.x.new_empty(0)
    return y, logits, rows, pre, gate_pre


def _shared_fwd(expert_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, keep = _call(args[:10], *args[10:-1]), args[-1]
    if call.plan == "fused" or call.x.numel() == 0:
        y, logits, rows, pre, gate_pre = _shared_fwd_fake(expert_out, *args)
        if y.numel():
            kept = pre if keep else None, gate_pre if keep and call.gated else None
            _fused_fwd(call, expert_out, y, logits, *kept)
        return y, logits, rows, pre, gate_pre
    with torch.autocast(call.x.device.type, enabled=False):
        return _vendor_fwd(call, expert_out, keep)


def _gradients(x: Tensor, weights: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor]:
    tensors = [x, *weights]
    return [
        x.new_empty(t.shape if n and t is not None else (0,))
        for t, n in zip(tensors, need, strict=True)
    ]


def _shared_bwd_fake(dy: Tensor, *args: Any) -> list[Tensor]:  # noqa: ARG001  schema
    return _gradients(args[0], args[1:8], args[-1])


def _shared_bwd(dy: Tensor, *args: Any) -> list[Tensor]:
    logits, rows, pre, gate_pre = args[10:14]
    call, need = _call(args[:10], *args[14:-1]), args[-1]
    found = _gradients(args[0], args[1:8], need)
    if call.x.numel() == 0:
        return [t.zero_() for t in found]
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    grads = _Gradients(found, need)
    gate_pre = gate_pre if call.gated else None
    if call.plan == "fused":
        _fused_bwd(call, dy, logits, pre, gate_pre, grads)
    else:
        with torch.autocast(call.x.device.type, enabled=False):
            _vendor_bwd(call, dy, logits, rows, pre, gate_pre, grads)
    return found


_shared_fwd_op = define_operator(
    f"shared_combine_fwd(Tensor expert_out, {_WEIGHTS}, {_OPTIONS}, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _shared_fwd,
    _shared_fwd_fake,
)
_shared_bwd_op = define_operator(
    f"shared_combine_bwd(Tensor dy, {_WEIGHTS}, Tensor logits, Tensor rows, Tensor pre, "
    f"Tensor gate_pre, {_OPTIONS}, bool[] need) -> Tensor[]",
    _shared_bwd,
    _shared_bwd_fake,
)


class _SharedCombine(torch.autograd.Function):
    """Keeps x, the weights, the logits and the hidden layer before its activation.

    The vendor's plan also keeps x laid out as rows, where that is a copy.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, options = args
        out: tuple[Tensor, ...] = _shared_fwd_op(*tensors, *options)
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
            made = _SharedCombineBackward.apply(
                dy, *ctx.saved_tensors, (*ctx.options[:-1], list(need[1:9]))
            )
            found = tuple(g if n else None for g, n in zip(made, need[1:9], strict=True))
        return dy.expand(ctx.num_choices, *dy.shape), *found, None, None, None


class _SharedCombineBackward(torch.autograd.Function):
    """The gradient as a function of its own, so that a second derivative is refused loudly."""

    @staticmethod
    def forward(
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
        options: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        # The parameters are written out: torch.compile counts them.
        return tuple(
            _shared_bwd_op(
                dy,
                x,
                up_proj,
                down_proj,
                gate_proj,
                up_bias,
                gate_bias,
                down_bias,
                shared_gate,
                padding_mask,
                seed,
                logits,
                rows,
                pre,
                gate_pre,
                *options,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        refuse_double_backward()


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
    if expert_out.stride(-1) != 1:
        expert_out = expert_out.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    matrices = [w if w is None or w.stride(-1) == 1 else w.contiguous() for w in shared[:3]]
    biases = [None if w is None else w.contiguous() for w in shared[3:]]
    seed = None
    if dropout > 0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    tensors = (expert_out, x, *matrices, *biases, shared_gate.reshape(-1).contiguous())
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors[1:]
    )
    plan = choose_plan(shared.up_proj.shape[1], shared.up_proj.shape[0], x.dtype)
    y, *_ = _SharedCombine.apply(
        *tensors,
        None if padding_mask is None else padding_mask.contiguous(),
        seed,
        (plan, segment_size, activation, float(dropout), needs_grad),
    )
    result: Tensor = y
    return result
