"""`benchmarks.gpu`, without a GPU: its stages, the kernels that it carries, what it fits."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from programs import ROOT, run_python

pytest.importorskip("triton")

from benchmarks import gpu, kernel_cache, layer, tune
from benchmarks.clock.machine import H200
from benchmarks.clock.refit import refit


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Start a call in folders of the test's own: ``call(seconds, exit_status, time_s)``."""
    for name in ("BUILD", "KEPT", "ROOT"):
        monkeypatch.setattr(gpu, name, tmp_path / name)
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "device_name", lambda _: "a-gpu")

    def start(seconds, status=0, time_s=1.0):
        def run_command(words, _folder, limit_s, *, rehearsed):
            assert not rehearsed
            now[0] += min(time_s, limit_s)
            return {"command": words, "exit_status": status if time_s < limit_s else None}

        monkeypatch.setattr(gpu, "run_command", run_command)
        return gpu.Run(seconds, tmp_path / "out")

    return start


def statuses(run):
    return [run.run(stage) for stage in run.todo()]


def test_stages_that_are_done_are_not_run_again(call, tmp_path):
    assert statuses(call(1000)) == ["done"] * len(gpu.STAGES)
    assert call(1000).todo() == []
    # Where the results went is emptied between two calls; a copy goes on.
    (tmp_path / "out" / gpu.FILE).unlink()
    (tmp_path / "KEPT" / "report.md").write_text("made of results")
    assert call(1000).todo() == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == [gpu.FILE]
    state = json.loads((tmp_path / "out" / gpu.FILE).read_text())
    assert state["stages"]["smoke"]["commands"][0]["exit_status"] == 0


def test_a_change_of_the_sources_runs_all_stages(call, monkeypatch):
    statuses(call(1000))
    monkeypatch.setattr(gpu, "code_version", lambda: "other")
    assert call(1000).todo() == list(gpu.STAGES)


def test_a_stage_that_failed_keeps_its_status(call):
    run = call(1000, status=3)
    assert run.run(gpu.STAGES[0]) == "failed"
    assert gpu.STAGES[0] not in run.todo()


def test_stages_that_were_not_reached_come_before_those_at_their_limit(call):
    run = call(200, time_s=500)
    assert run.run(run.todo()[0]) == "stopped"  # at its own 60 s
    assert run.run(run.todo()[0]) == "stopped"
    assert run.run(run.todo()[0]) == "cut"  # 20 s are left
    assert run.left() == 0
    names = [stage.name for stage in call(500).todo()]
    assert names == ["peers", "tiles", "tests", "rest", "smoke", "clock"]


def test_a_command_is_ended_at_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu, "command_of", lambda *_, **__: slow)
    assert gpu.run_command("slow", tmp_path, 0.3, rehearsed=False)["exit_status"] is None


def test_stages_of_worth_take_twelve_minutes():
    *worth, _rest = gpu.STAGES
    assert sum(stage.limit_s for stage in worth) == 720


def test_all_that_is_marked_runs_on_a_gpu():
    files = [path for path in ROOT.glob("tests/test_*.py") if "mark.gpu" in path.read_text()]
    assert {path.stem.removeprefix("test_") for path in files} - {"gpu"} == {*gpu.GPU_TESTS}
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in gpu.TELLING)


def test_commands_are_known_to_their_modules(capsys):
    """Those that list what they would do; the rehearsal runs all of them."""
    for words in (words for stage in gpu.STAGES for words in stage.commands):
        _, _, module, *rest = gpu.command_of(words, 100.0, rehearsed=False)
        if module == "benchmarks.layer":
            assert layer.main([*rest, "--list"]) == 0
    assert "64-4-1-5-1e6/routed/uniform" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_a_gpu_is_needed(capsys):
    assert gpu.main([]) == 1
    assert "benchmarks.gpu rehearse" in capsys.readouterr().out


@pytest.mark.slow  # half a minute: everything is imported, and much of PyTorch looked up
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, as Triton does")
def test_every_command_runs_where_nothing_computes():
    """In `rehearsal_worker`: a command fails if it misspells a name, and a row if it raises."""
    said = json.loads(run_python("tests/rehearsal_worker.py").stdout.splitlines()[-1])
    assert {*said["statuses"].values()} == {0}
    for name in ("smoke", "clock", "layer", "tune"):
        rows = said["rows"][name]
        assert rows
        assert not [row for row in rows if "failed" in row or "refused" in row]
        assert {row["device"] for row in rows} == {"rehearsal"}
    assert "error_after" in said["rows"]["clock"][-1]


# The cache of kernels


def put_kernel(folder, monkeypatch):
    """A kernel in a cache, as Triton puts one there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
    cache = kernel_cache.Carried("KEY")
    group = {name: cache.put(b"code", name) for name in ("k.cubin", "k.json")}
    cache.put_group("k.json", group)


def test_a_cache_serves_in_another_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    put_kernel(here, monkeypatch)
    kernel_cache.pack(here, tmp_path / "kernels.tar.gz")
    (here / "triton").rename(tmp_path / "gone")
    assert kernel_cache.unpack(tmp_path / "kernels.tar.gz", there)
    log = tmp_path / "log"
    monkeypatch.setenv(kernel_cache.LOG, str(log))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there / "triton"))
    group = kernel_cache.Carried("KEY").get_group("k.json")
    assert group == {name: str(there / "triton" / "KEY" / name) for name in group}
    assert {*group} == {"k.cubin", "k.json"}
    assert kernel_cache.Carried("OTHER").get_group("k.json") is None
    assert log.read_text() == "hit k\nmiss k\n"


def test_a_cache_of_another_triton_is_named(tmp_path, monkeypatch, capsys):
    put_kernel(tmp_path, monkeypatch)
    kernel_cache.pack(tmp_path, tmp_path / "kernels.tar.gz")
    other = {**kernel_cache.key_parts(), "triton": "9.9"}
    monkeypatch.setattr(kernel_cache, "key_parts", lambda: other)
    assert not kernel_cache.unpack(tmp_path / "kernels.tar.gz", tmp_path / "there")
    assert "for other triton" in capsys.readouterr().out
    assert not kernel_cache.unpack(tmp_path / "none.tar.gz", tmp_path / "there")


# What is fitted and searched


def test_refit_finds_what_the_kernels_were_made_with():
    generator = np.random.default_rng(0)
    parts = generator.lognormal(1.5, 1.2, (80, 3))
    factors, launch_us = np.array([1.25, 0.9, 1.1]), 0.8
    us = (parts * factors).max(1) + launch_us
    rows = [
        {"kernel": "k", "parts": [list(p)], "measured_us": u, "measured_over_modelled": u / max(p)}
        for p, u in zip(parts, us, strict=True)
    ]
    machine, errors = refit(rows)
    assert machine.clock_hz == pytest.approx(H200.clock_hz / 1.25, rel=0.02)
    assert machine.hbm_rate == pytest.approx(H200.hbm_rate / 0.9, rel=0.02)
    assert machine.l2_rate == pytest.approx(H200.l2_rate / 1.1, rel=0.02)
    assert machine.start - H200.start == pytest.approx(0.8e-6 * machine.clock_hz, rel=0.2)
    assert errors["error_after"] < 0.01 < errors["error_before"]
    kept = ("name", "num_sms", "registers", "dram_latency")
    assert all(dataclasses.asdict(machine)[k] == dataclasses.asdict(H200)[k] for k in kept)
    with pytest.raises(ValueError, match="got none"):
        refit([])


def test_tiles_are_searched_for_the_costliest_kernels_first():
    profiled = [
        {"kernel": "grouped_gemm_dw_kernel", "time_us": 3.0},
        {"kernel": "grouped_gemm_kernel", "time_us": 2.0},
        {"kernel": "_route_fwd_kernel", "time_us": 5.0},
        {"kernel": "elsewhere", "time_us": 9.0},
    ]
    names = ["grouped_gemm_tile", "grouped_gemm_dw_tile", "route_fwd_tile", "route_bwd_tile"]
    first, second, third, last = tune.costliest(names, profiled)
    assert (first, second, third) == ("route_fwd_tile", "grouped_gemm_dw_tile", "grouped_gemm_tile")
    assert last == "route_bwd_tile"
