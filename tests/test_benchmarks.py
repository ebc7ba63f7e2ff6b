"""The measurements themselves, on a CPU and on tiny shapes: what they refuse, keep and write."""

import dataclasses
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from benchmark_runs import CPU, ROOT, needs_scattermoe, rows_of

from benchmarks import layer, memory, peers, timing
from benchmarks import store as stores
from benchmarks.cases import busiest_expert_share, make_case
from benchmarks.gate import Gate, RefusedError
from benchmarks.shapes import GROUPS, find_workloads
from benchmarks.work import floor_bytes, needed_flops
from segmoe_kernels.testing import make_inputs

FAST = ["--device", "cpu", "--rounds", "2", "--budget", "0", "--shapes", "tiny-k2", "--in-process"]


def make(name="tiny-k2", part="whole", routing="uniform"):
    workload = find_workloads(name)[0]
    return make_case(workload, part=part, routing=routing, dtype=torch.float32, device=CPU)


def build_one(name, layer_):
    providers, skipped = peers.build((name,), layer_, CPU)
    assert not skipped
    return providers[0]


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


@pytest.mark.interpreter
def test_skipped_peers_say_why(monkeypatch, capsys):
    for name in ("scattermoe", "transformers.integrations.moe", "liger_kernel"):
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
SETTINGS = {
    "dropout",
    "steps",
    "batch",
    "length",
    "d_model",
    "d_ff",
    "num_experts",
    "top_k",
    "segment_size",
}


def assert_units(row):
    for key, value in row.items():
        if isinstance(value, float):
            assert key.endswith(UNITS) or key in SETTINGS, key
        elif isinstance(value, int) and not isinstance(value, bool):
            assert key in SETTINGS | {"rounds"}, key


def test_layer_writes_rows_with_units_and_resumes(tmp_path, capsys, monkeypatch):
    arguments = [*FAST, "--out", str(tmp_path), "--parts", "routed"]
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
        assert row["configuration"] == "tiny-k2/routed/uniform/float32"
        assert ("saved_mib" in row) == (row["pass"] == "forward+backward")
        kernels = row.get("kernels", [])
        assert any("mm" in kernel["kernel"] for kernel in kernels) == (row["provider"] == "segmoe")
        assert not kernels or sum(k["time_share"] for k in kernels) == pytest.approx(1)
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


@pytest.mark.slow
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


def test_processes_that_write_at_once_lose_no_row(tmp_path):
    path = tmp_path / "rows.json"
    children = []
    for name in range(3):
        child = os.fork()
        if not child:
            try:
                store = stores.Store(path)
                for number in range(10):
                    identity = (f"{name}.{number}", "p", "forward", "eager")
                    store.add([dict(zip(stores.IDENTITY, identity, strict=True))])
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert len(stores.Store(path).rows) == 30
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]


def test_results_go_where_they_are_told(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert stores.results_folder("cpu") == ROOT / "benchmarks" / "results" / "cpu"
    monkeypatch.setenv("OUT", "/somewhere")
    assert stores.results_folder("cpu") == Path("/somewhere")
    assert stores.results_folder("cpu", "here") == Path("here")


def test_saved_bytes_leave_out_x_and_parameters():
    weight = torch.nn.Parameter(torch.randn(16, 16))

    def call(x):
        return torch.sin(x @ weight)

    module = torch.nn.Module()
    module.weight = weight
    provider = peers.Provider("p", module, call, lambda x: x, dict)
    inputs = make_inputs(2, 5, 16)
    assert memory.saved_bytes(provider, inputs) == inputs.x.numel() * 4


def test_timing_interleaves_and_alternates():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.time_interleaved(functions, timing.Clock(CPU), budget_s=0, least_rounds=3)
    # Every call is timed behind one of the same function that isn't.
    assert "".join(order) == "aaaaaabbbbbb" + "bbaa" + "aabb" + "bbaa"
    assert {len(t.times_ms) for t in found.values()} == {3}
    assert timing.summary(found["a"])["rounds"] == 3


@pytest.mark.parametrize(("threads", "name"), [(1, "process_time"), (2, "perf_counter")])
def test_cpu_timing_leaves_out_the_first_of_two_calls(monkeypatch, threads, name):
    clock, order = [0.0], []

    def function(name, ms):
        # A turn's first call finds cold caches: ten times as slow.
        clock[0] += ms * (10 if order[-1:] != [name] else 1) / 1e3
        order.append(name)

    monkeypatch.setattr(timing.time, name, lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    functions = {"a": lambda: function("a", 2.0), "b": lambda: function("b", 3.0)}
    found = timing.time_interleaved(functions, timing.Clock(CPU), budget_s=0, least_rounds=4)
    assert found["a"].quartiles() == pytest.approx((2.0, 2.0, 2.0))
    assert found["b"].ratio(found["a"]) == pytest.approx(1.5)
    assert found["b"].least_ratio(found["a"]) == pytest.approx(1.5)


def test_dropout_is_timed_and_not_judged(tmp_path, capsys):
    arguments = [*FAST, "--out", str(tmp_path), "--parts", "routed", "--dropout", "0,0.5"]
    assert layer.main([*arguments, "--providers", "segmoe,official,grouped_mm"]) == 0
    rows = [row for row in rows_of(tmp_path, "layer") if row["dropout"]]
    assert {row["configuration"] for row in rows} == {"tiny-k2/routed/uniform/float32/dropout 0.5"}
    timed = [row for row in rows if "time_median_ms" in row]
    assert {row["provider"] for row in timed} == {"segmoe", "official"}
    assert {row["skipped"] for row in rows if row not in timed} == {"has no dropout"}
    assert "has no dropout" in capsys.readouterr().out


def test_shapes_are_read_from_their_sizes():
    (workload,) = find_workloads("64-4-2-5-1e4")
    assert str(workload.shape) == "B167-T60-D64-F128-E4-k2-P5"
    assert find_workloads("64-4-2-5-1e4,tiny")[1].name == "tiny"
