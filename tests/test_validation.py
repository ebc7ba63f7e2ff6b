"""Wrong calls: the exception, the words of its message, and that no message lacks a test."""

import ast
import collections
import importlib
import sys
import traceback
from pathlib import Path

import bad_advise
import bad_calls
import bad_options
import bad_stats
import bad_swaps
import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import segmoe_kernels
from segmoe_kernels import SegMoE, functional

ROWS = [*bad_calls.ROWS, *bad_options.ROWS, *bad_swaps.ROWS, *bad_stats.ROWS]
ROWS += bad_advise.ROWS
PACKAGE = Path(segmoe_kernels.__file__).parent
CHECKED = ["validation", "layer", "functional", "losses", "convert", "testing"]
CHECKED += ["adapters", "dialects", "huggingface", "parallel", "swap"]
CHECKED += ["advise", "series", "stats", "stats_plots", "stats_writers"]
# Messages about the machine; tested in test_functional.py, test_huggingface.py, parallel_jobs.py,
# test_stats*.py, test_advise.py, test_series.py.
ELSEWHERE = {"resolve_backend", "register_experts", "check_group", "__reduce__"}
ELSEWHERE |= {"_check_equal", "_figure", "_summary_writer", "plot_advice", "unzip", "_append"}


@pytest.mark.parametrize(
    ("call", "exception", "words"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS]
)
def test_bad_call_is_refused(call, exception, words):
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    message = str(caught.value)
    assert message.startswith("segmoe_kernels.")
    for word in words:
        assert word in message, message


# Kinds of tensors that can't be fake.
REAL_ONLY = {"forward_sparse", "forward_nested", "forward_jagged", "forward_quantised"}


@pytest.fixture(scope="module")
def fake_rows():
    """The mode that fake tensors live in, and the rows anew, made of them: name -> row."""
    names = ("bad_calls", "bad_options", "bad_swaps", "bad_stats", "bad_advise")
    real = {name: sys.modules.pop(name) for name in names}
    mode = FakeTensorMode()
    try:
        with mode:
            rows = importlib.import_module("bad_calls").ROWS
            assert isinstance(sys.modules["bad_calls"].EXPERTS.up_proj, FakeTensor)
            rows = [*rows, *(row for n in names[1:] for row in importlib.import_module(n).ROWS)]
    finally:
        sys.modules.update(real)
    return mode, {row[0]: row for row in rows}


@pytest.mark.parametrize("name", [row[0] for row in ROWS if row[0] not in REAL_ONLY])
def test_bad_call_is_refused_under_fake_tensors(name, fake_rows):
    """The same words: checks look at metadata only."""
    mode, rows = fake_rows
    _, call, exception, words = rows[name]
    with mode, pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    for word in words:
        assert word in str(caught.value)


def test_every_public_function_has_bad_calls():
    counts = collections.Counter()
    for _, call, exception, _ in ROWS:
        with pytest.raises(exception) as caught:
            call()
        counts[str(caught.value).removeprefix("segmoe_kernels.").partition(":")[0]] += 1
    public = ["SegMoE", "SegMoE.forward", "load_official", "segment_schedule", "to_official"]
    public += ["load_balancing_loss", "router_z_loss", *functional.__all__]
    public += ["replace_ffn", "upcycle", "convert_state_dict", "experts_forward"]
    public += ["set_loss_scaler", "shard_experts", "collect_routing_stats", "plot_expert_load"]
    public += ["collect_routings"]
    public += ["RoutingCollector.load_state_dict", "plot_expert_usage", "plot_segment_timeline"]
    public += ["CSVWriter.write", "flatten_stats", "read_table"]
    public.remove("resolve_backend")  # named by who calls it
    assert {name: counts[name] for name in public if counts[name] < 2} == {}


def raising_lines():
    """``(file, first line, last line)`` of each statement that raises a message of ours."""
    for module in CHECKED:
        path = PACKAGE / f"{module}.py"
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or function.name in ELSEWHERE:
                continue
            if function.name.startswith("fail_") or function.name == "assert_as_accurate":
                continue
            for node in ast.walk(function):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if isinstance(node, ast.Raise) or name.split(".")[-1].startswith("fail_"):
                    yield str(path), node.lineno, node.end_lineno


def test_every_message_has_a_row():
    reached = set()
    for _, call, exception, _ in ROWS:
        with pytest.raises(exception) as caught:
            call()
        frames = traceback.extract_tb(caught.value.__traceback__)
        reached |= {(frame.filename, frame.lineno) for frame in frames}
    sites = set(raising_lines())
    assert len(sites) > 50
    missed = [
        (Path(path).name, first)
        for path, first, last in sorted(sites)
        if not any((path, line) in reached for line in range(first, last + 1))
    ]
    assert not missed


def test_row_names_are_unique():
    names = [row[0] for row in ROWS]
    assert len(set(names)) == len(names)


def test_bad_call_leaves_inputs_alone():
    layer = SegMoE(4, 6, 3)
    x = torch.randn(2, 5, 4)
    before = x.clone()
    with pytest.raises(ValueError, match="padding_mask"):
        layer(x, torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(x, before)
    assert x._version == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checks_look_at_metadata_only(device):
    """The same message whether or not the tensors hold numbers."""
    x = torch.zeros(2, 5, 4, device=device)
    weight = torch.zeros(3, 4, device=device)
    with pytest.raises(ValueError, match=r"expected router_weight to have shape \(3, 12\)"):
        functional.route(x, weight, segment_size=3, top_k=1)
