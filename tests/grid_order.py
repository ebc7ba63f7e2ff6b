"""A race detector without a GPU: run the programs of each interpreted launch in another order.

The interpreter runs programs one after another, so overlapping writes look right in the default
order. What a kernel writes must not depend on the order of its programs.
"""

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any

from triton.runtime.interpreter import InterpreterBuilder

ORDERS = ("forward", "reverse", "shuffled")


@contextlib.contextmanager
def program_order(kind: str, seed: int = 0) -> Iterator[None]:
    """Run the launches inside the block in another program order.

    Args:
        kind: "forward", "reverse" or "shuffled".
        seed: of the shuffle.

    Raises:
        ValueError: if kind is none of them.
    """
    if kind not in ORDERS:
        raise ValueError(f"expected kind to be one of {ORDERS}, got {kind!r}.")
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def place(index: int, count: int) -> int:
        if kind == "forward":
            return index
        if kind == "reverse":
            return count - 1 - index
        return _shuffled(count, seed)[index]

    def new_set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        count = self.grid_dim[0] * ny * nz
        j = place((x * ny + y) * nz + z, count)
        set_grid_idx(self, j // (ny * nz), (j // nz) % ny, j % nz)

    InterpreterBuilder.set_grid_idx = new_set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = set_grid_idx


@functools.cache
def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
