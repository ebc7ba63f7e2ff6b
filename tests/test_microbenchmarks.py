"""The microbenchmarks, `pytest benchmarks`: each once, as a test, and what they save."""

import dataclasses
import functools
import json
import os
from xml.etree import ElementTree

import pytest
import torch
from benchmark_runs import CPU
from programs import run_python

from benchmarks import report, stages
from benchmarks.gate import RefusedError
from benchmarks.shapes import find_workloads
from benchmarks.work import KERNELS, MODELLED, layer_work, modelled_us, stage_work

pytest.importorskip("pytest_benchmark")


def test_microbenchmarks_run_and_are_right(tmp_path):
    """Once each, kernels in the interpreter: what fails the gate fails the benchmark."""
    report = tmp_path / "report.xml"
    words = ["-m", "pytest", "benchmarks", "-q", "-n", "0", "--shapes", "tiny-k2"]
    words += ["-k", "not compile", "--benchmark-disable", f"--junitxml={report}"]
    run_python(*words, without=())
    cases = ElementTree.parse(report).iter("testcase")
    ran = [case.attrib["name"] for case in cases if case.find("skipped") is None]
    for stage, providers in stages.STAGES.items():
        for provider in set(providers) & {"segmoe", "eager", "sort", "grouped_mm"}:
            assert f"test_stage[tiny-k2-{stage}-{provider}-forward-eager]" in ran
    for part in ("routed", "whole"):
        for provider in ("segmoe", "eager", "grouped_mm", "official"):
            assert f"test_layer[tiny-k2-{part}-{provider}-forward+backward-eager]" in ran


def test_a_stage_that_is_wrong_is_refused():
    workload = find_workloads("tiny")[0]
    for part in stages.STAGES:
        right = stages.make_stage(part, "eager", workload, torch.float32, CPU)
        stages.check(right)
        wrong = dataclasses.replace(right, function=lambda t, f=right.function: f(t) * 2)
        with pytest.raises(RefusedError, match="times the limit"):
            stages.check(wrong)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["16-4-2-5-60", "tiny-gated"])  # no padding, which nobody needs
def test_work_of_stages_is_that_of_their_tensors(name, backward):
    workload = find_workloads(name)[0]
    flops = 0.0
    for part in ("route", "expert_ffn", "grouped_gemm", "combine"):
        stage = stages.make_stage(part, "eager", workload, torch.float32, CPU)
        y = stage.exact(stage.inputs)
        inputs = sum(value.nbytes for value in stage.inputs.values())
        found = stage_work(workload, part, backward=backward, itemsize=4)
        expected = 3 * inputs + 2 * y.nbytes if backward else inputs + y.nbytes
        assert found["floor_mb"] == pytest.approx(expected / 1e6)
        flops += found["needed_gflop"] * (part in {"route", "expert_ffn"})
    whole = layer_work(workload, "routed", backward=backward, itemsize=4)
    assert flops == pytest.approx(whole["needed_gflop"])


def test_modelled_times_are_those_of_the_table():
    ask = functools.partial(modelled_us, "128-8-2-5-1e5", "segmoe", "bfloat16", mode="eager")
    row, back = (
        row
        for row in json.loads(MODELLED.read_text())["rows"]
        if row["kind"] == "layer"
        and (row["configuration"], row["provider"]) == ("128-8-2-5-1e5", "segmoe")
    )
    assert ask(backward=False) == {"modelled_us": row["modelled_us_with_2us_launches"]}
    total = row["modelled_us_with_2us_launches"] + back["modelled_us_with_2us_launches"]
    assert ask(backward=True)["modelled_us"] == pytest.approx(total, abs=0.01)
    # All kernels but the sum over choices belong to one of three stages.
    parts = [ask(backward=True, stage=stage)["modelled_us"] for stage in KERNELS]
    (combine,) = (c["modelled_us"] for c in row["calls"] if c["name"] == "_combine_fwd_kernel")
    assert sum(parts) == pytest.approx(total - combine - 2, abs=0.05)
    assert ask(backward=True, stage="combine") == {}
    assert modelled_us("tiny", "segmoe", "bfloat16", backward=False, mode="eager") == {}


def test_the_report_reads_what_the_stages_saved(tmp_path):
    words = ["-m", "pytest", "benchmarks/test_stages.py", "-q", "--benchmark-only", "-k", "combine"]
    words += ["--shapes", "tiny-k2", "--rounds", "2", f"--benchmark-json={tmp_path}/stages.json"]
    # The plugin times nothing in a worker of xdist, which this is none of.
    run_python(*words, without=[name for name in os.environ if "XDIST" in name])
    results = report.Results(tmp_path)
    found = {(row["provider"], row["pass"]) for row in results.timed("stages")}
    assert found >= {("eager", "forward"), ("eager", "forward+backward")}
    assert "torch" in results.environments["stages"]
