"""The planted series, on which segments have to win: its law, its windows, and that they do."""

import numpy as np
import pytest
import torch

from examples.forecaster import data, planted_series
from segmoe_kernels import SegMoE


def test_a_planted_series_follows_its_law():
    """What is left is the noise, and what a mode's change adds that no forecast can know."""
    values, law = planted_series.planted(4, 6000, seed=1)
    noise = 1 - planted_series.PERSISTENCE**2
    # One in ten draws a mode, three of four another one: two of four signs differ, in 1 value of 8.
    change = 0.1 * 3 / 4 * (2 * planted_series.HEIGHT) ** 2 / 2 / 8
    assert ((values - law)[4 * 32 :] ** 2).mean() == pytest.approx(noise + change, rel=0.03)
    assert np.isnan(law[: 4 * 32]).all()
    again = planted_series.planted(4, 3000, seed=2).values
    assert not np.array_equal(values, again)


def test_windows_of_a_planted_series_begin_where_a_block_does():
    series = data.load_series("planted-3", seed=1)
    for split in ("train", "val", "test"):
        windows = data.Windows(series, split, 8 * 24, 2 * 24)
        start = max(0, getattr(series.splits, split)[0] - (0 if split == "train" else 8 * 24))
        assert start % 24 == 0
        assert len(windows) > 500
        past = windows.batch(torch.tensor([3]))[0][0, 0]
        expected = series.values[start + 3 * 24 : start + 3 * 24 + 8 * 24, 0]
        torch.testing.assert_close(past, torch.from_numpy(expected).float())


def test_segments_find_what_a_single_patch_does_not_tell():
    """What the layer is for: a fifth and more off the error of token-wise experts."""

    def error(size, seed):
        torch.manual_seed(seed)
        blocks = planted_series.planted(4, 4000, seed).values
        blocks = torch.from_numpy(blocks).float().view(-1, 4, planted_series.PATCH)
        past, ahead = blocks[: -planted_series.TURNS], blocks[planted_series.TURNS :]
        layer = SegMoE(8, 32, 4, segment_size=size, shared_expert=None, aux_loss_weight=0.02)
        optimizer = torch.optim.AdamW(layer.parameters(), 0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=500)
        for _ in range(500):
            ids = torch.randint(3000, (256,))
            optimizer.zero_grad()
            (past[ids] + layer(past[ids]) - ahead[ids]).square().mean().backward()
            optimizer.step()
            schedule.step()
        layer.eval()
        with torch.no_grad():
            return (past + layer(past) - ahead)[3000:].square().mean().item()

    token, segment = (sum(error(size, seed) for seed in (0, 1)) for size in (1, 4))
    assert segment < 0.8 * token
