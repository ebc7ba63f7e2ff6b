"""Routing statistics in files: what a CSV holds, whole rows whatever happens, and TensorBoard."""

import csv
import signal
import subprocess
import sys

import pytest
import torch
from layers import make_layer
from torch import nn

from segmoe_kernels import collect_routing_stats
from segmoe_kernels.stats_writers import CSVWriter, TensorBoardWriter, flatten_stats


def entries(count):
    """Entries of a model of two layers, and the names that they have."""
    model = nn.Sequential(make_layer(2), make_layer(3, top_k=2))
    with collect_routing_stats(model) as stats:
        for _ in range(count):
            model(torch.randn(2, 12, 4))
            stats.end_step()
    return stats.step_history


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def expected_row(entry):
    numbers = {"step": entry["step"], "epoch": entry["epoch"], **flatten_stats(entry)}
    return {name: str(value) for name, value in numbers.items()}


def test_flat_names_and_values():
    (entry,) = entries(1)
    flat = flatten_stats(entry)
    own = entry["layers"][1]
    assert flat["moe/layer_1/entropy"] == own["entropy"]
    assert flat["moe/global/num_tokens"] == entry["global"]["num_tokens"] == 2 * 2 * 3
    for key in ("hard_fraction", "soft_fraction", "token_counts", "prob_mass"):
        assert [flat[f"moe/layer_1/{key}/{e}"] for e in range(3)] == own[key].tolist()
    # A number for each expert of 3 (global), 2 and 3, and the statistics that are one number.
    assert len(flat) == 4 * (3 + 2 + 3) + 11 * 3


def test_csv_has_a_row_for_each_entry(tmp_path):
    history = entries(3)
    path = tmp_path / "stats.csv"
    with CSVWriter(path) as writer:
        for entry in history[:2]:
            writer.write(entry)
            assert read(path)[-1] == expected_row(entry)  # before it is closed
    with CSVWriter(str(path)) as writer:  # and goes on
        writer.write(history[2])
    assert read(path) == [expected_row(entry) for entry in history]
    assert path.read_bytes().count(b"step") == 1


@pytest.mark.parametrize("cut", [1, 40, None])
def test_csv_goes_on_behind_its_last_whole_row(tmp_path, cut):
    """A file cut inside its last row, or inside its header."""
    history = entries(3)
    path = tmp_path / "stats.csv"
    with CSVWriter(path) as writer:
        writer.write(history[0])
        whole = path.stat().st_size
        writer.write(history[1])
    data = path.read_bytes()
    path.write_bytes(data[: whole + cut] if cut else data[:50])
    with CSVWriter(path) as writer:
        writer.write(history[2])
    kept = [history[0], history[2]] if cut else [history[2]]
    assert read(path) == [expected_row(entry) for entry in kept]


def test_csv_of_a_killed_program_has_whole_rows(tmp_path):
    path = tmp_path / "stats.csv"
    code = f"""
import os, signal
from segmoe_kernels.stats_writers import CSVWriter
writer = CSVWriter({str(path)!r})
for step in range(100):
    writer.write({{"step": step, "epoch": 0, "global": {{"entropy": step / 7}}, "layers": {{}}}})
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [float(row["moe/global/entropy"]) for row in read(path)] == [s / 7 for s in range(6)]
    assert path.read_bytes().endswith(b"\n")


def test_csv_keeps_rows_when_an_entry_is_refused(tmp_path):
    first, second = entries(2)
    path = tmp_path / "stats.csv"
    with CSVWriter(path) as writer:
        writer.write(first)
        with pytest.raises(ValueError, match="moe/layer_1/"):
            writer.write({**second, "layers": {0: second["layers"][0]}})
        writer.write(second)
    assert len(read(path)) == 2


def test_tensorboard_reads_every_scalar_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = entries(2)
    with TensorBoardWriter(tmp_path) as writer:
        for entry in history:
            writer.write(entry)
    events = EventAccumulator(str(tmp_path)).Reload()
    names = list(flatten_stats(history[0]))
    assert sorted(events.Tags()["scalars"]) == sorted(names)
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [entry["step"] for entry in history]
        expected = [flatten_stats(entry)[name] for entry in history]
        assert [value for _, value in found] == pytest.approx(expected, rel=1e-6)


def test_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install segmoe-kernels\[tensorboard\]"):
        TensorBoardWriter(tmp_path)
