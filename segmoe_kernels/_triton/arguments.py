"""What kernels take whole: tuples of the pointers, strides and options that belong together.

Fields may be None, which a kernel knows at compile time; other tuples may be fields. What isn't
there is a tuple of None alone: Triton 3.6 can't compare a tuple that holds one. Numbers of the
batch (`launch.OF_THE_BATCH`) are never in a tuple: Triton specialises every number in one.
"""

from typing import Any, NamedTuple

from torch import Tensor

from segmoe_kernels._triton.launch import exact
from segmoe_kernels.routing import FFNWeights


class Rows(NamedTuple):
    """Rows by strides, of sequences (top_k, B, T, D) or (B, T, D), or of a sorted matrix (M, K).

    Columns are contiguous.
    """

    ptr: Any
    stride_k: Any  # None for (B, T, D) and a sorted matrix
    stride_b: Any  # None for a sorted matrix
    stride_t: Any  # of a sorted matrix from row to row


class Layout(NamedTuple):
    """How rows lie in the sequences; a kernel's constant."""

    d_model: int
    top_k: int
    segment_size: int
    rows_per_slot: int
    concat: bool  # a row is a whole segment


class Slots(NamedTuple):
    """Which rows an expert gets, and which of them are real."""

    sorted_to_slot_ptr: Any  # (R,) int32
    expert_offsets_ptr: Any  # (E + 1,) int32
    padding_mask_ptr: Any  # (B, T) bool or None


class Sequences(NamedTuple):
    """Where gathered and scattered rows live, as launchers hand it on."""

    slots: Slots
    segments_per_sequence: int
    length: int
    layout: Layout


class Matrix(NamedTuple):
    """A matrix for each expert, (E, rows, columns) by strides; the columns are contiguous."""

    ptr: Any
    stride_e: Any
    stride_row: Any


class Factor(NamedTuple):
    """What rows are multiplied by, (E, N, K) by strides, and what goes with the product."""

    ptr: Any
    bias_ptr: Any  # (E, N) or None
    pre_ptr: Any  # (M, N) or None: takes the product before the activation
    stride_e: Any
    stride_n: Any
    stride_k: Any


NO_FACTOR = Factor(None, None, None, None, None, None)


class Experts(NamedTuple):
    """The experts' parameters."""

    up: Any  # Matrix (E, F, D)
    gate: Any  # Matrix (E, F, D) or None
    down: Any  # Matrix (E, D, F)
    up_bias_ptr: Any  # (E, F) or None
    gate_bias_ptr: Any  # (E, F) or None
    down_bias_ptr: Any  # (E, D) or None


class Router(NamedTuple):
    """The router's parameters."""

    weight_ptr: Any  # (E, W) by its stride
    start_ptr: Any  # (W,), what a causal router sees before the first segment, or None
    stride_row: Any


class Routed(NamedTuple):
    """What the router writes, every element."""

    logits_ptr: Any  # (S, E)
    probs_ptr: Any  # (S, E)
    topk_weights_ptr: Any  # (S, top_k)
    topk_ids_ptr: Any  # (S, top_k) int32
    block_counts_ptr: Any  # (blocks, E + 1) int32


class RoutedGradients(NamedTuple):
    """Gradients of what the router wrote, each contiguous or None."""

    topk_weights_ptr: Any  # (S, top_k)
    row_weights_ptr: Any  # (S, top_k, P): the same, one share for each step
    probs_ptr: Any  # (S, E)
    logits_ptr: Any  # (S, E)


class Dropout(NamedTuple):
    """Dropout of the hidden layer, or of the router's probabilities."""

    seed_ptr: Any  # (1,) int64, or None for no dropout
    probability: Any


class Kept(NamedTuple):
    """What backward writes for the products that make weight gradients.

    (R * P, F) sorted, or (M, H) of the shared expert.
    """

    hidden_ptr: Any  # the hidden layer times the routing weight, or the opened shared gate
    dpre_ptr: Any  # gradient of what the activation saw
    dgate_ptr: Any  # the same of the gate, or None


NO_KEPT = Kept(None, None, None)


class Shared(NamedTuple):
    """The shared path, or its gradient; contiguous."""

    out_ptr: Any  # (B, J * P, D)
    gate_logits_ptr: Any  # (B, J)


class Pre(NamedTuple):
    """What the activation of the shared expert sees, and what is added to it first."""

    up_ptr: Any  # (M, H)
    gate_ptr: Any  # (M, H) or None
    up_bias_ptr: Any  # (H,) or None
    gate_bias_ptr: Any  # (H,) or None


class Places(NamedTuple):
    """The sorted order of the slots, int32; every element is written."""

    sorted_to_slot_ptr: Any  # (R,)
    slot_to_sorted_ptr: Any  # (R,)
    expert_offsets_ptr: Any  # (E + 1,)
    expert_counts_ptr: Any  # (E,)


class Gradients(NamedTuple):
    """Gradients of the experts' parameters, in the order of a slot of partial sums.

    Contiguous tensors, or a program's sums.
    """

    up: Any  # (E, F, D)
    down: Any  # (E, D, F)
    gate: Any  # (E, F, D) or None
    up_bias: Any  # (E, F) or None, as the next two
    down_bias: Any  # (E, D)
    gate_bias: Any  # (E, F), or None without a gate


def rows_of(x: Tensor | None) -> Rows:
    """The tuple of a tensor (top_k, B, T, D) or (B, T, D), or of a sorted matrix."""
    if x is None:
        return Rows(None, None, None, None)
    strides = x.stride()[:-1]
    return Rows(x, *(None,) * (3 - len(strides)), *strides)


def sorted_rows(expert_offsets: Tensor) -> Sequences:
    """What stands for sequences where all rows live in sorted matrices."""
    return Sequences(Slots(None, expert_offsets, None), 1, 1, Layout(1, 1, 1, 1, concat=False))


def factor_of(weight: Tensor, bias: Tensor | None = None, pre: Tensor | None = None) -> Factor:
    """The tuple of a weight (E, N, K)."""
    return Factor(weight, bias, pre, *weight.stride())


def experts_of(weights: FFNWeights) -> Experts:
    """The tuple of stacked weights."""
    up, down, gate, *biases = weights
    return Experts(matrix_of(up), matrix_of(gate), matrix_of(down), *biases)


def router_of(weight: Tensor, start: Tensor | None) -> Router:
    """The tuple of the router's parameters."""
    return Router(weight, start, weight.stride(0))


def matrix_of(weight: Tensor | None) -> Matrix | None:
    """The tuple of one stacked matrix."""
    return None if weight is None else Matrix(weight, *weight.stride()[:2])


def dropout_of(seed: Tensor | None, probability: float, dtype: Any) -> Dropout:
    """The tuple of dropout, its probability as kernels of ``dtype`` take it."""
    return Dropout(seed, exact(probability, dtype))
