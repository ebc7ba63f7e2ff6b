"""The cost of whole models: FLOPs, parameters and bytes kept, held to what they are by hand."""

import pytest
import torch

from examples.forecaster import report
from examples.studies import cost

cost_rows = report.read_csv


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    argv = ["--configs=tiny", "--windows=1", "--channels=2", "--repeats=1", "--threads=1"]
    assert cost.main([*argv, f"--results={folder}"]) == 0
    assert (folder / "cost.png").stat().st_size > 5000
    found = cost_rows(folder / "cost.csv")
    return {row["kind"]: row for row in found}


def test_parameters_are_those_of_the_configuration(rows):
    # Width 64, hidden 128: an FFN is 2 * 64 * 128, a shared one P * P times that.
    ffn, layers = 2 * 64 * 128, 4
    segment = sum(p * p * ffn + p * 64 for p in (3, 5, 5, 5))
    experts = layers * 4 * ffn + sum(4 * 64 * p for p in (3, 5, 5, 5))
    token = layers * (5 * ffn + 4 * 64 + 64)
    dense = layers * 2 * ffn
    base = rows["dense"]["parameters"] - dense
    assert rows["token-wise"]["parameters"] == base + token
    assert rows["segment-wise"]["parameters"] == base + segment + experts
    assert rows["official loop"]["parameters"] == rows["segment-wise"]["parameters"]


def test_bytes_kept_are_counted_once_and_without_parameters():
    weight = torch.nn.Linear(4, 8, bias=False)
    x = torch.randn(10, 4, requires_grad=True)
    # x and the result before the activation; the weight is not counted.
    size, _ = cost.kept([weight], lambda: torch.relu(weight(x)) + torch.sigmoid(x).sum())
    assert size == 4 * (10 * 4 + 10 * 8 + 10 * 4)


def test_the_layer_keeps_what_the_official_loop_keeps(rows):
    ours, loop = (rows[kind]["ffn_mib"] for kind in ("segment-wise", "official loop"))
    assert ours == pytest.approx(loop, rel=0.01)
    for row in rows.values():
        assert row["ffn_mib"] < row["model_mib"]
        assert row["ffn_bytes_per_patch_and_layer"] > 4 * 64  # at least its input
        assert min(row["train_ms"], row["infer_ms"]) > 0
