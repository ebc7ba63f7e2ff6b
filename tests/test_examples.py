"""The examples: data and splits, downloads, the closed-form rows, training, resuming."""

import dataclasses
import functools
import gzip
import hashlib
import html
import io
import json
import math
import os
import runpy
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import forget_settings

from examples import train_forecaster as script
from examples.forecaster import data, model, sources, training

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

TINY = [
    *("--data", "multiscale", "--look-back", "64", "--horizon", "8", "--d-model", "8"),
    *("--d-ff", "8", "--num-layers", "2", "--segment-sizes", "3,2", "--epochs", "2"),
    *("--train-fraction", "0.03", "--batch-size", "16", "--threads", "1", "--quiet"),
]


@pytest.fixture
def no_files(monkeypatch, tmp_path):
    """An empty cache, no data folder, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SEGMOE_DATA", raising=False)

    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return tmp_path


def csv_text(values):
    header = ",".join(["date", *(f"c{i}" for i in range(values.shape[1]))])
    lines = [f"2020-01-01,{','.join(f'{value:.17g}' for value in row)}" for row in values]
    return "\n".join([header, *lines, ""])


def serve(monkeypatch, content, length=None):
    """Make every download return ``content``, said to have that length."""

    class Response(io.BytesIO):
        headers = {"Content-Length": length}  # noqa: RUF012

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_args, **_kwargs: Response(content))


# (name, rows, horizon) -> test windows of forecast_baselines.json
@pytest.mark.parametrize(
    ("name", "rows", "horizon", "train", "test"),
    [
        ("ETTh1", 17420, 96, 8033, 2785),
        ("ETTh2", 17420, 720, 7409, 2161),
        ("ETTm1", 69680, 96, 33953, 11425),
        ("Weather", 52696, 96, 36280, 10444),
        ("exchange_rate", 7588, 96, 4704, 1422),
    ],
)
def test_windows_count_as_published(name, rows, horizon, train, test):
    series = data.make_series(name, np.arange(rows, dtype=np.float64)[:, None])
    windows = {split: data.Windows(series, split, 512, horizon) for split in ("train", "test")}
    assert (len(windows["train"]), len(windows["test"])) == (train, test)


def test_windows_of_test_reach_back_into_validation():
    series = data.make_series("ETTh1", np.arange(17420.0)[:, None])
    windows = data.Windows(series, "test", 512, 96, torch.float64)
    past, truth = windows.batch(slice(0, 1))
    raw = past * series.std[0] + series.mean[0]
    assert raw[0, 0, 0] == pytest.approx(11520 - 512)
    assert (truth * series.std[0] + series.mean[0])[0, 0, 0] == pytest.approx(11520)
    past, truth = windows.batch(torch.tensor([len(windows) - 1]))
    assert (truth * series.std[0] + series.mean[0])[0, 0, -1] == pytest.approx(14399)


def test_windows_refuses_a_split_that_is_too_short():
    series = data.make_series("short", np.zeros((100, 1)))
    with pytest.raises(ValueError, match="val split of short must have at least"):
        data.Windows(series, "val", 64, 20)


def test_scaler_uses_train_rows_only():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(1000, 2))
    changed = values.copy()
    changed[700:] += 50.0
    series, other = data.make_series("some", values), data.make_series("some", changed)
    assert np.array_equal(series.mean, other.mean)
    assert np.array_equal(series.std, other.std)
    np.testing.assert_allclose(series.values[:700].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(series.values[:700].std(0), 1, atol=1e-12)


def test_multiscale_has_the_periods_it_names():
    values = data.multiscale(3840, 2, seed=3)
    assert np.array_equal(values, data.multiscale(3840, 2, seed=3))
    assert not np.array_equal(values, data.multiscale(3840, 2, seed=4))
    # In a square regime the daily cycle has two heights only, so its steps are few and large.
    regimes = data.multiscale_regimes(3840, seed=3)
    step = np.abs(np.diff(values[:, 0]))
    small = [np.mean(step[regimes[1:] == form] < 1.0) for form in range(3)]
    assert set(regimes) == {0, 1, 2}
    assert small[0] > 0.99 > small[1]
    power = np.abs(np.fft.rfft(values[:, 0])) ** 2
    median = np.median(power)
    for period in data.MULTISCALE_PERIODS:
        assert power[3840 // period] > 100 * median


def test_linear_recovers_a_linear_rule():
    time = np.arange(1000.0)
    values = np.sin(2 * np.pi * time / 25) + 0.5 * np.sin(2 * np.pi * time / 7)
    series = data.make_series("rule", values[:, None])
    windows = {
        split: data.Windows(series, split, 8, 4, torch.float64) for split in ("train", "val")
    }
    weight = data.fit_linear(windows["train"])
    assert data.score_linear(weight, windows["val"]).mse < 1e-10
    assert data.score_repeat(windows["val"]).mse > 0.1


def test_the_folder_with_real_data_is_kept_when_settings_are_forgotten():
    environ = {"SEGMOE_DATA": "/somewhere", "SEGMOE_ARCH": "sm_90", "HOME": "/"}
    for _ in range(2):  # in the workers of pytest-xdist again
        forget_settings(environ)
        assert environ == {"REAL_DATA": "/somewhere", "HOME": "/"}


def test_repeat_and_linear_rows_reproduce_the_known_scores_on_etth1(real_data):
    series = data.load_series("ETTh1", real_data)
    rows = script.baseline_rows(series, model.ForecasterConfig())
    found = [(f"{row['test_mse']:.4f}", f"{row['test_mae']:.4f}") for row in rows]
    assert found[1] == ("0.3672", "0.3915")
    assert [f"{rows[0][key]:.3f}" for key in ("test_mse", "test_mae")] == ["1.294", "0.713"]


def test_digest_of_etth1_is_the_real_one(real_data):
    path = sources.find_local("ETTh1", real_data)
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    assert hashlib.sha256(content).hexdigest() in sources.DATASETS["ETTh1"].sha256


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [("ECL", "electricity_first55rows.csv.gz", 55), ("Traffic", "traffic_first25rows.csv.gz", 25)],
)
def test_the_heads_of_ecl_and_traffic_are_read_and_known_to_be_no_whole_files(
    no_files, monkeypatch, name, file, rows, real_data
):
    dataset = sources.DATASETS[name]
    (no_files / f"{dataset.stem}.csv.gz").write_bytes((real_data / file).read_bytes())
    channels = dataset.shape[1]
    rule = f"{name} must have {dataset.shape[0]} rows of {channels} channels, got {rows} rows of"
    with pytest.raises(ValueError, match=rule):
        data.load_series(name, no_files)
    # As if the published file ended there: from the file to a step of training.
    whole = dataclasses.replace(dataset, shape=(rows, channels))
    monkeypatch.setitem(sources.DATASETS, name, whole)
    series = data.load_series(name, no_files)
    assert series.values.shape == (rows, channels)
    assert series.splits.train == (0, int(0.7 * rows))
    config = model.ForecasterConfig(
        look_back=8, horizon=2, patch=2, d_model=8, d_ff=8, num_layers=1, segment_sizes=(3,)
    )
    options = training.TrainOptions(epochs=1, batch_size=2, train_fraction=0.5)
    _, record = training.train_one(series, config, options, no_files, quiet=True)
    assert math.isfinite(record["test_mse"])
    assert record["test"]["values"] == record["test"]["windows"] * channels * 2


def test_a_file_of_another_shape_is_no_benchmark(no_files):
    (no_files / "ETTh1.csv").write_text(csv_text(np.ones((15000, 6))))
    with pytest.raises(ValueError, match="17420 rows of 7 channels, got 15000 rows of 6"):
        data.load_series("ETTh1", no_files)


def test_the_forecaster_says_what_it_read_and_what_is_constant(tmp_path, capsys):
    path = tmp_path / "some.csv"
    wave = np.sin(np.arange(1000))
    # Constant in the train rows, but for rounding errors of their mean.
    tides = ["low", "high"] * 500
    rows = [f"{i}:00,{tides[i]},{wave[i]},{14.62 + (i > 850) / 2}" for i in range(1000)]
    path.write_text("\n".join(["hour,tide,a,b", *rows]))
    series = data.load_series(str(path))
    said = capsys.readouterr().err
    assert "some.csv: Channels: a, b." in said
    assert "some.csv: Left out: hour (text), tide (text)." in said
    assert "some.csv: constant in the train rows, so not divided by a deviation: channel 2" in said
    assert series.std[1] == 1.0
    assert series.values[900] == pytest.approx([(wave[900] - series.mean[0]) / series.std[0], 0.5])


def test_data_dir_comes_before_environment_and_cache(no_files, monkeypatch):
    folders = {}
    for place in ("given", "environment", "cache/segmoe_kernels"):
        folders[place] = no_files / place
        folders[place].mkdir(parents=True)
        (folders[place] / "ETTh2.csv").write_text("a\n1\n")
    found = [sources.find_local("ETTh2", folders["given"]).parent]
    monkeypatch.setenv("SEGMOE_DATA", str(folders["environment"]))
    found.append(sources.find_local("ETTh2").parent)
    monkeypatch.delenv("SEGMOE_DATA")
    found.append(sources.find_local("ETTh2").parent)
    assert found == list(folders.values())


def test_download_verifies_then_names_the_file(no_files, monkeypatch):
    content = csv_text(np.ones((4, 2))).encode()
    digest = hashlib.sha256(content).hexdigest()
    dataset = sources.Dataset("some", (4, 2), (digest,), "https://example.org/some.csv.gz")
    serve(monkeypatch, gzip.compress(content))
    path = sources.download(dataset, no_files / "cache")
    assert path == no_files / "cache" / "some.csv"
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["some.csv"]


@pytest.mark.parametrize(
    ("content", "length", "words"),
    [
        (b"not the data", "12", "sha256 f18de3ad.*nothing was kept"),
        (gzip.compress(b"a" * 99)[:-9], "20", "the answer is a damaged gzip file"),
        (b"a" * 1001, "1001", "more than 1000 bytes; nothing was kept"),
        (b"a" * 1001, None, "more than 1000 bytes"),
        (gzip.compress(b"a" * 1001), None, "more than 1000 bytes"),
        (b"a", "abc", "the answer is of the Content-Length 'abc', which is no number"),
    ],
    ids=["other", "cut", "large", "large, no length", "large unzipped", "no number"],
)
def test_download_refuses_other_content_and_leaves_no_file(
    no_files, monkeypatch, content, length, words
):
    serve(monkeypatch, content, length)
    monkeypatch.setattr(sources, "_MAX_BYTES", 1000)
    with pytest.raises(sources.DataUnavailableError, match=words):
        sources.find_or_download("ETTh1")
    assert [path for path in no_files.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["ETTm2", "Weather"])
def test_message_without_network_names_the_three_ways(no_files, name):
    with pytest.raises(sources.DataUnavailableError) as caught:
        sources.find_or_download(name, no_files)
    for part in ("--data-dir", "SEGMOE_DATA", str(sources.cache_dir()), "multiscale"):
        assert part in str(caught.value)
    # No promise of a download where there is no address.
    assert ("with a network connection" in str(caught.value)) == (name != "Weather")
    assert ("Google Drive" in str(caught.value)) == (name == "Weather")


def test_unknown_data_is_an_error_of_the_command_line(capsys):
    assert script.main(["--data", "no_such_set"]) == 2
    assert "--data must be one of ETTh1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dense", "token", "segment"])
def test_training_runs_and_writes_its_results(tmp_path, kind):
    assert script.main([*TINY, "--ffn", kind, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    (run,) = result["runs"]
    assert len(run["history"]) == 2
    assert run["history"][1]["train_loss"] < run["history"][0]["train_loss"]
    assert run["validation"]["mse"] == min(epoch["val_mse"] for epoch in run["history"])
    assert run["test"]["values"] == run["test"]["windows"] * 3 * 8
    pictures = {path.name for path in tmp_path.glob("*.png")}
    routed = {"expert_load.png", "timeline.png"} if kind != "dense" else set()
    assert pictures == {"forecast.png"} | routed


def test_demo_shows_both_series_and_says_what_was_seen(no_files, monkeypatch, capsys):
    out = no_files / "out"
    monkeypatch.setattr(data, "planted", functools.partial(data.planted, num_blocks=150))
    assert script.main([*TINY[2:], "--demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Trains six small forecasters")
    assert "goes on with the built-in series 'multiscale'" in printed
    page = (out / "index.html").read_text(encoding="utf-8")
    for name in ("planted-4", "multiscale"):
        rows = json.loads((out / name / "result.json").read_text())["rows"]
        names = [row["model"] for row in rows]
        assert names == ["repeat last value", "linear, closed form", "dense", "token", "segment"]
        said = script.closing(name, rows)
        assert said in printed
        assert said in html.unescape(page).replace("\xa0", " ")
        assert all(shown in printed for shown in names)
    assert page.count("data:image/png;base64") == 2 * 3


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((0.9, 0.7, 0.6, 0.4), "33 % below that of token-wise ones and 43 % below that of a dense"),
        ((0.9, 0.7, 0.6, 0.4), "Here it pays to route segments"),
        ((0.3, 0.4, 0.5, 0.41), "A linear map is below all three"),
        ((0.9, 0.4, 0.5, 0.41), "Differences of a few per cent"),
        ((0.9, 0.4, 0.5, 0.41), "18 % below that of token-wise ones and 2 % above that of a dense"),
        ((0.9, 0.4101, 0.5, 0.41), "within 0.5 % of that of a dense FFN"),
    ],
)
def test_the_closing_sentence_follows_from_the_table(errors, words):
    names = ("linear, closed form", "dense", "token", "segment")
    rows = [{"model": m, "test_mse": e} for m, e in zip(names, errors, strict=True)]
    assert words in script.closing("x", rows)


def make_trainer(checkpoint, *, seed=0):
    args = script.build_parser().parse_args([*TINY, "--epochs", "3", "--seed", str(seed)])
    config, options = script.settings_from(args)
    series = data.make_series("multiscale", data.multiscale(1500, 2))
    windows = training.make_windows(series, config, torch.float32)
    torch.manual_seed(options.seed)
    forecaster = model.Forecaster(config)
    return training.Trainer(forecaster, windows["train"], windows["val"], options, checkpoint)


def test_restore_refuses_the_checkpoint_of_another_run(tmp_path):
    make_trainer(tmp_path / "a.pt").save(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must come from a run with"):
        make_trainer(None, seed=1).restore(tmp_path / "a.pt")


@pytest.mark.parametrize("foreign", ["cut", "text", "tensor", "weights"])
def test_resume_from_what_is_no_checkpoint_says_so_in_one_line(tmp_path, capsys, foreign):
    path = tmp_path / "checkpoint.pt"
    make_trainer(path).save(path)
    if foreign == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif foreign == "text":
        path.write_text("epoch 1: good\n")
    else:
        torch.save(torch.ones(3) if foreign == "tensor" else {"weight": torch.ones(3)}, path)
    assert script.main([*TINY, "--no-plots", "--out", str(tmp_path), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: checkpoint {path} must be a whole one of this program")
    assert said.count("\n") == 1


def test_training_that_diverges_says_so():
    trainer = make_trainer(None)
    trainer._epoch = lambda _epoch, _progress: {"val_mse": math.nan, "train_s": 1.0}
    with pytest.raises(training.DivergedError, match="training diverged: validation MSE was nan"):
        trainer.fit(progress=False)


def test_training_stops_when_validation_does_not_improve():
    trainer = make_trainer(None)
    values = iter([3.0, 1.0, 2.0])
    trainer._epoch = lambda _epoch, _progress: {"val_mse": next(values), "train_s": 1.0}
    trainer.options = training.dataclasses.replace(trainer.options, patience=1, epochs=9)
    trainer.fit(progress=False)
    assert (len(trainer.history), trainer.best_epoch, trainer.best_val_mse) == (3, 1, 1.0)


def test_quickstart_runs(capsys):
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    assert "(8, 64, 64) -> (8, 64, 64)" in capsys.readouterr().out


def test_resume_of_a_finished_run_scores_it_again(tmp_path, capsys):
    results = []
    for more in ([], ["--resume"]):
        assert script.main([*TINY, "--no-plots", "--out", str(tmp_path), *more]) == 0
        (run,) = json.loads((tmp_path / "result.json").read_text())["runs"]
        results.append((run["history"], run["test"]))
    assert results[0] == results[1]
    assert "going on after epoch 2" in capsys.readouterr().out
