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
# As many modes again; each patch shows one sign in four of them.
EIGHT = (*CODES[4], "--++", "-+-+", "-++-", "----")
# What is otherwise on series of blocks of 4 patches: settings of `planted`, the step that the first
# block of windows begins at, and how many steps windows are apart, 32 being a block.
BROKEN: dict[str, dict[str, float]] = {
    "offset": {"offset": 16},
    "any-patch": {"step": 40},
    "any-step": {"step": 33},
    "noisy-code": {"code_noise": 1.2},
    "split-blocks": {"split": 0.5},
    "8-modes": {"modes": 8},
    "spikes": {"spikes": 0.01},
    "told-by-a-patch": {"told": True},
}
SPIKE = 6.0


class Planted(NamedTuple):
    """A planted series.

    Attributes:
        values: (N, 1).
        law: (N, 1) the best forecast of each value from the blocks before it, NaN in the first
            blocks, which have none.
    """

    values: FloatArray
    law: FloatArray


def planted(
    block: int,
    num_blocks: int = 8000,
    seed: int = 0,
    *,
    modes: int = 4,
    told: bool = False,
    code_noise: float = 0.0,
    split: float = 0.0,
    spikes: float = 0.0,
) -> Planted:
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
        modes: 4, or 8 for a block of 4.
        told: each mode has a shape of its own in place of a code, so that one patch tells it.
        code_noise: deviation of a patch's height of the shape, which is 1.2 or -1.2.
        split: share of the changes after which the halves of a block have modes of their own.
        spikes: share of the steps that have 6 added or taken off.

    Returns:
        The series, and the forecast of the law that made it, which knows the modes.
    """
    law, generator = np.random.default_rng(1234), np.random.default_rng(seed)
    extra = np.random.default_rng([seed, 1])
    signs = EIGHT if modes == 8 else CODES[block]
    codes = np.array([[float(sign + "1") for sign in code] for code in signs])[:, :, None]
    turns = np.stack([np.linalg.qr(law.standard_normal((PATCH, PATCH)))[0] for _ in codes])
    shape = np.linalg.qr(law.standard_normal((PATCH, modes if told else 1)))[0]
    shown = HEIGHT * (np.repeat(shape.T[:, None], block, 1) if told else codes * shape[:, 0])
    patches = np.arange(block)
    inner = generator.standard_normal((TURNS, block, PATCH))
    mode = np.repeat(generator.integers(0, modes, TURNS)[:, None], block, axis=1)
    values = np.empty((num_blocks, block, PATCH))
    forecast = np.full_like(values, np.nan)
    for number in range(num_blocks):
        turn = number % TURNS
        if number >= TURNS:
            turned = PERSISTENCE * np.einsum("pij,pj->pi", turns[mode[turn]], inner[turn])
            forecast[number] = turned + shown[mode[turn], patches]
            noise = generator.standard_normal((block, PATCH))
            inner[turn] = turned + math.sqrt(1 - PERSISTENCE**2) * noise
            if generator.uniform() > KEPT:
                mode[turn] = generator.integers(0, modes)
                if extra.uniform() < split:
                    mode[turn, block // 2 :] = extra.integers(0, modes)
        values[number] = inner[turn] + shown[mode[turn], patches]
    values += code_noise * extra.standard_normal((num_blocks, block, 1)) * shape[:, 0]
    struck = extra.uniform(size=values.shape) < spikes
    values += SPIKE * struck * extra.choice([-1, 1], values.shape)
    return Planted(values.reshape(-1, 1), forecast.reshape(-1, 1))
