"""The example that swaps FFNs of two models: its table, upcycling, and what does not fit."""

import numpy as np
import pytest

from examples import swap_into_transformer as script
from examples.forecaster import data

pytest.importorskip("transformers")


def write_series(folder):
    """A csv file of two generated channels."""
    path = folder / "series.csv"
    np.savetxt(
        path, data.multiscale(3000, 2), fmt="%.17g", delimiter=",", header="a,b", comments=""
    )
    return path


def swap_table(capsys, tmp_path, *options):
    """What the example prints: its lines, and the numbers of its table."""
    path = write_series(tmp_path)
    argv = ["--data", str(path), "--steps=20", "--batch-size=16", "--learning-rate=3e-3", *options]
    assert script.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "MSE before" in line) + 1 :]
    rows = [[float(cell.replace(",", "")) for cell in line[32:].split()] for line in table]
    assert len(rows) == 4
    return lines, rows


def test_swap_example_trains_both_models_with_and_without_experts(capsys, tmp_path):
    lines, rows = swap_table(capsys, tmp_path, "--segment-sizes=5,4")
    assert "  swapped encoder.layers.0 (P=5), encoder.layers.1 (P=4)" in lines
    where = "model.model.encoder.layers"
    assert f"  swapped {where}.0.ff (P=5), {where}.1.ff (P=4)" in lines
    for parameters, before, after, flops, milliseconds in rows:
        assert after < 0.95 * before
        assert min(parameters, flops, milliseconds) > 0
    for dense, experts in (rows[:2], rows[2:]):
        # Three more FFNs (width 64, hidden 128, biases) and a router in each of the two layers.
        added = 3 * (2 * 64 * 128 + 64 + 128)
        assert experts[0] - dense[0] == 2 * added + 4 * 64 * (5 + 4)
        # One expert a segment: the FFN's products, and the router's.
        assert dense[3] < experts[3] < 1.1 * dense[3]


def test_swap_example_upcycles_the_trained_models(capsys, tmp_path):
    _, rows = swap_table(capsys, tmp_path, "--upcycle", "--top-k=2")
    for dense, experts in (rows[:2], rows[2:]):
        assert experts[1] == pytest.approx(dense[2], rel=0.02)
        assert experts[2] < experts[1]


@pytest.mark.parametrize("wrong", ["--segment-sizes=5,4,3", "--top-k=9"])
def test_swap_example_says_what_does_not_fit(capsys, tmp_path, wrong):
    path = write_series(tmp_path)
    assert script.main(["--data", str(path), "--steps=1", wrong]) == 2
    read, error = capsys.readouterr().err.splitlines()
    assert read == "series.csv: Channels: a, b."
    assert error.startswith("error: segmoe_kernels.")
