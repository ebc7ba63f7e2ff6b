"""The least that a layer has to compute and to move, whoever does it."""

from benchmarks.shapes import Shape

__all__ = ["floor_bytes", "needed_flops"]


def needed_flops(shape: Shape, *, backward: bool, gated: bool = False, shared: bool = False) -> int:
    """FLOPs of the products in the layer's definition.

    Forward: ``B*T * (4 * top_k * D * F + 2 * D * E)``, gated experts 6 instead of 4; a segment-wide
    shared expert adds the same of one FFN of width ``P * D`` and its gate for each segment. The
    gradients of both operands cost twice that again.

    Args:
        shape: sizes.
        backward: forward and backward; else the forward alone.
        gated: experts with a third matrix.
        shared: with the segment-wide shared expert.

    Returns:
        A multiply-add counts two.
    """
    products = 6 if gated else 4
    experts = products * shape.top_k * shape.d_model * shape.d_ff
    flops = shape.steps * (experts + 2 * shape.d_model * shape.num_experts)
    if shared:
        wide = shape.segment_size * shape.d_model
        flops += shape.segments * (products * wide * shape.segment_size * shape.d_ff + 2 * wide)
    return flops * (3 if backward else 1)


def floor_bytes(
    shape: Shape,
    *,
    backward: bool,
    itemsize: int = 4,
    gated: bool = False,
    shared: bool = False,
) -> int:
    """The least bytes that go through memory.

    Forward: x, y and the weights once. Forward + backward: that, then x, dy, dx, the weights and
    their gradients once, so ``5 * |x| + 3 * |weights|``.

    Args:
        shape: sizes.
        backward: forward and backward; else the forward alone.
        itemsize: bytes of an element.
        gated: experts with a third matrix.
        shared: with the segment-wide shared expert.

    Returns:
        Bytes.
    """
    x = shape.steps * shape.d_model
    matrices = 3 if gated else 2
    weights = matrices * shape.num_experts * shape.d_model * shape.d_ff
    weights += shape.num_experts * shape.segment_size * shape.d_model
    if shared:
        wide = shape.segment_size * shape.d_model
        weights += matrices * wide * shape.segment_size * shape.d_ff + wide
    return itemsize * (5 * x + 3 * weights if backward else 2 * x + weights)
