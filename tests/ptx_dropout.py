"""Random numbers of the kernels' dropout, by their formula, for plain PyTorch to drop the same."""

import contextlib
from unittest import mock

import numpy as np
import torch

from segmoe_kernels.functional import permute


def random_bits(seed, rows, columns, width, side):
    """16 bits for each row (M,) and column (N,): Philox 4x32 with 7 rounds, see `dropout_scale`."""
    counter = np.zeros((4, len(rows), len(columns)), np.uint64)
    counter[0] = columns // (8 * side) * side + columns % (2 * side) // 2
    counter[1] = (rows & 0xFFFFFFFF)[:, None]
    counter[2] = (rows >> 32)[:, None]
    counter[3] = width
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    for number in range(7):
        key = [(seed >> 32 * k) + number * step for k, step in enumerate((0x9E3779B9, 0xBB67AE85))]
        key = [np.uint64(k & 0xFFFFFFFF) for k in key]
        b, a = counter[2] * np.uint64(0xCD9E8D57), counter[0] * np.uint64(0xD2511F53)
        counter = np.stack(
            [b >> high ^ counter[1] ^ key[0], b & low, a >> high ^ counter[3] ^ key[1], a & low]
        )
    words = np.take_along_axis(counter, (columns % (8 * side) // (2 * side))[None, None, :], 0)[0]
    return words >> (columns % 2 * 16).astype(np.uint64) & np.uint64(0xFFFF)


@contextlib.contextmanager
def dropout_of_the_kernels(layer, ids):
    """Let plain PyTorch drop what the kernels do, whose seeds it draws in their order."""
    steps = 1 if layer.expert_scope == "segment" else layer.segment_size
    slots = permute(ids, layer.num_experts, backend="reference").sorted_to_slot.numpy()
    hidden = layer.experts.up_proj.shape[1]

    def dropout(x, p):
        if not p:
            return x
        flat = x.flatten(0, -2)
        rows = np.arange(len(flat))
        if x.dim() == 2 and x.shape[1] == hidden:  # of experts, whose rows are sorted
            rows = slots[rows // steps].astype(np.int64) * steps + rows % steps
        seed = torch.randint(2**62, (1,)).item()
        width = x.shape[-1]
        # The shared expert's columns lie in a thread as they were loaded.
        side = 1 if x.dim() == 3 else 4
        bits = random_bits(seed, rows, np.arange(width), width, side)
        kept = torch.from_numpy(bits >= int(p * 65536 + 0.5)).view(x.shape)
        return x * kept / (1 - p)

    with mock.patch.object(torch.nn.functional, "dropout", dropout):
        torch.manual_seed(1)
        yield
