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


def test_each_broken_series_is_broken_where_it_says():
    whole = planted_series.planted(4, 2000, seed=1).values.reshape(-1, 4, 8)
    broken = {
        name: planted_series.planted(
            4, 2000, 1, **{k: v for k, v in settings.items() if k not in {"offset", "step"}}
        )
        for name, settings in planted_series.BROKEN.items()
    }
    struck = (broken["spikes"].values - whole.reshape(-1, 1)) ** 2 > 1
    assert struck.mean() == pytest.approx(0.01, rel=0.1)
    # Noise along the code's shape alone: 1 of the 8 directions of a patch.
    noise = broken["noisy-code"].values.reshape(-1, 4, 8) - whole
    assert np.linalg.matrix_rank(noise.reshape(-1, 8), tol=1e-6) == 1
    assert noise.var() * 8 == pytest.approx(1.2**2, rel=0.1)
    # A law that holds in the halves of a block, whose patches are of different modes.
    split = broken["split-blocks"]
    error = (split.values - split.law)[128:].reshape(-1, 2, 16)
    assert (error**2).mean((0, 2)) == pytest.approx([0.22, 0.22], rel=0.1)
    shown = {}
    for name in ("8-modes", "told-by-a-patch"):
        means = (broken[name].law[128:]).reshape(-1, 4, 8)
        shown[name] = np.linalg.matrix_rank(np.cov(means.reshape(-1, 32).T), tol=1e-3)
    assert shown == {"8-modes": 32, "told-by-a-patch": 32}


@pytest.mark.parametrize(("name", "look_back"), [("planted-4", 248), ("offset", 256)])
def test_windows_of_all_splits_begin_at_one_phase(name, look_back):
    series = data.load_series(name, seed=1)
    values = planted_series.planted(4, seed=1).values
    raw = series.values * series.std + series.mean
    first = {"planted-4": 0, "offset": 16}[name]
    for split in ("train", "val", "test"):
        past = data.Windows(series, split, look_back, 64, torch.float64).batch(slice(0, 1))[0][0, 0]
        start = int(np.flatnonzero(series.values[:, 0] == past[0].item())[0])
        assert start % 32 == 0
        assert raw[start : start + 9] == pytest.approx(values[start + first : start + first + 9])
