"""Tensors in the middle of a larger, poisoned piece of memory, which a kernel must leave alone.

What a kernel reads beyond a tensor is NaN (or -1), what it writes there is noticed. An odd number
of elements lies in front, so that no tensor is aligned to more than its elements.
"""

import contextlib
from unittest import mock

import torch

# Elements on each side.
MARGIN = 1025


class RedZones:
    """Makes tensors with red zones around them, and looks whether these are still red."""

    def __init__(self):
        self._buffers = []

    def empty(self, shape, dtype, device="cpu"):
        """A contiguous tensor, full of NaN (or -1; True for bool) itself."""
        count = torch.Size(shape).numel()
        size = dtype.itemsize
        buffer = torch.full(((count + 2 * MARGIN) * size,), -1, dtype=torch.int8, device=device)
        self._buffers.append((buffer, size))
        return buffer.view(dtype)[MARGIN : MARGIN + count].view(shape)

    def copy(self, tensor):
        """The same numbers with red zones around them."""
        new = self.empty(tensor.shape, tensor.dtype, tensor.device)
        if tensor.dtype == torch.bool:
            # 0xFF is no flag that PyTorch would write.
            new.view(torch.int8).zero_()
        return new.copy_(tensor)

    def check(self):
        """Fail if anything was written to a red zone."""
        for buffer, size in self._buffers:
            edge = MARGIN * size
            for zone in (buffer[:edge], buffer[-edge:]):
                assert (zone == -1).all(), "a kernel wrote beyond a tensor"

    @contextlib.contextmanager
    def around_allocations(self):
        """Give red zones to what is allocated inside the block by the names that launchers use."""

        def new_empty(like, *shape, dtype=None, device=None):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return self.empty(shape, dtype or like.dtype, device or like.device)

        def new_zeros(like, *shape, **options):
            return new_empty(like, *shape, **options).zero_()

        def empty_like(like, dtype=None):
            return self.empty(like.shape, dtype or like.dtype, like.device)

        def empty(*shape, dtype=None, device="cpu"):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return self.empty(shape, dtype or torch.float32, device)

        with (
            mock.patch.object(torch.Tensor, "new_empty", new_empty),
            mock.patch.object(torch.Tensor, "new_zeros", new_zeros),
            mock.patch.object(torch, "empty_like", empty_like),
            mock.patch.object(torch, "empty", empty),
        ):
            yield
