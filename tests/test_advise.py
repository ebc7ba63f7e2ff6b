"""The segment-size advisor: its estimates against plain formulas, and advice where it is known."""

import gzip
import json
import sys

import numpy as np
import pytest

from segmoe_kernels import __main__ as command
from segmoe_kernels.series.advise import (
    advise,
    autocorrelation,
    features,
    find_periods,
    plot_advice,
    size_scores,
    spectrum,
)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_autocorrelation_is_the_plain_formula():
    values = noise(300, 3).cumsum(0)
    found = autocorrelation(values, 20)
    for lag in range(21):
        each = []
        for column in (values - values.mean(0)).T:
            each.append((column[lag:] * column[: len(column) - lag]).sum() / (column**2).sum())
        assert found[lag] == pytest.approx(np.mean(each), rel=1e-9)


@pytest.mark.parametrize("constant", [7.0, 0.1, 1e9 + 0.1])
def test_constant_channels_count_in_nothing(constant):
    values = noise(800, 1).cumsum(0)
    with_constant = np.concatenate([values, np.full((800, 1), constant)], axis=1)
    plain, found = advise(values, patch=4), advise(with_constant, patch=4)
    assert found.scores == pytest.approx(plain.scores)
    assert found.reasons == ["1 of 2 channels are constant and left out.", *plain.reasons]
    alone = advise(np.full((800, 2), constant), patch=4)
    assert (alone.schedule, max(alone.scores), alone.periods) == ([1, 1, 1, 1], 0.0, [])


@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1e12])
def test_advice_does_not_depend_on_units(unit):
    values = regimes(12, 8)
    expected, found = advise(values, patch=8), advise(values * unit, patch=8)
    assert found.scores == pytest.approx(expected.scores, rel=1e-6)
    assert (found.schedule, found.reasons) == (expected.schedule, expected.reasons)
    mixed = advise(values * unit + 1e3 * unit, patch=8)
    assert mixed.scores == pytest.approx(expected.scores, rel=1e-6)


def test_scores_are_shares_where_a_cycle_cancels_in_a_segment():
    """A cycle of three patches: the mean of three has next to no variance."""
    values = np.sin(2 * np.pi * np.arange(4000) / 24)[:, None] + 0.01 * noise(4000, 1)
    advice = advise(values, patch=8)
    assert max(advice.scores) <= 1
    assert "a cycle within 4 patches (24 steps) looks like noise" in advice.reasons[-1]
    for second in np.linspace(-1, 1, 9):
        scores = size_scores(np.array([1.0, -0.5, second, *[0.3] * 6]), 8)
        assert all(0 <= score <= 1 for score in scores)


def test_spectrum_is_shared_out_and_peaks_at_the_cycle():
    values = np.sin(2 * np.pi * np.arange(4000) / 16)[:, None] + 0.1 * noise(4000, 1)
    power = spectrum(values, 256)
    assert power.sum() == pytest.approx(1.0, rel=1e-6)
    assert power.argmax() == 256 // 16


@pytest.mark.parametrize("steps", [7, 24, 100])
def test_a_cycle_is_found_without_its_multiples(steps):
    values = np.sin(2 * np.pi * np.arange(6000) / steps)[:, None] + 0.5 * noise(6000, 2)
    periods = find_periods(values, 400)
    assert [period.steps for period in periods] == [steps]
    assert periods[0].correlation > 0.6
    assert periods[0].power > 0.3


def test_two_cycles_are_found():
    time = np.arange(8000)
    values = np.sin(2 * np.pi * time / 24) + 1.5 * np.sin(2 * np.pi * time / 160)
    found = {period.steps for period in find_periods(values[:, None] + 0.2 * noise(8000, 1), 400)}
    assert any(abs(steps - 160) <= 2 for steps in found)
    assert not find_periods(noise(8000, 2), 400)
    assert not find_periods(noise(8000, 1).cumsum(0), 400)  # wanders, but has no cycle


def test_a_cycle_needs_four_standard_errors_of_noise():
    """Cycles whose autocorrelation is two and a half, and six standard errors of white noise."""
    for errors, found in ((2.5, []), (6, [24])):
        share = errors / np.sqrt(6000)
        wave = np.sqrt(2 * share / (1 - share)) * np.sin(2 * np.pi * np.arange(6000) / 24)
        for seed in range(4):
            periods = find_periods(wave[:, None] + noise(6000, 1, seed=seed), 100)
            assert [period.steps for period in periods] == found


def test_features_of_a_hand_worked_patch():
    values = np.array([[1.0], [2.0], [4.0], [5.0], [0.0], [0.0], [0.0], [0.0], [9.0]])
    mean, spread, slope, rough = features(values, 4)[0]
    assert (mean, spread) == (3.0, pytest.approx(np.std([1, 2, 4, 5])))
    assert slope == pytest.approx(-1.5 * 1 - 0.5 * 2 + 0.5 * 4 + 1.5 * 5)
    assert rough == pytest.approx((1 + 2 + 1) / 3)
    assert features(values, 4).shape == (2, 4)  # the ninth step fills no patch


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_scores_are_what_a_simulation_of_states_and_noise_gives(share):
    """States that fade by 0.8 a patch, seen with noise: the share of one that the mean tells."""
    decay, count = 0.8, 400_000
    steps, state = noise(count) * np.sqrt(1 - decay**2), np.empty(count)
    state[0] = 0.0
    for i in range(1, count):
        state[i] = decay * state[i - 1] + steps[i]
    seen = np.sqrt(share) * state + np.sqrt(1 - share) * noise(count, seed=1)
    correlation = share * decay ** np.arange(10.0)
    correlation[0] = 1.0
    scores = size_scores(correlation, 8)
    for size in (1, 2, 5, 8):
        whole = count // size * size
        mean = seen[:whole].reshape(-1, size).mean(1)
        told = [
            np.corrcoef(mean, state[:whole].reshape(-1, size)[:, i])[0, 1] ** 2 for i in range(size)
        ]
        # The formula knows the state at lag 0 by a line, which lies a little below the curve.
        assert scores[size - 1] == pytest.approx(share * np.mean(told), rel=0.12)


def regimes(patches, patch, seed=0):
    """Calm and rough stretches of so many patches each."""
    generator = np.random.default_rng(seed)
    state = np.repeat(generator.integers(0, 2, 6000 // patches), patches * patch)
    return (generator.standard_normal(len(state)) * np.where(state, 1.0, 0.4))[:, None]


def test_longer_states_call_for_longer_segments():
    found = [advise(regimes(patches, 8), patch=8) for patches in (1, 3, 12, 48)]
    highest = [int(np.argmax(advice.scores)) + 1 for advice in found]
    assert highest[1:] == sorted(highest[1:])
    assert highest[1] <= 2
    assert highest[-1] >= 5
    # States of one patch leave no trace in the next: nothing to route by.
    assert [advice.best for advice in found] == [1, 4, 4, 4]


def test_the_usual_size_is_left_where_the_series_says_so_plainly():
    """States that have gone after two patches."""
    advice = advise(regimes(2, 32), patch=32)
    assert advice.best == 2
    assert max(advice.scores) - advice.scores[3] > 0.05


def test_noise_calls_for_no_segments_and_says_so():
    advice = advise(noise(8000, 3), patch=8, num_layers=3)
    assert advice.schedule == [1, 1, 1]
    assert "next to nothing to route by" in advice.reasons[-1]
    assert advice.periods == []


def test_schedule_has_the_best_and_neighbours_as_good_longest_first():
    advice = advise(regimes(12, 8), patch=8, num_layers=6)
    top, scores = max(advice.scores), advice.scores
    close = [size for size in range(1, 9) if scores[size - 1] >= top - 0.05]
    assert advice.best == min(close, key=lambda size: abs(size - 4))
    assert len(advice.schedule) == 6
    assert advice.schedule == sorted(advice.schedule, reverse=True)
    near = {
        size
        for size in (advice.best - 1, advice.best, advice.best + 1)
        if scores[size - 1] >= 0.99 * scores[advice.best - 1]
    }
    assert set(advice.schedule) == near


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


def test_command_prints_draws_and_refuses(file, tmp_path, capsys):
    path, values = file
    picture = tmp_path / "advice.png"
    argv = ["advise", str(path), "--patch", "4", "--layers", "3", "--plot", str(picture)]
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    assert "2000 steps, 2 channels, patches of 4" in said
    assert "* Channels: one, two." in said
    assert "* Left out: date (time stamps)." in said
    assert "Cycles of 24 steps" in said
    expected = advise(values, patch=4, num_layers=3)
    assert f"segment sizes: {','.join(map(str, expected.schedule))}" in said
    assert picture.stat().st_size > 5000
    assert command.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == pytest.approx(expected.scores)
    assert (found["columns"], found["left_out"]) == (["one", "two"], {"date": "time stamps"})
    assert found["notes"] == []
    assert command.main(["advise", str(tmp_path / "none.csv")]) == 2
    assert command.main(["advise", str(path), "--patch", "0"]) == 2
    assert "expected patch to be at least 1" in capsys.readouterr().err
    for content in (gzip.compress(path.read_bytes())[:-9], b"a\n" + b"x" * 131_073):
        path.write_bytes(content)
        assert command.main(["advise", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_picture_shows_the_scores_and_the_cycles(file):
    _, values = file
    advice = advise(values, patch=4)
    left, middle, right = plot_advice(values, advice, patch=4).axes
    assert [bar.get_height() for bar in right.patches] == pytest.approx(advice.scores)
    for axis in (left, middle):
        marks = [line.get_xdata()[0] for line in axis.lines[1:]]
        assert marks == [period.steps for period in advice.periods]


def test_picture_says_what_to_install(file, monkeypatch):
    _, values = file
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install segmoe-kernels\[plots\]"):
        plot_advice(values, advise(values))
