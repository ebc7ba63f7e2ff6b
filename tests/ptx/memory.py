"""State spaces: their bytes, what of them is allocated and written, and who touched each last.

Whether two accesses race doesn't depend on the order in which they happen to run here: each cell,
as large as the smallest access of the kernel, keeps its last writer and its last readers with the
interval between barriers in which they were; what is in one interval, or in two blocks, isn't
ordered.

An access is described by a code: the block in the bits from 40 on, the interval from 12 on, the
thread below; so of two codes, what they have in common can be read from their exclusive or.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ptx.machine import Threads

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

BLOCK, INTERVAL, WARP = 40, 12, 5
NOBODY = -1
SEVERAL_WARPS = (1 << INTERVAL) - 1
SEVERAL_BLOCKS = 1 << 62
# The asynchronous proxy reads for four warps and comes after none of them.
GROUP = 1 << (INTERVAL - 1)
# Addresses of global memory don't fit 32 bits.
GLOBAL_BASE = 0x7F40_0000_0000
RED_ZONE = 256


def unordered(difference: Ints) -> NDArray[np.bool_]:
    """Where another warp of the same interval is: not for nobody, whose code is negative."""
    return (difference >= 1 << WARP) & (difference < 1 << INTERVAL)


def elsewhere(difference: Ints) -> NDArray[np.bool_]:
    """Where another block is."""
    return difference >= 1 << BLOCK


class Memory:
    """A state space: its bytes, garbage at first, and for each what may be done with it.

    ``allocated`` may be touched; ``written`` somebody wrote; ``pending`` asynchronous copies are on
    their way; ``unfenced`` the asynchronous proxy may not see yet. ``writer`` and ``reader`` are
    codes of each cell of ``cell`` bytes.
    """

    def __init__(
        self, name: str, size: int, base: int, garbage: np.random.Generator, cell: int = 1
    ) -> None:
        self.name, self.base = name, base
        self.size = size = -(-size // 16) * 16
        room = garbage.integers(0, 256, size + 16, dtype=np.uint8)
        start = -room.ctypes.data % 16
        self.data: Bytes = room[start : start + size]
        self.allocated, self.written, self.unfenced = (np.zeros(size, bool) for _ in range(3))
        self.pending = np.zeros(size, np.int16)
        self.top = RED_ZONE
        self.forget(cell)

    def forget(self, cell: int) -> None:
        """Begin a launch: what came before it is in order."""
        self.cell = cell
        self.writer, self.reader = np.full((2, self.size // cell), NOBODY, np.int64)

    def put(self, data: Bytes, written: NDArray[np.bool_] | bool) -> int:
        """Allocate a copy of ``data`` behind a red zone; 16 divides its address and 32 doesn't."""
        start = -(-self.top // 32) * 32 + 16
        end = start + data.size
        self.data[start:end] = data
        self.allocated[start:end] = True
        self.written[start:end] = written
        self.top = end + RED_ZONE
        return self.base + start

    def read(self, t: "Threads", index: Ints, size: int, codes: Ints, lanes: Ints) -> Bytes:
        """The bytes (lanes, size) of the accesses, each at ``size * index``, after the checks."""
        self.check_read(t, index, size, codes, lanes)
        return self.data.reshape(-1, size)[index]

    def check_read(self, t: "Threads", index: Ints, size: int, codes: Ints, lanes: Ints) -> None:
        """Report reads of what isn't there yet, and remember them."""
        new = self.written.reshape(-1, size)[index]
        if not new.all():
            t.find(f"read of {self.name} memory that nobody wrote", lanes[~new.all(1)])
        self._check_copies(t, "read of", index, size, lanes)
        if not t.races:
            return
        mine, cells = codes[:, None], size // self.cell
        difference = self.writer.reshape(-1, cells)[index] ^ mine
        self._report(t, "read of", "wrote", difference, lanes)
        readers = self.reader.reshape(-1, cells)
        difference = readers[index] ^ mine
        now = np.where(unordered(difference), mine | SEVERAL_WARPS, mine)
        if self is not t.shared:
            now = np.where(elsewhere(difference), SEVERAL_BLOCKS, now)
        readers[index] = now
        # Several lanes may have read one cell in this very instruction.
        difference = readers[index] ^ now
        together = difference >= 1 << WARP
        if together.any():
            place = (index[:, None] * cells + np.arange(cells))[together]
            apart = elsewhere(difference[together])
            self.reader[place[~apart]] = (now[together] | SEVERAL_WARPS)[~apart]
            self.reader[place[apart]] = SEVERAL_BLOCKS

    def write(self, t: "Threads", index: Ints, values: Bytes, codes: Ints, lanes: Ints) -> None:
        """Store the bytes (lanes, size) of the accesses, each at ``size * index``."""
        data = self.data.reshape(-1, values.shape[1])
        same = data[index] == values
        data[index] = values
        clash = (data[index] != values).any(1)
        t.find(f"lanes store different values to one place of {self.name} memory", lanes[clash])
        self.check_write(t, index, values.shape[1], codes, lanes, same)

    def check_write(
        self, t: "Threads", index: Ints, size: int, codes: Ints, lanes: Ints,
        same: NDArray[np.bool_] | None = None,
    ) -> None:  # fmt: skip
        """Report writes that race, and remember them; a byte that stays the same harms nobody."""
        self.written.reshape(-1, size)[index] = True
        if self is t.shared:
            self.unfenced.reshape(-1, size)[index] = True
            self._check_copies(t, "store to", index, size, lanes)
        if not t.races:
            return
        mine, cells = codes[:, None], size // self.cell
        writers, readers = self.writer.reshape(-1, cells), self.reader.reshape(-1, cells)
        for did, before in (("wrote", writers), ("read", readers)):
            difference = before[index] ^ mine
            if same is not None:
                difference[same.reshape(-1, cells, self.cell).all(2)] = 0
            self._report(t, "write to", did, difference, lanes)
        writers[index] = mine

    def _check_copies(self, t: "Threads", what: str, index: Ints, size: int, lanes: Ints) -> None:
        if t.copies and self is t.shared:
            busy = self.pending.reshape(-1, size)[index].any(1)
            t.find(f"{what} shared memory that an asynchronous copy is filling", lanes[busy])

    def _report(self, t: "Threads", what: str, did: str, difference: Ints, lanes: Ints) -> None:
        near = unordered(difference).any(1)
        text = f"race: {what} {self.name} memory that another"
        t.find(f"{text} warp {did} since the last barrier", lanes[near])
        if self is not t.shared:
            far = elsewhere(difference).any(1)
            t.find(f"{text} block {did}", lanes[far])
