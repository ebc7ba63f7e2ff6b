"""What `torch.utils.flop_counter.FlopCounterMode` counts for our operators.

The products of the layer's definition, a multiply-add as two: what a layer needs, as if every step
were real and routed. What kernels compute anew in backward, and the padding of their tiles, is not
counted (`benchmarks.traffic` counts these).
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["install_flops", "register_flops"]

Shape = Sequence[int]


def _ffn(rows: int, up: Shape, gate: Shape | None, need: tuple[bool, bool] | None = None) -> int:
    """Products of one FFN: forward, or the gradients that it needs, dx and dw."""
    hidden, width = up[-2:]
    products = matrices = 2 if gate is None else 3
    if need is not None:
        # The hidden layer's gradient, from it that of x, and those of the matrices.
        products = any(need) + (matrices - 1) * need[0] + matrices * need[1]
    return 2 * rows * hidden * width * products


def _segments(x: Shape, segment_size: int) -> int:
    return math.prod(x[:-2]) * -(-x[-2] // segment_size)


def _expert_rows(x: Shape, topk_weights: Shape, *, concat: bool) -> int:
    # x is there once for each choice: (top_k, B, T, D).
    steps = topk_weights[0] if concat else math.prod(x[-3:-1])
    return steps * topk_weights[1]


def _route_fwd(x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    return 2 * _segments(x, rest[3]) * math.prod(weight)


def _route_bwd(x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    need_dx, need_dweight = rest[-2:]
    return 2 * _segments(x, rest[10]) * math.prod(weight) * int(need_dx + need_dweight)


def _expert_ffn_fwd(x: Shape, weights: Shape, *rest: Any, **__: Any) -> int:
    _, _, up, _, gate, *_, concat, _, _, _ = rest
    return _ffn(_expert_rows(x, weights, concat=concat), up, gate)


def _expert_ffn_bwd(x: Shape, weights: Shape, *rest: Any, **__: Any) -> int:
    _, _, up, _, gate, *_, concat, _, _, dx, _, dw = rest
    return _ffn(_expert_rows(x, weights, concat=concat), up, gate, (dx, dw))


def _shared_combine_fwd(expert_out: Shape, x: Shape, *rest: Any, **__: Any) -> int:  # noqa: ARG001
    up, gate, size = rest[0], rest[2], rest[9]
    rows = _segments(x, size)
    return 2 * rows * int(up[-1]) + _ffn(rows, up, gate)


def _shared_combine_bwd(dy: Shape, x: Shape, *rest: Any, **__: Any) -> int:  # noqa: ARG001
    # need: x, up, down, gate, three biases, the shared gate.
    up, gate, size, need = rest[0], rest[2], rest[13], rest[-1]
    rows, dx, dw = _segments(x, size), need[0], any(need[1:4])
    of_gate = 2 * rows * int(up[-1]) * int(dx + need[7])
    return of_gate + _ffn(rows, up, gate, (dx, dw))


def _grouped_gemm(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """(M, K) by (E, N, K), or (M, N) and (M, K) over each expert's rows: all are those of a."""
    return 2 * math.prod(a) * b[1]


def _grouped_ffn(
    rows: Shape, up: Shape, down: Shape | None, gate: Shape | None, *_: Any, **__: Any
) -> int:
    products = 1 + (down is not None) + (gate is not None)
    return 2 * rows[0] * math.prod(up[1:]) * products


def _grouped_ffn_bwd(dout: Shape, rows: Shape, *rest: Any, **__: Any) -> int:  # noqa: ARG001
    up, down, gate, *_, need = rest
    if down is None:
        return _grouped_ffn(rows, up, down, gate) * (int(need[0]) + int(need[1]))
    return _ffn(rows[0], up, gate, (need[0], any(need[1:4])))


FORMULAS: dict[str, Callable[..., int]] = {
    "expert_ffn_bwd": _expert_ffn_bwd,
    "expert_ffn_fwd": _expert_ffn_fwd,
    "grouped_ffn": _grouped_ffn,
    "grouped_ffn_bwd": _grouped_ffn_bwd,
    "grouped_gemm_dw": _grouped_gemm,
    "grouped_gemm_fwd": _grouped_gemm,
    "route_bwd": _route_bwd,
    "route_fwd": _route_fwd,
    "shared_combine_bwd": _shared_combine_bwd,
    "shared_combine_fwd": _shared_combine_fwd,
}


def register_flops(packet: Any, name: str) -> None:
    """Give an operator, ``torch.ops.<namespace>.<name>``, its formula; else it has no products."""
    if name in FORMULAS:
        _PENDING.append((packet, name))


_PENDING: list[tuple[Any, str]] = []
_INSTALLED: list[Any] = []


def install_flops() -> None:
    """Tell PyTorch's counter, once somebody has imported it: that takes triton and much else."""
    modes = _get_current_dispatch_mode_stack() if _len_torch_dispatch_stack() else []
    if not (_PENDING or modes) or "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils import flop_counter

    while _PENDING:
        packet, name = _PENDING.pop()
        flop_counter.register_flop_formula(packet)(FORMULAS[name])
        _INSTALLED.append(packet)
    # Counters copy the formulas when they are made, which may have been before.
    counters = [m.counter for m in modes if isinstance(m, flop_counter._FlopCounterMode)]
    for counter in counters:
        for packet in _INSTALLED:
            counter.flop_registry.setdefault(packet, flop_counter.flop_registry[packet])
