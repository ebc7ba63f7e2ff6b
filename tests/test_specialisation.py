"""What experts take: information measured on made-up choices, and a run from end to end."""

import math

import numpy as np
import pytest

from examples.forecaster import data, model, training
from examples.studies import specialisation as special


def test_information_of_hand_made_choices():
    hour = np.arange(4000) % 8
    assert special.information(hour % 4, hour) == pytest.approx(math.log(4) / math.log(8))
    assert special.information(hour, hour) == pytest.approx(1.0)
    assert special.information(np.zeros(4000, dtype=int), hour) == 0.0
    assert special.information(hour, np.zeros(4000, dtype=int)) == 0.0
    chance = np.random.default_rng(0).integers(0, 4, 4000)
    assert special.information(chance, hour) < 0.01


class ByHour:
    """Stands for a model: its expert is the quarter of a day in which a segment's middle lies."""

    config = model.ForecasterConfig(look_back=96, patch=8, num_layers=1, segment_sizes=(1,))

    def routing(self, past):
        """The last channel holds the row number."""
        rows = past[:, -1:].expand_as(past).unflatten(-1, (-1, 8))[..., 4].reshape(-1, 1)
        ids = (rows.round().long() % 24 // 6).int()
        return [type("Routing", (), {"topk_ids": ids})()]


def test_segments_are_described_by_the_rows_they_come_from():
    values = data.multiscale(2400, 2)
    values[:, -1] = np.arange(2400)
    splits = data.make_splits("x", 2400)
    series = data.Series("x", values, splits, np.zeros(2), np.ones(2))
    regimes = np.arange(2400) % 24 // 12
    found = special.describe(ByHour(), series, 0, day=24, stride=37, regimes=regimes)
    hour = found.quantities["hour"]
    # Hours in eighths decide the quarter that the stand-in routes by.
    assert special.information(found.expert, hour) == pytest.approx(
        math.log(4) / math.log(8), abs=0.02
    )
    assert (hour // 2 == found.expert).all()
    assert (hour // 4 == found.quantities["regime"]).all()
    assert set(found.quantities["channel"]) == {0, 1}
    # 8 steps a segment, 6 steps an expert: every neighbour has another one, or none does.
    row = special.summarise(found, 0, 1, 4)
    assert row["told"]["hour"] > 10 * row["shuffled"]["hour"]
    assert row["told"]["regime"] == pytest.approx(1)
    shares = np.array(row["shares"]["hour"])  # (expert, eighth of a day)
    assert np.array_equal(shares, np.repeat(np.eye(4), 2, axis=1))
    assert sum(row["load"]) == pytest.approx(1)


def test_a_run_writes_its_numbers_and_plots(tmp_path, monkeypatch, capsys):
    def tiny(_data, _scale, seed, device):
        config = model.ForecasterConfig(
            look_back=64, horizon=8, d_model=8, d_ff=8, num_layers=2, segment_sizes=(3, 2)
        )
        options = training.TrainOptions(epochs=2, train_fraction=0.03, seed=seed, device=device)
        return config, options

    monkeypatch.setattr(special, "base", tiny)
    argv = ["--data=multiscale", "--quiet", "--threads=1", f"--results={tmp_path}"]
    assert special.main(argv) == 0
    said = capsys.readouterr().out
    assert "layer 1, P=2" in said
    layers, shares, steps = (
        special.read_csv(tmp_path / f"{name}.csv") for name in ("layers", "shares", "training")
    )
    assert [row["segment_size"] for row in layers] == [3, 2]
    quantities = {*special.TITLES, "channel"}
    for layer, row in enumerate(layers):
        assert sum(row[f"load_{expert}"] for expert in range(4)) == pytest.approx(1)
        assert {key[5:] for key in row if key.startswith("told_")} == quantities
        for name in quantities:
            taken = [r for r in shares if (r["layer"], r["quantity"]) == (layer, name)]
            assert [r["expert"] for r in taken] == [0, 1, 2, 3]
            table = [
                [v for k, v in r.items() if k.startswith("bin_") and v is not None] for r in taken
            ]
            # An eighth of a day in which no segment has its middle has no shares.
            assert np.array(table).sum(0) == pytest.approx(np.any(table, axis=0).astype(float))
    assert [row["entry"] for row in steps] == [*range(len(steps))]
    assert len(steps) >= 8
    for row in steps:
        assert sum(row[f"load_1_{expert}"] for expert in range(4)) == pytest.approx(1)
    # Rows of other data stay, those of the same are replaced.
    others = [{**layers[0], "data": "other"}]
    special.write_csv(tmp_path / "layers.csv", [*others, *layers])
    special.replace_rows(tmp_path / "layers.csv", [{**layers[0], "segment_size": 7}])
    held = special.read_csv(tmp_path / "layers.csv")
    assert [(row["data"], row["segment_size"]) for row in held] == [("multiscale", 7), ("other", 3)]
    for name in ("shares", "load"):
        assert (tmp_path / f"multiscale_s0_{name}.png").stat().st_size > 5000
