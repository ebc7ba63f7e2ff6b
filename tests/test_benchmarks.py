"""The measurements themselves, on a CPU and on tiny shapes: what they refuse, keep and write."""

import dataclasses
import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from segmoe_kernels.testing import make_inputs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import (
    ceilings,
    common,
    gpu,
    layer,
    memory,
    outcome_log,
    peers,
    profiles,
    report,
    stages,
    timing,
    tune,
)
from benchmarks import store as stores
from benchmarks.cases import busiest_expert_share, make_case
from benchmarks.gate import Gate, RefusedError
from benchmarks.shapes import GROUPS, TRAFFIC_SHAPES, Shape, Workload, find_workloads
from benchmarks.work import floor_bytes, needed_flops

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FAST = ["--device", "cpu", "--rounds", "2", "--budget", "0", "--shapes", "tiny-k2", "--in-process"]
needs_scattermoe = pytest.mark.skipif(
    not (peers.SCATTERMOE_FOLDER / "scattermoe").is_dir(), reason="needs peers/scattermoe"
)


@pytest.fixture
def traffic():
    """Imported late: the module chooses Triton's interpreter, which tests on a GPU must not."""
    from benchmarks import traffic

    return traffic


def make(name="tiny-k2", part="whole", routing="uniform"):
    workload = find_workloads(name)[0]
    return make_case(workload, part=part, routing=routing, dtype=torch.float32, device=CPU)


def build_one(name, layer_):
    providers, skipped = peers.build((name,), layer_, CPU)
    assert not skipped
    return providers[0]


def rows_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["rows"]


# Shapes


def test_shapes_have_unique_names_and_sources():
    workloads = [w for name, group in GROUPS.items() if name != "headline" for w in group]
    assert len({w.name for w in workloads}) == len(workloads)
    assert all(w.source for w in workloads)
    with pytest.raises(ValueError, match="--shapes must name groups"):
        find_workloads("nothing")


@pytest.mark.parametrize(
    ("name", "segments", "routed_gflop", "shared_gflop"),
    [
        ("weather-small-p3", 118_272, 46.5, 139.5),
        ("weather-small-p5", 69_888, 45.8, 229.0),
        ("weather-base-p4", 64_512, 135.3, 541.2),
        ("ett-tiny-p5", 11_648, 1.9, 9.5),
    ],
)
def test_paper_shapes_have_the_papers_sizes(name, segments, routed_gflop, shared_gflop):
    """Its table counts padded steps and no router."""
    shape = find_workloads(name)[0].shape
    assert shape.segments == segments
    padded = segments * shape.segment_size
    router = 2 * shape.d_model * shape.num_experts * shape.steps
    flops = needed_flops(shape, backward=False)
    assert (flops - router) * padded / shape.steps / 1e9 == pytest.approx(routed_gflop, rel=0.01)
    both = needed_flops(shape, backward=False, shared=True)
    assert (both - flops) / 1e9 == pytest.approx(shared_gflop, rel=0.01)
    assert floor_bytes(shape, backward=True, itemsize=2) < 3 * floor_bytes(shape, backward=False)


@pytest.mark.parametrize("top", ["tiny", "tiny-k2"])
def test_skewed_routing_sends_70_percent_to_one_expert(top):
    workload = find_workloads(top)[0]
    shape = dataclasses.replace(workload.shape, batch=200)
    many = dataclasses.replace(workload, shape=shape)
    layer_, inputs = make_case(
        many, part="routed", routing="skewed", dtype=torch.float32, device=CPU
    )
    ids = peers.route_ids(layer_, inputs.x)
    assert busiest_expert_share(ids, shape.num_experts) == pytest.approx(0.7, abs=0.01)


# Peers and the gate

CPU_PEERS = ("segmoe", "eager", "grouped_mm", "official")


@pytest.mark.parametrize("part", ["routed", "whole"])
@pytest.mark.parametrize("name", ["tiny", "tiny-k2", "tiny-gated"])
def test_peers_pass_the_gate(name, part):
    layer_, inputs = make(name, part)
    layer_.backend = "reference"
    gate = Gate(layer_, inputs)
    for provider in CPU_PEERS:
        assert gate.check(build_one(provider, layer_)).error_over_limit <= 4


@needs_scattermoe
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["tiny", "tiny-gated"])
@pytest.mark.parametrize("provider", ["scattermoe", "scattermoe_nosync"])
def test_scattermoe_passes_the_gate(provider, name):
    layer_, inputs = make(name)
    assert Gate(layer_, inputs).check(build_one(provider, layer_)).error_over_limit <= 4


def test_compiled_reference_passes_the_gate():
    layer_, inputs = make("tiny-k2", "routed")
    eager = peers._compile(layer_, CPU)
    with torch.compiler.set_stance("force_eager"):  # the adapter is tested, not the compiler
        Gate(layer_, inputs).check(eager)


def test_transformers_adapter_has_what_its_function_reads(monkeypatch):
    """A function of the same interface, in its place."""

    def forward(module, rows, ids, weights):
        assert not module.has_bias
        assert not module.is_transposed
        assert module.has_gate
        out = torch.zeros_like(rows)
        for k in range(ids.shape[1]):
            projected = torch.einsum("nd,nfd->nf", rows, module.gate_up_proj[ids[:, k]])
            hidden = module._apply_gate(projected)
            y = torch.einsum("nf,ndf->nd", hidden, module.down_proj[ids[:, k]])
            out = out + y * weights[:, k, None]
        return out

    fake = types.SimpleNamespace(grouped_mm_experts_forward=forward)
    monkeypatch.setattr(peers.importlib, "import_module", lambda _: fake)
    layer_, inputs = make("tiny-gated")
    Gate(layer_, inputs).check(build_one("transformers", layer_))


@pytest.mark.parametrize(("name", "factor"), [("eager", 1.001), ("eager", math.nan)])
def test_gate_refuses_wrong_results(name, factor):
    layer_, inputs = make()
    right = build_one(name, layer_)
    wrong = dataclasses.replace(right, call=lambda x: right.call(x) * factor)
    with pytest.raises(RefusedError, match="times the limit"):
        Gate(layer_, inputs).check(wrong)


def test_gate_refuses_missing_and_wrong_gradients():
    layer_, inputs = make()
    right = build_one("grouped_mm", layer_)

    def forgetful(found):
        return {k: v for k, v in right.layer_gradients(found).items() if k != "router.weight"}

    def swapped(found):
        named = right.layer_gradients(found)
        return named | {"experts.up_proj": named["experts.up_proj"].flip(0)}

    gate = Gate(layer_, inputs)
    with pytest.raises(RefusedError, match=r"drouter\.weight"):
        gate.check(dataclasses.replace(right, layer_gradients=forgetful))
    with pytest.raises(RefusedError, match=r"dexperts\.up_proj"):
        gate.check(dataclasses.replace(right, layer_gradients=swapped))


def test_peers_get_an_allowance_that_we_do_not():
    layer_, inputs = make()
    right = build_one("eager", layer_)
    noise = 1 + 2 * torch.finfo(torch.float32).eps
    off = dataclasses.replace(right, call=lambda x: right.call(x) * noise * noise)
    assert 1 < Gate(layer_, inputs).check(off).error_over_limit <= 4
    with pytest.raises(RefusedError, match="allowed are 1"):
        Gate(layer_, inputs).check(dataclasses.replace(off, ours=True))


@pytest.mark.interpreter
def test_skipped_peers_say_why(monkeypatch, capsys):
    for name in ("scattermoe", "transformers", "liger_kernel"):
        monkeypatch.setitem(sys.modules, name, None)
    layer_, _ = make("tiny-k2")
    _, skipped = peers.build(("scattermoe", "transformers", "liger"), layer_, CPU)
    printed = capsys.readouterr().out
    assert "skipped scattermoe: not in" in printed
    assert "skipped transformers: can't import" in printed
    assert "skipped liger: SwiGLU experts only" in printed
    assert set(skipped) == {"scattermoe", "transformers", "liger"}
    gated, _ = make("tiny-gated")
    _, skipped = peers.build(("liger",), gated, CPU)
    assert "language-model widths" in skipped["liger"]


# Runs and their files

UNITS = (
    "_ms",
    "_us",
    "_mib",
    "_mb",
    "_gflop",
    "_per_s",
    "_bytes_per_step",
    "_share",
    "_over_limit",
)
UNITS += ("_over_segmoe",)
SETTINGS = {"steps", "batch", "length", "d_model", "d_ff", "num_experts", "top_k", "segment_size"}


def assert_units(row):
    for key, value in row.items():
        if isinstance(value, float):
            assert key.endswith(UNITS), key
        elif isinstance(value, int) and not isinstance(value, bool):
            assert key in SETTINGS | {"rounds"}, key


def test_layer_writes_rows_with_units_and_resumes(tmp_path, capsys, monkeypatch):
    arguments = [*FAST, "--out", str(tmp_path), "--parts", "routed", "--plan", "block"]
    arguments += ["--providers", "segmoe,eager,grouped_mm,liger"]
    monkeypatch.setenv("SEGMOE_BACKEND", "reference")
    assert layer.main(arguments) == 0
    rows = rows_of(tmp_path, "layer")
    assert len(rows) == 4 * 2
    timed = [row for row in rows if "time_median_ms" in row]
    assert {row["provider"] for row in timed} == {"segmoe", "eager", "grouped_mm"}
    assert all("SwiGLU" in row["skipped"] for row in rows if row["provider"] == "liger")
    for row in timed:
        assert_units(row)
        assert row["time_q1_ms"] <= row["time_median_ms"] <= row["time_q3_ms"]
        assert row["plan"] == "block"
        assert row["configuration"] == "tiny-k2/routed/uniform/float32/plan-block"
    capsys.readouterr()

    assert layer.main(arguments) == 0
    assert "already measured" in capsys.readouterr().out
    assert rows_of(tmp_path, "layer") == rows
    # One more provider: all of them are measured anew, side by side, and nothing is lost.
    more = [*arguments[:-1], "segmoe,official"]
    assert layer.main(more) == 0
    assert len(rows_of(tmp_path, "layer")) == 5 * 2
    # Other sources: the rows are of no use.
    monkeypatch.setattr("benchmarks.runner.code_version", lambda: "other")
    layer.main(more)
    assert {row["code"] for row in rows_of(tmp_path, "layer")} == {"other", rows[0]["code"]}


def test_plan_is_set_for_the_measurement_only(tmp_path, monkeypatch):
    seen = []
    monkeypatch.delenv("SEGMOE_PLAN", raising=False)
    suite = dataclasses.replace(
        layer.SUITE,
        measure=lambda *_: seen.append(os.environ["SEGMOE_PLAN"]),
    )
    layer.run_suite(suite, "", [*FAST, "--out", str(tmp_path), "--plan", "auto,grouped"])
    assert seen == ["auto", "grouped", "auto", "grouped"]
    assert "SEGMOE_PLAN" not in os.environ


def test_configurations_run_in_processes_of_their_own(tmp_path, capfd):
    arguments = [word for word in FAST if word != "--in-process"]
    arguments += ["--out", str(tmp_path), "--parts", "routed", "--providers", "eager"]
    assert layer.main(arguments) == 0
    assert all("time_median_ms" in row for row in rows_of(tmp_path, "layer"))
    assert layer.main([*arguments, "--limit", "0.05", "--dtype", "bfloat16"]) == 0
    failed = [row for row in rows_of(tmp_path, "layer") if "failed" in row]
    assert {row["failed"] for row in failed} == {"took longer than 0 s"}
    assert len(failed) == 2
    # Time is up before the first starts: it stays for the next run.
    arguments += ["--dtype", "float16", "--deadline", "1"]
    assert layer.main(arguments) == 0
    assert "stopped at the deadline: 1 configurations left" in capfd.readouterr().out
    assert not [row for row in rows_of(tmp_path, "layer") if row["dtype"] == "float16"]


def test_own_refused_results_make_the_run_fail(tmp_path, monkeypatch):
    right = peers.PROVIDERS["segmoe"]

    def wrong(layer_, device):
        provider = right(layer_, device)
        return dataclasses.replace(provider, call=lambda x: provider.call(x) + 1)

    monkeypatch.setenv("SEGMOE_BACKEND", "reference")
    monkeypatch.setitem(peers.PROVIDERS, "segmoe", wrong)
    arguments = [*FAST, "--out", str(tmp_path), "--parts", "routed", "--providers", "segmoe,eager"]
    assert layer.main(arguments) == 1
    refused = [row for row in rows_of(tmp_path, "layer") if "refused" in row]
    assert {row["provider"] for row in refused} == {"segmoe"}
    assert not any("time_median_ms" in row for row in refused)


def test_store_starts_from_earlier_rows_and_retries(tmp_path):
    identity = ("c", "p", "forward", "eager")
    row = dict(zip(stores.IDENTITY, identity, strict=True), code="1", failed="broke")
    old = stores.Store(tmp_path / "old.json")
    old.add([row])
    new = stores.Store(tmp_path / "deep" / "new.json", seed=tmp_path / "old.json")
    assert new.has(identity, "1")
    assert not new.has(identity, "1", retry=True)
    assert not new.has(identity, "2")
    new.add([{**row, "failed": "again"}])
    assert [r["failed"] for r in stores.Store(new.path).rows] == ["again"]
    assert stores.Store(new.path, fresh=True).rows == []


def test_results_go_where_they_are_told(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert stores.results_folder("cpu") == ROOT / "benchmarks" / "results" / "cpu"
    monkeypatch.setenv("OUT", "/somewhere")
    assert stores.results_folder("cpu") == Path("/somewhere")
    assert stores.results_folder("cpu", "here") == Path("here")


def test_stages_measure_every_part(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMOE_BACKEND", "reference")
    providers = "segmoe,eager,sort,grouped_mm"
    assert stages.main([*FAST, "--out", str(tmp_path), "--providers", providers]) == 0
    timed = [row for row in rows_of(tmp_path, "stages") if "time_median_ms" in row]
    assert {row["part"] for row in timed} == set(stages.SUITE.parts)
    for part in ("expert_ffn", "grouped_gemm"):
        found = {row["provider"] for row in timed if row["part"] == part}
        assert found == {"segmoe", "eager", "grouped_mm"}
    assert {row["provider"] for row in timed if row["part"] == "permute"} >= {"segmoe", "sort"}
    assert not [row for row in rows_of(tmp_path, "stages") if "refused" in row or "failed" in row]
    for row in timed:
        assert_units(row)


@needs_scattermoe
@pytest.mark.interpreter
def test_stages_run_scattermoes_experts(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMOE_BACKEND", "reference")
    arguments = [*FAST, "--out", str(tmp_path), "--parts", "expert_ffn"]
    arguments += ["--passes", "forward"]
    assert stages.main([*arguments, "--providers", "scattermoe,scattermoe_nosync"]) == 0
    assert all("time_median_ms" in row for row in rows_of(tmp_path, "stages"))


def test_memory_counts_saved_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMOE_BACKEND", "reference")
    arguments = [*FAST, "--out", str(tmp_path), "--providers", "segmoe,eager,grouped_mm"]
    assert memory.main(arguments) == 0
    rows = rows_of(tmp_path, "memory")
    assert all(row["saved_mib"] > 0 for row in rows)
    for row in rows:
        assert_units(row)


def test_saved_bytes_leave_out_x_and_parameters():
    weight = torch.nn.Parameter(torch.randn(16, 16))

    def call(x):
        return torch.sin(x @ weight)

    module = torch.nn.Module()
    module.weight = weight
    provider = peers.Provider("p", module, call, lambda x: x, dict)
    inputs = make_inputs(2, 5, 16)
    assert memory.saved_bytes(provider, inputs) == inputs.x.numel() * 4


def test_profile_names_the_operators(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMOE_BACKEND", "reference")
    arguments = [*FAST, "--out", str(tmp_path), "--providers", "segmoe", "--passes", "forward"]
    assert profiles.main(arguments) == 0
    (row,) = rows_of(tmp_path, "profiles")
    assert any("mm" in kernel["kernel"] for kernel in row["kernels"])
    assert sum(kernel["time_share"] for kernel in row["kernels"]) == pytest.approx(1)


def test_counters_are_read_from_the_profilers_table():
    text = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","_route","gpu__time_duration.sum","ns","1,234"
"0","_route","dram__bytes_read.sum","byte","64"
"1","_block","gpu__time_duration.sum","ns","5"
"1","_block","unknown","","7"
"""
    first, second = profiles.parse_counters(text)
    assert first == {"kernel": "_route", "time_ns": 1234.0, "dram_read_bytes": 64.0}
    assert second == {"kernel": "_block", "time_ns": 5.0}
    assert profiles.parse_counters("no table") == []


def test_timing_interleaves_and_alternates():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.time_interleaved(functions, timing.Clock(CPU), budget_s=0, least_rounds=3)
    assert "".join(order) == "aaabbb" + "ba" + "ab" + "ba"
    assert {len(t.times_ms) for t in found.values()} == {3}
    assert timing.summary(found["a"])["rounds"] == 3


def test_cpu_timing_leaves_out_the_first_of_several_calls(monkeypatch):
    clock, order = [0.0], []

    def function(name, ms):
        # A turn's first call finds cold caches: ten times as slow.
        clock[0] += ms * (10 if order[-1:] != [name] else 1) / 1e3
        order.append(name)

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    functions = {"a": lambda: function("a", 2.0), "b": lambda: function("b", 3.0)}
    found = common.interleaved(functions, rounds=4, warmup=0, calls=3)
    assert len(order) == 2 * 4 * 3
    assert found["a"].quartiles() == pytest.approx((2.0, 2.0, 2.0))
    assert found["b"].quartiles() == pytest.approx((3.0, 3.0, 3.0))


# Tuning


def test_neighbours_change_one_value_within_its_range():
    from segmoe_kernels._triton.tiles import TileConfig

    tile = TileConfig(16, 64, 128, 4, 1)
    found = list(tune.neighbours(tile, ("block_m", "block_f", "num_warps", "num_stages")))
    assert all(sum(a != b for a, b in zip(tile, other, strict=True)) == 1 for other in found)
    assert {other.block_m for other in found} == {16, 32}
    assert {other.block_k for other in found} == {128}
    assert {other.block_k for other in tune.neighbours(tile, ("block_k",))} == {64}
    assert {other.num_stages for other in found} == {1, 2}


@pytest.mark.interpreter
def test_search_tries_tiles_and_puts_the_table_back(monkeypatch):
    from segmoe_kernels._triton import tiles

    monkeypatch.setenv("SEGMOE_PLAN", "grouped")
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
            "configuration": f"{name}/routed/uniform/bfloat16/plan-auto",
            "workload": name,
            "part": "routed",
            "routing": "uniform",
            "dtype": "bfloat16",
            "plan": "auto",
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
        for scale, workload in enumerate(find_workloads("d64-e4-k1-p5-10k,d64-e4-k1-p5-100k"), 1)
        for provider, time_ms in (("segmoe", 2.0), ("grouped_mm", 5.0), ("scattermoe", 7.0))
        for mode in ("eager", "graph")
    ]
    absent = {**layers[0], "provider": "liger", "skipped": "SwiGLU experts only"}
    del absent["time_median_ms"]
    write("layer", [*layers, absent])
    write("stages", layers)
    write("memory", [{**r, "saved_mib": 3.0, "saved_bytes_per_step": 9.0} for r in layers[::2]])
    write(
        "ceilings",
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
    # 4 GFLOP at 800 TFLOP/s take 5 us, 8 MB at 4,000 GB/s 2 us; 2 ms were taken.
    assert report.Results(tmp_path).bound_ms(report.Results(tmp_path).rows["layer"][0]) == 0.005
    assert "liger skipped (eager): SwiGLU experts only" in text
    for name in ("time-against-rows", "speed-up", "roofline", "memory"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    block = readme.read_text()
    assert block.startswith("before\n<!-- benchmarks -->\nA GPU")
    assert block.endswith("<!-- /benchmarks -->\nafter\n")
    assert "| d64-e4-k1-p5-10k (routed, forward) | 10240 | 2 | 2.50 | grouped_mm |" in block
    assert "old" not in block


def test_report_refuses_what_it_can_not_do(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "no result files" in capsys.readouterr().out
    plain = tmp_path / "plain.md"
    plain.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.update_readme(plain, "block")


def test_report_lives_without_ceilings(tmp_path):
    fake_results(tmp_path)
    (tmp_path / "ceilings.json").unlink()
    written = {path.name for path in report.write_report(tmp_path)}
    assert "roofline.png" not in written
    assert "speed-up.png" in written


# The steps for a GPU


def test_gpu_steps_go_on_where_they_were(tmp_path, capsys, monkeypatch):
    def measure(words, *_, **__):
        return [sys.executable, "-c", f"print({words!r})"]

    monkeypatch.setattr(gpu, "_command", measure)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--step", "ceilings,layer"]
    assert gpu.main(arguments) == 0
    state = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {name: step["status"] for name, step in state.items()} == {
        "ceilings": "done",
        "layer": "done",
    }
    assert "already done" not in capsys.readouterr().out
    gpu.main(arguments)
    assert capsys.readouterr().out.count("already done") == 2


def test_gpu_step_is_ended_at_its_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu, "_command", lambda *_, **__: slow)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--step", "ceilings"]
    assert gpu.main([*arguments, "--step-deadline", "0.5"]) == 0
    step = json.loads((tmp_path / "gpu.json").read_text())["steps"]["ceilings"]
    assert step["status"] == "stopped"
    monkeypatch.setattr(gpu, "_command", lambda *_, **__: [sys.executable, "-c", "exit(3)"])
    assert gpu.main(arguments) == 1


def test_gpu_commands_are_known_to_their_modules(tmp_path, capsys):
    """Every command of a step that lists configurations parses."""
    for step in gpu.STEPS:
        for words in step.commands:
            command = gpu._command(words, 100.0, tmp_path, quick=False)
            if "pytest" in command or "--counters" in command:
                continue
            module = {"layer": layer, "stages": stages, "memory": memory, "profiles": profiles}
            name = command[2].removeprefix("benchmarks.")
            if name in module:
                assert module[name].main([*command[3:], "--list"]) == 0
    assert "d64-e4-k1-p5-1m/routed/uniform" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_gpu_needs_a_gpu(capsys):
    assert gpu.main([]) == 1
    assert "--device cpu --quick" in capsys.readouterr().out
    assert gpu.main(["--list"]) == 0


def test_ceilings_are_rates(tmp_path):
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--size", "16", "--copy-mib", "1"]
    assert ceilings.main([*arguments, "--budget", "0"]) == 0
    rows = {row["configuration"]: row for row in rows_of(tmp_path, "ceilings")}
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
