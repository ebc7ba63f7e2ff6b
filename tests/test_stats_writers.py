"""Routing statistics in files: what a CSV holds, whole rows whatever happens, and TensorBoard."""

import csv
import os
import resource
import signal
import sys

import pytest
import torch
from layers import make_layer
from programs import run_python
from torch import nn

from segmoe_kernels import collect_routing_stats
from segmoe_kernels.stats.writers import CSVWriter, TensorBoardWriter, flatten_stats


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
    with CSVWriter(path) as writer, pytest.warns(RuntimeWarning, match="was taken away"):
        writer.write(history[2])
    kept = [history[0], history[2]] if cut else [history[2]]
    assert read(path) == [expected_row(entry) for entry in kept]


@pytest.mark.parametrize(
    "content", [b'{"results": [1, 2, 3]}', b"a,b\n1,2", b"step,epoch\n0,0\n", b"\n"]
)
def test_csv_touches_no_other_file(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected path to be a new file, or one that begins"):
        CSVWriter(path)
    assert path.read_bytes() == content


def test_csv_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "stats.csv"
    content = b"step,epoch,moe/global/other\n0,0,1.5"
    path.write_bytes(content)
    with CSVWriter(path) as writer, pytest.raises(ValueError, match="moe/global/other"):
        writer.write(entries(1)[0])
    assert path.read_bytes() == content


def test_csv_takes_back_what_was_written_in_part(tmp_path):
    """The disk is full 60 bytes behind the first row."""
    first, second, third = entries(3)
    path = tmp_path / "stats.csv"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CSVWriter(path) as writer:
        writer.write(first)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 60, limits[1]))
            with pytest.raises(OSError, match=r"only 60 of \d+ bytes .* the row was taken back"):
                writer.write(second)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert read(path) == [expected_row(first)]
        writer.write(third)
    assert read(path) == [expected_row(first), expected_row(third)]


@pytest.mark.parametrize("replaced", [False, True])
def test_csv_writes_no_rows_into_a_file_that_is_gone(tmp_path, monkeypatch, replaced):
    first, second = entries(2)
    monkeypatch.chdir(tmp_path)
    with CSVWriter("stats.csv") as writer:
        monkeypatch.chdir("/")
        writer.write(first)
        path = tmp_path / "stats.csv"
        path.rename(tmp_path / "moved.csv")
        if replaced:
            path.write_bytes((tmp_path / "moved.csv").read_bytes())
        with pytest.raises(OSError, match=r"CSVWriter\.write: .*stats.csv was removed or replaced"):
            writer.write(second)
        assert read(tmp_path / "moved.csv") == [expected_row(first)]
        assert not replaced or read(path) == [expected_row(first)]
        (tmp_path / "moved.csv").replace(path)  # put back
        writer.write(second)
    assert read(path) == [expected_row(first), expected_row(second)]


def test_writers_of_many_processes_share_a_file(tmp_path):
    path = tmp_path / "stats.csv"
    children = []
    for name in range(4):
        child = os.fork()
        if not child:
            try:
                with CSVWriter(path) as writer:
                    for step in range(100):
                        groups = {"global": {"entropy": 1.0 + step}, "layers": {}}
                        writer.write({"step": step, "epoch": name, **groups})
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    rows = sorted((int(row["epoch"]), int(row["step"])) for row in read(path))
    assert rows == [(name, step) for name in range(4) for step in range(100)]


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


def test_csv_of_a_killed_program_has_whole_rows(tmp_path):
    path = tmp_path / "stats.csv"
    code = f"""
import os, signal
from segmoe_kernels.stats.writers import CSVWriter
writer = CSVWriter({str(path)!r})
for step in range(100):
    writer.write({{"step": step, "epoch": 0, "global": {{"entropy": step / 7}}, "layers": {{}}}})
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    run_python("-c", code, status=-signal.SIGKILL)
    assert [float(row["moe/global/entropy"]) for row in read(path)] == [s / 7 for s in range(6)]
    assert path.read_bytes().endswith(b"\n")


def test_writers_share_a_file(tmp_path):
    """One header, whoever writes first, and whole rows, though another writer was stopped."""
    history = entries(4)
    path = tmp_path / "stats.csv"
    with CSVWriter(path) as one, CSVWriter(path) as other:
        for writer, entry in zip((one, other, one), history, strict=False):
            writer.write(entry)
        with path.open("ab") as stream:
            stream.write(b"7,0,0.12")
        with pytest.warns(RuntimeWarning, match="was taken away"):
            other.write(history[3])
    assert read(path) == [expected_row(entry) for entry in history]


def test_csv_keeps_rows_when_an_entry_is_refused(tmp_path):
    first, second = entries(2)
    path = tmp_path / "stats.csv"
    with CSVWriter(path) as writer:
        writer.write(first)
        with pytest.raises(ValueError, match="moe/layer_1/"):
            writer.write({**second, "layers": {0: second["layers"][0]}})
        writer.write(second)
    assert len(read(path)) == 2
