"""The studies: roll-out and scores by horizon, FLOPs of every variant, resuming, the report."""

import csv
import dataclasses
import re
import statistics

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.forecaster import data, model, training
from examples.forecaster import stress_series as stress
from examples.studies import __main__ as study
from examples.studies import advice, baseline_report, closed_form, paired, report
from examples.studies import runs as studies


class Next(nn.Module):
    """Forecasts 3 steps: twice the last value, then the mean of the past, then its first value."""

    def forward(self, past):
        """(W, C, L) to (W, C, 3)."""
        return torch.stack([2 * past[..., -1], past.mean(-1), past[..., 0]], dim=-1)


def test_roll_out_feeds_forecasts_back():
    past = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    # First call: 8, 2.5, 1. The window is then 4, 8, 2.5, 1: second call 2, 3.875, 4.
    found = training.roll_out(Next(), past, 5)
    assert found.tolist() == [[[8.0, 2.5, 1.0, 2.0, 3.875]]]


@pytest.mark.parametrize("stride", [1, 3])
def test_scores_by_horizon_are_those_of_each_horizon_alone(stride):
    series = data.make_series("x", data.multiscale(400, 2))
    splits = {h: data.Windows(series, "test", 16, h, stride=stride) for h in (2, 3, 8, 20)}
    assert len(splits[2]) > len(splits[20])
    found = training.evaluate_horizons(Next(), splits, "cpu", batch_size=7)
    for horizon, windows in splits.items():
        past, truth = windows.batch(slice(None))
        forecast = training.roll_out(Next(), past, horizon)
        assert found[horizon].count == truth.numel()
        error = (forecast - truth).double()
        assert found[horizon].mse == pytest.approx(error.square().mean().item(), rel=1e-6)
        assert found[horizon].mae == pytest.approx(error.abs().mean().item(), rel=1e-6)


def test_stride_takes_every_third_window():
    series = data.make_series("x", data.multiscale(400, 2))
    every, third = (data.Windows(series, "val", 16, 4, stride=stride) for stride in (1, 3))
    assert len(third) == -(-len(every) // 3)
    for part in (0, 1):
        assert torch.equal(third.batch(slice(None))[part], every.batch(slice(None, None, 3))[part])


VARIANTS = {**studies.ABLATIONS, **studies.STRESSED}


@pytest.mark.parametrize("variant", VARIANTS)
def test_active_flops_of_every_variant_are_what_pytorch_counts(variant):
    # 64 patches: no segment size but 1, 2, 4 and 8 divides them.
    config = studies.change(model.ForecasterConfig(horizon=32), VARIANTS[variant])
    forecaster = model.Forecaster(config).eval()
    past = torch.randn(1, 1, config.look_back)
    forecaster(past)  # loads the operators, which the counter has to find
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forecaster(past)
    # Rotary positions are turned by a product of their own, which other ways do not have.
    turning = config.num_layers * 2 * (2 * config.d_model) * config.d_model
    counted = counter.get_total_flops() / config.num_patches - turning
    # The reference's experts run on the whole of the last segment, which the formula doesn't count.
    routed = config.expert_scope == "token" and config.ffn != "dense"
    sizes = [config.layer_segment(i) for i in range(config.num_layers)] if routed else []
    missing = sum(-config.num_patches % size for size in sizes)
    missing *= 4 * config.d_model * config.d_ff * config.top_k / config.num_patches
    assert model.active_flops_per_token(config) == pytest.approx(counted - missing, rel=1e-12)


def test_a_schedule_is_spread_over_the_layers():
    def sizes(layers, changes):
        config = model.ForecasterConfig(num_layers=layers, segment_sizes=(1,) * layers)
        return studies.change(config, {"segment_sizes": changes}).segment_sizes

    assert sizes(4, (2, 4, 6, 8)) == (2, 4, 6, 8)
    assert sizes(2, (2, 4, 6, 8)) == (2, 8)
    assert sizes(1, (2, 4, 6, 8)) == (2,)
    assert sizes(3, 7) == (7, 7, 7)


def test_every_run_has_its_own_name_and_the_seeds_go_first():
    for name, runs in studies.STUDIES.items():
        for scale in ("small", "full"):
            found = list(runs(scale, "cpu"))
            assert len({run.name for run in found}) == len(found), name
            assert [run.options.seed for run in found] == sorted(run.options.seed for run in found)


def test_baselines_differ_in_the_kind_alone_and_need_the_same_flops():
    runs = [run for run in studies.baselines("small", "cpu") if run.name.startswith("ETTh1")]
    assert {run.variant for run in runs} == {"dense", "token", "segment"}
    same = {dataclasses.replace(run.config, ffn="dense") for run in runs}
    assert len(same) == 1
    flops = [model.active_flops_per_token(run.config) for run in runs]
    assert max(flops) < 1.1 * min(flops)


@pytest.fixture
def small_study(monkeypatch, tmp_path):
    """A study of two tiny runs on a generated series, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def runs(_scale, device):
        config = model.ForecasterConfig(
            look_back=32, horizon=4, d_model=8, d_ff=8, num_layers=1, segment_sizes=(3,)
        )
        options = training.TrainOptions(
            epochs=3, train_fraction=0.02, test_stride=50, device=device
        )
        for kind in ("dense", "segment"):
            changed = dataclasses.replace(config, ffn=kind)
            yield studies.Run("multiscale", kind, changed, options, horizons=(4, 9))

    monkeypatch.setitem(study.STUDIES, "baselines", runs)
    return ["baselines", "--quiet", "--threads=1", f"--results={tmp_path}"]


def read(folder):
    return {(run["data"], run["variant"], run["seed"]): run for run in report.read_runs(folder)}


def scores(run):
    """What a run found, but for times."""
    names = ("best_epoch", "parameters", "val", "4", "9")
    return {key: value for key, value in run.items() if key.removesuffix("_s").endswith(names)}


def test_an_interrupted_study_goes_on_and_ends_as_one_that_was_not(
    small_study, monkeypatch, tmp_path, capsys
):
    assert study.main(small_study) == 0
    expected = read(tmp_path / "baselines")
    assert len(expected) == 2
    (tmp_path / "baselines" / "runs.csv").unlink()

    # Stopped in the second run, after its second epoch was saved.
    save, saved = training.Trainer.save, []

    def stop(trainer, path):
        save(trainer, path)
        saved.append(path)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "save", stop)
    assert study.main(small_study) == 130
    assert [*read(tmp_path / "baselines")] == [("multiscale", "dense", 0)]
    assert study.main(small_study) == 0
    found = read(tmp_path / "baselines")
    assert len(saved) == 3 + 3  # nothing was trained twice
    for key, run in expected.items():
        assert len(scores(run)) == 3 * 3 + 2
        assert scores(found[key]) == scores(run)
    assert "going on after epoch 2" in capsys.readouterr().out


def test_a_row_holds_all_settings_as_they_were(small_study, tmp_path):
    assert study.main(small_study) == 0
    held = read(tmp_path / "baselines")
    for run in study.STUDIES["baselines"]("small", "cpu"):
        row = held[run.data, run.variant, run.options.seed]
        for given in (run.config, run.options):
            names = [field.name for field in dataclasses.fields(given)]
            assert type(given)(**{name: row[name] for name in names}) == given


def test_runs_of_other_horizons_share_a_file(small_study, monkeypatch, tmp_path):
    runs = [*study.STUDIES["baselines"]("small", "cpu")]
    runs[1] = dataclasses.replace(runs[1], horizons=(9, 12))
    monkeypatch.setitem(study.STUDIES, "baselines", lambda *_: runs)
    assert study.main(small_study) == 0
    held = read(tmp_path / "baselines").values()
    assert [paired.horizons_of(row) for row in held] == [[4, 9], [9, 12]]
    assert [row["horizon"] for row in report.summarise(held)] == [4, 9, 9, 12]


def test_a_file_with_other_columns_is_left_alone(small_study, tmp_path, capsys):
    path = tmp_path / "baselines" / "runs.csv"
    path.parent.mkdir()
    path.write_text("data,variant,seed,age\nmultiscale,dense,0,7\n")
    assert study.main(small_study) == 2
    assert "runs.csv must have the columns of this version, got" in capsys.readouterr().err
    assert path.read_text().endswith("dense,0,7\n")


def write_baselines(folder, scores):
    """Runs of a study; ``scores`` has the MSE of each seed by data, variant and horizon."""
    rows = [
        {
            "data": name,
            "variant": variant,
            "seed": seed,
            **{f"mse_{h}": values[seed] for h, values in horizons.items()},
            **{f"mae_{h}": values[seed] / 2 for h, values in horizons.items()},
            **dict.fromkeys((f"windows_{h}" for h in horizons), 7),
            **dataclasses.asdict(model.ForecasterConfig(look_back=512, ffn=variant)),
            "test_stride": 1,
            "step_ms": 10.0 + seed,
            "parameters": 10,
            "active_flops_per_token": 20.0,
        }
        for (name, variant), horizons in scores.items()
        for seed in range(len(next(iter(horizons.values()))))
    ]
    report.write_csv(folder / "runs.csv", rows)


def test_report_of_hand_made_results(tmp_path, capsys):
    folder = tmp_path / "baselines"
    dense, segment = [0.4, 0.5, 0.6], [0.45, 0.45, 0.45]
    scores = {
        ("ETTh1", "dense"): {96: dense, 192: [0.6, 0.7, 0.8]},
        ("ETTh1", "segment"): {96: segment, 192: [0.61, 0.62, 0.63]},
    }
    write_baselines(folder, scores)
    windows = {"look_back": 512, "test_stride": 1}
    rows = [
        {"data": "ETTh1", "horizon": h, "model": name, "mse": mse, **windows}
        for name, values in {"repeat": (1.3, 1.4), "linear": (0.46, 0.4)}.items()
        for h, mse in zip((96, 192), values, strict=True)
    ]
    report.write_csv(tmp_path / "closed_form.csv", rows)
    report.write_report("baselines", folder)
    shown = capsys.readouterr().out
    assert "| data | horizon | dense | segment | best | repeat | linear | PatchTST/64, pub" in shown
    row = "| ETTh1 | 96 | 0.5000 ± 0.1000 | 0.4500 ± 0.0000 | segment | 1.3 | 0.46 | 0.37 |"
    assert row in shown
    # The mean over horizons and its spread over seeds; published means are of four horizons.
    row = "| ETTh1 | mean | 0.6000 ± 0.1000 | 0.5350 ± 0.0050 | segment | 1.35 | 0.43 | 0.3915 |"
    assert row in shown
    assert "Segment-wise against dense, 2 rows: better in 0, worse in 0 by an interval" in shown
    # Over the horizons 0.53, 0.535, 0.54 against 0.5, 0.6, 0.7: +6.0, -10.8 and -22.9 %, whose
    # standard deviation is 14.5; t is 4.303, and 1.061 for the power.
    assert "| segment against dense | -9.2 [-45.2, +26.8] | 44.9 to 44.9 |" in shown
    # Of the four cells only segment at 96 is below.
    assert "worse than the mean of a trained model in 1 of 4 cells" in shown
    assert re.search(r"\| segment \| 10 \| 20 \| [\d,]+ \| 11 \|", shown)
    assert "6 runs, seeds 0, 1, 2" in shown
    assert "baselines --report` from" in shown
    with folder.with_suffix(".csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == ["dense", "segment"] * 2
    assert float(rows[0]["mse_spread"]) == pytest.approx(statistics.stdev(dense))
    assert folder.with_suffix(".png").stat().st_size > 5000


def made_up(values):
    """Runs with a MSE by variant and seed, at one horizon."""
    return [
        {"data": "x", "variant": variant, "seed": seed, "mse_96": mse}
        for variant, scores in values.items()
        for seed, mse in scores.items()
    ]


def test_a_difference_is_of_the_seeds_that_both_have():
    """Ratios of 1.01, 1.02 and 1.06: mean 3 %, standard deviation sqrt(7), t of 2 degrees 4.303."""
    one = {0: 1.01, 1: 2.04, 2: 3.18, 7: 99.0}
    runs = made_up({"segment": one, "dense": {0: 1.0, 1: 2.0, 2: 3.0, 5: 0.1}})
    found = paired.difference(runs, "x", "segment", "dense")
    error = (7 / 3) ** 0.5
    assert found.seeds == 3
    assert found.error == pytest.approx(error)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (3.0, 3 - 4.30265 * error, 3 + 4.30265 * error), rel=1e-5
    )
    # By the table: t of 80 % and two degrees of freedom is 1.0607.
    assert found.detectable == pytest.approx((4.30265 + 1.06066) * error, rel=1e-5)
    assert found.verdict == "neither"
    assert str(found) == "+3.0 [-3.6, +9.6]"
    assert paired.difference(runs, "x", "segment", "token") is None


def test_pairing_tells_what_the_spread_of_seeds_hides():
    base = {seed: 1.0 + seed for seed in range(4)}
    for factor, verdict in ((0.98, "better"), (1.02, "worse")):
        moved = {seed: (factor + 0.001 * seed) * mse for seed, mse in base.items()}
        runs = made_up({"segment": moved, "dense": base})
        (found,) = paired.comparisons(runs, "segment", "dense").values()
        assert found.verdict == verdict
        assert paired.count_verdicts([found])[verdict] == 1


def test_one_seed_says_nothing():
    runs = made_up({"P=4": {0: 1.0}, "P=5": {0: 0.5}})
    found = paired.difference(runs, "x", "P=5", "P=4")
    assert (found.mean, found.verdict, str(found)) == (-50.0, "neither", "-50.0")
    assert paired.comparisons(runs, "P=5", "P=4") == {}


@pytest.mark.parametrize("name", studies.STUDIES)
def test_committed_tables_are_what_the_committed_runs_say(name):
    runs = report.read_runs(study.RESULTS / name)
    table = report.read_csv((study.RESULTS / name).with_suffix(".csv"))
    table = [{key: value for key, value in row.items() if value is not None} for row in table]
    assert table == report.summarise(runs)
    known = {run.name for run in studies.STUDIES[name]("small", "cpu")}
    found = [f"{r['data']}_{r['variant']}_s{r['seed']}".replace(" ", "-") for r in runs]
    assert len({*found}) == len(found) > 30
    assert known.issuperset(found)


def test_other_models_are_of_the_same_windows_and_look_back(tmp_path):
    def others(look_back, horizons):
        records = [{"data": "ETTh1", "look_back": look_back, "test_stride": 2}]
        return baseline_report.other_models(tmp_path / "baselines", records, horizons)

    rows = [
        {"data": "ETTh1", "horizon": 96, "model": "linear", "mse": stride / 10, "look_back": 512}
        | {"test_stride": stride}
        for stride in (1, 2)
    ]
    report.write_csv(tmp_path / "closed_form.csv", rows)
    assert others(336, studies.HORIZONS) == {}
    found = others(512, (96, 192))
    assert found.pop("linear") == {("ETTh1", 96): 0.2}
    assert {horizon for scores in found.values() for _, horizon in scores} == {96, 192}
    found = others(512, studies.HORIZONS)
    assert found["Seg-MoE, published"]["Weather", "mean"] == 0.223
    horizons = [found["Seg-MoE, published"]["Weather", h] for h in studies.HORIZONS]
    assert statistics.mean(horizons) == pytest.approx(0.223, abs=5e-4)


def test_closed_form_rows_are_of_the_windows_of_the_studies(monkeypatch, tmp_path, capsys):
    (run,) = (
        run
        for run in studies.ablations("small", "cpu")
        if (run.data, run.variant, run.options.seed) == ("multiscale", "default", 0)
    )
    runs = [dataclasses.replace(run, horizons=(4, 9))]
    monkeypatch.setattr(closed_form, "STUDIES", {"one": lambda *_: runs})
    monkeypatch.setattr(closed_form, "ROLLED", 4)
    assert closed_form.main([f"--results={tmp_path}", "--threads=1"]) == 0
    rows = report.read_csv(tmp_path / "closed_form.csv")
    assert [(r["horizon"], r["model"]) for r in rows] == [
        *((4, "repeat"), (4, "linear")),
        *((9, "repeat"), (9, "linear"), (9, "linear, rolled")),
    ]
    series = data.load_series("multiscale")
    windows = data.Windows(series, "test", 512, 9, torch.float64, run.options.test_stride)
    assert rows[2]["windows"] == len(windows)
    past, truth = windows.batch(slice(None))
    expected = (past[..., -1:] - truth).square().mean().item()
    assert rows[2]["mse"] == pytest.approx(expected)
    assert rows[3]["mse"] < 0.7 * expected
    # Three calls of four steps, by the same way as the models are rolled out.
    weight = data.fit_linear(data.Windows(series, "train", 512, 4, torch.float64))

    def four(past):
        features, last = data._linear_features(past)
        return (features @ weight).reshape(*past.shape[:2], 4) + last

    rolled = training.roll_out(four, past, 9)
    assert rows[4]["mse"] == pytest.approx((rolled - truth).square().mean().item())
    assert rows[4]["mse"] != rows[3]["mse"]
    assert "multiscale 9, look-back 512: repeat" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        closed_form.main(["--data", "ETTh9"])
    assert "--data must be of multiscale, got ETTh9" in capsys.readouterr().err


def test_runs_of_files_that_are_not_there_are_left_out(small_study, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("SEGMOE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = study.STUDIES["baselines"]

    def more(scale, device):
        yield from given(scale, device)
        yield dataclasses.replace(next(given(scale, device)), data="ECL")

    monkeypatch.setitem(study.STUDIES, "baselines", more)
    assert study.main(small_study) == 0
    assert "left out: ECL is not on this machine" in capsys.readouterr().out
    assert len(read(tmp_path / "baselines")) == 2
    assert study.main([*small_study, "--only", "ECL"]) == 2
    assert "SEGMOE_DATA=FOLDER with electricity.csv" in capsys.readouterr().err


def test_a_report_of_one_seed_tells_no_difference_and_flags_too_little_training(tmp_path, capsys):
    folder = tmp_path / "sizes"
    rows = [
        {
            "data": "multiscale",
            "variant": f"P={size}",
            "seed": 0,
            "mse_96": {6: 1.0, 4: 1.005}.get(size, 1.2),
            "mae_96": 1,
            "windows_96": 7,
            "look_back": 512,
            "test_stride": 2,
            "parameters": 10,
            "active_flops_per_token": 20.0,
        }
        for size in range(1, 9)
    ]
    report.write_csv(folder / "runs.csv", rows)
    linear = {"model": "linear", "mse": 0.75, "horizon": 96, "look_back": 512, "test_stride": 2}
    report.write_csv(tmp_path / "closed_form.csv", [{"data": "multiscale", **linear}])
    report.write_report("sizes", folder)
    shown = capsys.readouterr().out
    assert "| P=6 against P=4 | -0.5 | - |" in shown
    assert "no difference is told from it" in shown
    assert "is below every model: multiscale (0.7500 against 1.0000)." in shown


@pytest.mark.parametrize("name", stress.STRESS)
def test_stress_series_are_finite_repeat_and_differ_by_seed(name):
    make = stress.STRESS[name]
    values = make()
    assert values.shape == (stress.ROWS, stress.CHANNELS)
    assert np.isfinite(values).all()
    assert np.array_equal(values, make())
    assert not np.array_equal(values, make(seed=1))
    assert data.load_series(name).name == name


def test_advice_is_counted_and_asked_once(tmp_path, monkeypatch, capsys):
    """Hits are sizes of a block where windows begin with one, and segments at all elsewhere."""
    asked = []

    def ask(question, _):
        asked.append(question)
        size = {"a block": 4, "later": 1, "anywhere": 2}[question.windows]
        gains = {f"gain_{n}": 0.1 * (n == 6) for n in range(1, 9)}
        errors = {f"error_{n}": 0.01 for n in range(1, 9)}
        return {**question._asdict(), "size": size, **gains, **errors, "cpu_s": 2.0}

    sizes = [
        {"data": "x", "variant": f"P={n}", "mse": {6: 1.1, 3: 1.0}.get(n, 1.2)} for n in range(1, 9)
    ]
    for name, rows in (("ablations", sizes), ("sizes", [{**sizes[0], "data": "y"}])):
        report.write_csv(tmp_path / f"{name}.csv", rows)
    monkeypatch.setattr(advice, "ask", ask)
    monkeypatch.setattr(advice, "RESULTS", tmp_path)
    assert advice.main(["--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "| planted-4 | 3 of 3 (29% to 100%) | 0 of 3 (0% to 71%) | 1 of 1 (3% to 100%) |" in shown
    )
    assert "| all | 3 of 12 (5% to 57%) |" in shown
    assert "| x | 2 | +10.0% ± 1.0% at 6 | +20.0% | +10.0% | +20.0% | +16.2% |" in shown
    assert "| y |" not in shown
    count = len(asked)
    assert advice.main(["--results", str(tmp_path)]) == 0
    assert len(asked) == count == len(set(asked))
    assert (tmp_path / "advice.md").read_text() in shown + capsys.readouterr().out


def test_a_run_without_its_row_is_repeated_by_its_name(small_study, tmp_path):
    assert study.main(small_study) == 0
    path = tmp_path / "baselines" / "runs.csv"
    before = read(path.parent)
    _, taken = before
    report.write_csv(path, [run for key, run in before.items() if key != taken])
    assert study.main([*small_study, "--only", "^multiscale_segment_s0$"]) == 0
    again = read(path.parent)
    assert [*again] == [*before]
    assert scores(again[taken]) == scores(before[taken])
    assert before[taken]["windows_9"] < before[taken]["windows_4"] + 1


def test_commands_that_cannot_work_say_so(small_study, capsys):
    assert study.main([*small_study, "--only", "nothing"]) == 2
    assert "matches none of 2 runs" in capsys.readouterr().err
    assert study.main([*small_study, "--report"]) == 2
    assert "has no result yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main([*small_study, "--only", "("])
    assert "regular expression" in capsys.readouterr().err


def test_phase_locked_repeats_after_40_steps_and_drift_does_not():
    """Zeros of the first half of a cycle: every form of it is positive there, but the sawtooth."""
    for make, locked in ((stress.phase_locked, True), (stress.phase_drift, False)):
        values = make()[:4000, 0].reshape(100, 40)
        # The mean cycle: all forms agree on the sign of its halves only where phases do.
        swing = values.mean(0).max() - values.mean(0).min()
        assert (swing > 1.0) == locked
