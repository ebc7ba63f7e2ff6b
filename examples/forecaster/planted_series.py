"""The positive control: a series in which blocks of patches carry what no single patch tells."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

PATCH = 8
# Blocks that take turns: what a block is like is decided by the one as many before.
TURNS = 4
PERSISTENCE, KEPT, HEIGHT = 0.9, 0.9, 1.2
# A mode's sign on each patch of a block. Whatever a single patch shows, two modes and more have it.
CODES = {
    2: ("++", "+-", "-+", "--"),
    3: ("+++", "+--", "-+-", "--+"),
    4: ("++++", "++--", "+-+-", "+--+"),
    5: ("+++++", "++---", "--++-", "----+"),
}


class Planted(NamedTuple):
    """A planted series.

    Attributes:
        values: (N, 1).
        law: (N, 1) the best forecast of each value from the blocks before it, NaN in the first
            blocks, which have none.
    """

    values: FloatArray
    law: FloatArray


def planted(block: int, num_blocks: int = 8000, seed: int = 0) -> Planted:
    """Generate a series of blocks of ``block`` patches of 8 steps.

    Each block is in one of four modes. It shows the mode by a code, a fixed shape whose sign
    differs between its patches, over noise-like patches ``z``. Four blocks later each patch is the
    old one turned by the mode's own rotation, ``z' = 0.9 A_mode z + sqrt(1 - 0.81) noise``, and one
    time in ten the mode changes. So the map that forecasts a patch is known from the signs of the
    whole block, and from no single patch; a model with one expert a mode needs nothing else.
    Rotations and the code's shape are the same for all seeds.

    Args:
        block: patches in a block: 2, 3, 4 or 5.
        num_blocks: N is 8 * block times as many.
        seed: of noise and modes.

    Returns:
        The series, and the forecast of the law that made it.
    """
    law = np.random.default_rng(1234)
    codes = np.array([[1.0 if sign == "+" else -1.0 for sign in code] for code in CODES[block]])
    turns = [np.linalg.qr(law.standard_normal((PATCH, PATCH)))[0] for _ in codes]
    shape = np.linalg.qr(law.standard_normal((PATCH, 1)))[0][:, 0]
    shown = HEIGHT * codes[:, :, None] * shape
    generator = np.random.default_rng(seed)
    inner = generator.standard_normal((TURNS, block, PATCH))
    mode = generator.integers(0, len(codes), TURNS)
    values = np.empty((num_blocks, block, PATCH))
    forecast = np.full_like(values, np.nan)
    for number in range(num_blocks):
        turn = number % TURNS
        if number >= TURNS:
            turned = PERSISTENCE * inner[turn] @ turns[mode[turn]].T
            forecast[number] = turned + shown[mode[turn]]
            noise = generator.standard_normal((block, PATCH))
            inner[turn] = turned + math.sqrt(1 - PERSISTENCE**2) * noise
            if generator.uniform() > KEPT:
                mode[turn] = generator.integers(0, len(codes))
        values[number] = inner[turn] + shown[mode[turn]]
    return Planted(values.reshape(-1, 1), forecast.reshape(-1, 1))
