"""What becomes of the measurements: tuning, traffic, the report."""

import dataclasses
import json
import types

import outcome_log
import pytest
import torch
from benchmark_runs import CPU, ROOT, needs_scattermoe, rows_of

from benchmarks import ceilings, report, tune
from benchmarks.cases import make_case
from benchmarks.shapes import TRAFFIC_SHAPES, Shape, Workload, find_workloads


@pytest.fixture
def traffic():
    """Imported late: the module chooses Triton's interpreter, which tests on a GPU must not."""
    from benchmarks import traffic

    return traffic


# Tuning


@pytest.mark.interpreter
def test_search_tries_tiles_and_puts_the_table_back():
    from segmoe_kernels._triton import tiles

    before = dict(vars(tiles))
    kept = []
    workload = Workload("least", Shape(1, 4, 16, 16, 2, 1, 2), "none")
    layer_, inputs = make_case(
        workload, part="routed", routing="uniform", dtype=torch.float32, device=CPU
    )
    layer_.backend = "triton"
    rows = []
    tune.search(
        workload,
        layer_,
        inputs,
        rows.append,
        seconds_left=lambda: 1.0,
        budget_s=0.0,
        only="route_fwd",
        most=1,
        rounds=2,
        keep=lambda *winner: kept.append(winner),
    )
    for questions, fields in kept:  # whatever won: times of the interpreter mean nothing
        assert all(asked.startswith("route_fwd_tile(d_model=16, ") for asked in questions)
        assert set(fields) == {"block_n", "num_warps", "num_stages"}
    assert [row["shipped"] for row in rows] == [True, False]
    assert rows[0]["function"] == rows[1]["function"] == "route_fwd_tile"
    assert rows[0]["tile"] != rows[1]["tile"]
    assert dict(vars(tiles)) == before


# Traffic


@pytest.mark.interpreter
def test_scattermoes_bytes_are_known_for_every_shape(traffic):
    assert set(traffic.SCATTERMOE_MB) == set(TRAFFIC_SHAPES)
    assert len(set(TRAFFIC_SHAPES)) == len(TRAFFIC_SHAPES)
    given = [(14.5, 32.1), (26.7, 62.4), (93.6, 214.3)]
    for shape, (forward, backward) in zip(TRAFFIC_SHAPES, given, strict=False):
        found = traffic.SCATTERMOE_MB[shape]
        assert [round(mb, 1) for mb in found[:2]] == [forward, backward]
    shape = TRAFFIC_SHAPES[0]
    both = traffic.scattermoe_bytes(shape, backward=True, requested=True)
    assert both == pytest.approx(1e6 * sum(traffic.SCATTERMOE_MB[shape][2:]))


@needs_scattermoe
@pytest.mark.interpreter
def test_scattermoes_bytes_are_what_the_meter_counts(traffic):
    shape = TRAFFIC_SHAPES[0]
    total = traffic.measure_scattermoe(shape, backward=False).total()
    distinct = traffic.scattermoe_bytes(shape, backward=False)
    requested = traffic.scattermoe_bytes(shape, backward=False, requested=True)
    assert total.distinct_bytes == pytest.approx(distinct, rel=1e-3)
    assert total.requested_bytes == pytest.approx(requested, rel=1e-3)


# Report


def fake_results(folder):
    """Rows as the measurements write them, with round numbers."""
    environment = {"gpu": "A GPU", "torch": "2", "triton": "3"}

    def write(name, rows):
        content = {"environment": environment, "rows": rows}
        (folder / f"{name}.json").write_text(json.dumps(content))

    def row(name, provider, time_ms, mode, workload):
        return {
            "configuration": f"{name}/routed/uniform/bfloat16",
            "workload": name,
            "part": "routed",
            "routing": "uniform",
            "dtype": "bfloat16",
            "provider": provider,
            "pass": "forward",
            "mode": mode,
            "code": "abc",
            "steps": workload.shape.steps,
            **dataclasses.asdict(workload.shape),
            "time_median_ms": time_ms,
            "time_q1_ms": 0.9 * time_ms,
            "time_q3_ms": 1.1 * time_ms,
            "needed_gflop": 4.0,
            "floor_mb": 8.0,
            "needed_tflop_per_s": 4.0 / time_ms,
        }

    layers = [
        row(workload.name, provider, time_ms * scale, mode, workload)
        for scale, workload in enumerate(find_workloads("64-4-1-5-1e4,64-4-1-5-1e5"), 1)
        for provider, time_ms in (("segmoe", 2.0), ("grouped_mm", 5.0), ("scattermoe", 7.0))
        for mode in ("eager", "graph")
    ]
    layers[0] |= {"saved_mib": 3.0, "saved_bytes_per_step": 9.0}
    absent = {**layers[0], "provider": "liger", "skipped": "SwiGLU experts only"}
    del absent["time_median_ms"]
    write("layer", [*layers, absent])
    stage = {
        "params": {
            "shape": "tiny",
            "stage": "route",
            "provider": "segmoe",
            "passed": "forward",
            "mode": "eager",
        },
        "stats": {"median": 0.002, "q1": 0.0018, "q3": 0.0022},
    }
    saved = {"machine_info": {"environment": environment}, "benchmarks": [stage]}
    (folder / "stages.json").write_text(json.dumps(saved))
    write(
        "clock",
        [
            {"configuration": "copy", "rate_gb_per_s": 4000.0},
            {"configuration": "gemm-bfloat16", "rate_gb_per_s": 1.0, "rate_tflop_per_s": 800.0},
        ],
    )


def test_report_makes_tables_and_plots_from_the_files(tmp_path):
    fake_results(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "2.50 (grouped_mm)" in text
    assert "2 (1.8 to 2.2)" in text
    assert "## Stages, forward, eager" in text
    assert "| tiny route | 2 (1.8 to 2.2) |" in text
    # 4 GFLOP at 800 TFLOP/s take 5 us, 8 MB at 4,000 GB/s 2 us; 2 ms were taken.
    assert report.Results(tmp_path).bound_ms(report.Results(tmp_path).rows["layer"][0]) == 0.005
    assert "liger skipped (eager): SwiGLU experts only" in text
    for name in ("time-against-rows", "speed-up"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    block = readme.read_text()
    assert block.startswith("before\n<!-- benchmarks -->\nA GPU")
    assert block.endswith("<!-- /benchmarks -->\nafter\n")
    assert "| 64-4-1-5-1e4 (routed, forward) | 10020 | 2 | 2.50 | grouped_mm |" in block
    assert "old" not in block


def test_report_refuses_what_it_can_not_do(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "no result files" in capsys.readouterr().out
    plain = tmp_path / "plain.md"
    plain.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.update_readme(plain, "block")


# What a run on a GPU keeps


def test_ceilings_are_rates(tmp_path):
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--size", "16", "--copy-mib", "1"]
    assert ceilings.main([*arguments, "--budget", "0"]) == 0
    rows = {row["configuration"]: row for row in rows_of(tmp_path, "clock")}
    copy = rows["copy"]
    expected = 2 * 2**20 / 1e9 / (copy["time_median_ms"] / 1e3)
    assert copy["rate_gb_per_s"] == pytest.approx(expected)
    assert rows["gemm-float32"]["rate_tflop_per_s"] > 0


def test_outcomes_are_kept_and_passed_tests_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "tests.json"
    log = outcome_log._Log(path)
    for name, outcome in (("a", "passed"), ("b", "failed")):
        log.pytest_runtest_logreport(
            types.SimpleNamespace(
                when="call",
                outcome=outcome,
                failed=outcome == "failed",
                duration=0.5,
                nodeid=name,
                longreprtext="why",
            )
        )
    log.pytest_sessionfinish()
    assert json.loads(path.read_text())["counts"] == {"passed": 1, "failed": 1}

    def item(name, marker=None):
        return types.SimpleNamespace(
            nodeid=name, get_closest_marker=lambda asked: marker if asked == "gpu" else None
        )

    gone = []
    hook = types.SimpleNamespace(pytest_deselected=lambda *, items: gone.extend(items))
    items = [item("a"), item("b"), item("c", marker="gpu")]
    later = outcome_log._Log(path)
    later.pytest_collection_modifyitems(types.SimpleNamespace(hook=hook), items)
    assert [i.nodeid for i in items] == ["c", "b"]
    assert [i.nodeid for i in gone] == ["a"]
