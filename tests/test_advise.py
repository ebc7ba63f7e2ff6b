"""The probe of segment sizes: what was planted is found, what is not there is not, its parts."""

import gzip
import json
import sys

import numpy as np
import pytest

from examples.forecaster import planted_series
from segmoe_kernels import __main__ as command
from segmoe_kernels.series import advise as module
from segmoe_kernels.series.advise import advise, plot_advice


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def short(monkeypatch):
    """Windows of 96 steps in place of 256: a tenth of the time."""
    monkeypatch.setattr(module, "STEPS", 96)


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.usefixtures("short")
def test_the_planted_size_is_found_where_windows_begin_with_a_block(block):
    values = planted_series.planted(block, 2500, seed=1).values
    advice = advise(values, patch=8, step=8 * block, max_size=4)
    assert advice.size == block
    assert advice.gains[block - 1] > 0.15
    others = [gain for size, gain in enumerate(advice.gains, 1) if size != block]
    assert advice.gains[block - 1] > 1.5 * max(others)
    anywhere = advise(values, patch=8, step=1, max_size=4)
    assert anywhere.size == 1
    assert "segments are unlikely to pay" in anywhere.reasons[-1]


@pytest.mark.usefixtures("short")
def test_what_a_single_patch_tells_calls_for_no_segments():
    """Four modes, each with a shape of its own and a map from a patch to the fourth after it."""
    generator = np.random.default_rng(1)
    turns = [0.9 * np.linalg.qr(generator.standard_normal((8, 8)))[0] for _ in range(4)]
    modes, inner = generator.integers(0, 4, 5000), generator.standard_normal((5000, 8))
    for number in range(4, 5000):
        if generator.uniform() < 0.9:
            modes[number] = modes[number - 4]
        inner[number] = 0.44 * inner[number] + turns[modes[number]] @ inner[number - 4]
    values = (inner + 3 * np.eye(8)[modes]).reshape(-1, 1)
    advice = advise(values, patch=8, step=8, max_size=4)
    assert advice.size == 1
    assert advice.gains[0] > 0.2
    assert "token-wise" in advice.reasons[-1]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("unit", [1e-9, 1e12])
def test_advice_does_not_depend_on_units_or_constant_channels(unit):
    values = planted_series.planted(2, 500, seed=2).values
    expected = advise(values, patch=8, step=16, max_size=3)
    other = np.concatenate([values * unit + unit, np.full_like(values, 0.1)], axis=1)
    found = advise(other, patch=8, step=16, max_size=3)
    assert found.gains == pytest.approx(expected.gains, abs=1e-3)
    assert found.size == expected.size == 2
    assert found.reasons[0] == "1 of 2 channels are constant and left out."


def test_a_constant_series_has_nothing_to_gain():
    advice = advise(np.full((800, 2), 1e9 + 0.1), patch=4)
    assert (advice.size, advice.gains) == (1, [0.0] * 8)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("seed", range(2))
def test_noise_walks_and_pure_cycles_call_for_no_segments(seed):
    """The shortest series that are taken, too: what chance gains is no reason."""
    wave = np.sin(2 * np.pi * np.arange(1000) / 24)[:, None]
    for values in (
        noise(1000, 2, seed=seed),
        noise(256, 1, seed=seed),
        noise(1000, 1, seed=seed).cumsum(0),
        wave + 0.3 * noise(1000, 1, seed=seed),
        wave,
    ):
        assert advise(values, patch=4, max_size=4 if len(values) > 256 else 8).size == 1


def test_ridge_regression_is_that_of_the_textbook():
    """As least squares with rows below that ask for small maps."""
    probe = module._Probe(noise(400, 1).astype(np.float32), 2, 1, 2)
    columns, ridges = probe.past[:, :6], np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    found = probe._fit(columns, probe.late[:, :6], ridges)
    below = np.diag(np.sqrt(ridges[0] * len(columns) * (probe.past**2).mean()))
    rows = np.vstack([columns, below])
    aims = np.vstack([probe.ahead, np.zeros((6, 4))])
    maps = np.linalg.lstsq(rows, aims)[0]
    expected = ((probe.late[:, :6] @ maps - probe.truth) ** 2).mean(1)
    assert found[0] == pytest.approx(expected, rel=1e-4)


def test_windows_are_of_their_part_in_the_order_of_time_and_segments_of_their_window():
    series = np.arange(400, dtype=np.float32)[:, None] * [1.0, 2.0]
    probe = module._Probe(series, 2, 7, 2)
    # Look-back of 100 steps, 4 ahead: the first 280 rows fit.
    assert probe.past.shape == (2 * len(range(0, 280 - 104 + 1, 7)), 100)
    assert probe.late.shape == (2 * len(range(182, 400 - 104 + 1, 7)), 100)
    assert probe.past[0] == pytest.approx(np.arange(100) - 49.5)
    assert probe.ahead[1] == pytest.approx(2 * (np.arange(100, 104) - 49.5))
    assert np.all(np.diff(probe.stretch) >= 0)
    segments = module._segments(probe.past, probe.spread, 6)
    assert segments.shape == (len(probe.past), 17, 6)
    assert segments[0, 0] == pytest.approx((np.arange(6) - 49.5) / np.arange(100).std())
    assert segments[0, -1, 4:] == pytest.approx(0.0)


def test_clusters_are_those_of_points_far_apart():
    places = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    points = np.repeat(places, 50, axis=0) + 0.1 * noise(200, 2)
    centres = module._cluster(points, np.random.default_rng(0))
    expected = points.reshape(4, 50, 2).mean(1)
    assert centres[np.lexsort(centres.round().T)] == pytest.approx(expected)
    alike = module._cluster(np.ones((9, 2)), np.random.default_rng(0))
    assert alike == pytest.approx(1.0)


@pytest.fixture
def file(tmp_path):
    """A file with a date, two channels with cycles, and a header."""
    values = np.sin(2 * np.pi * np.arange(2000) / 24)[:, None] + 0.3 * noise(2000, 2)
    lines = [
        f"{np.datetime64('2020-01-01T00:00') + 60 * i},{a:.17g},{b:.17g}"
        for i, (a, b) in enumerate(values)
    ]
    path = tmp_path / "series.csv"
    path.write_text("\n".join(["date,one,two", *lines]) + "\n")
    return path, values


@pytest.mark.usefixtures("short")
def test_command_prints_draws_and_refuses(file, tmp_path, capsys):
    path, values = file
    picture = tmp_path / "advice.png"
    argv = ["advise", str(path), "--patch", "4", "--max-size", "2", "--plot", str(picture)]
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    assert "2000 steps, 2 channels, patches of 4" in said
    assert "* Channels: one, two." in said
    assert "* Left out: date (time stamps)." in said
    expected = advise(values, patch=4, max_size=2)
    assert f"segment size: {expected.size}" in said
    assert picture.stat().st_size > 5000
    assert command.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gains"] == pytest.approx(expected.gains)
    assert (found["columns"], found["left_out"]) == (["one", "two"], {"date": "time stamps"})
    assert found["notes"] == []
    assert command.main(["advise", str(tmp_path / "none.csv")]) == 2
    assert command.main(["advise", str(path), "--patch", "0"]) == 2
    assert "expected patch to be at least 1" in capsys.readouterr().err
    for content in (gzip.compress(path.read_bytes())[:-9], b"a\n" + b"x" * 131_073):
        path.write_bytes(content)
        assert command.main(["advise", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_progress_and_picture_show_every_size(capsys):
    advice = advise(noise(400, 1), patch=2, max_size=3, progress=True)
    assert capsys.readouterr().err.endswith("\rsegment size 3 of 3\n")
    (axis,) = plot_advice(advice, patch=2).axes
    assert [bar.get_height() / 100 for bar in axis.patches] == pytest.approx(advice.gains)


def test_picture_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install segmoe-kernels\[plots\]"):
        plot_advice(advise(noise(400, 1), patch=2, max_size=2))
