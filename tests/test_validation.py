"""Wrong calls: the exception, the words of its message, and that no message lacks a test."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import traceback
from pathlib import Path

import bad_advise
import bad_calls
import bad_conversions
import bad_options
import bad_stats
import bad_steps
import bad_swaps
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import segmoe_kernels
from segmoe_kernels import (
    SegMoE,
    functional,
    load_official,
    segment_schedule,
    to_official,
    validation,
)

TABLES = (bad_calls, bad_options, bad_swaps, bad_conversions, bad_stats, bad_advise, bad_steps)
ROWS = [row for table in TABLES for row in table.ROWS]
PACKAGE = Path(segmoe_kernels.__file__).parent
CHECKED = ["validation", "layer", "layer.decoding", "functional", "losses", "testing", "parallel"]
CHECKED += ["series", "models.cached", "models.search", "models.probe", "models.swap"]
CHECKED += [f"models.{name}" for name in ("adapters", "checkpoints", "huggingface", "official")]
CHECKED += ["series.advise"]
CHECKED += ["stats.collector", "stats.plots", "stats.writers"]
# Messages about the machine; tested in test_functional.py, test_huggingface.py, parallel_jobs.py,
# test_stats*.py, test_advise.py, test_series.py, test_triton_layer.py.
ELSEWHERE = {"resolve_backend", "register_experts", "check_group", "__reduce__"}
ELSEWHERE |= {"_check_equal", "_figure", "_summary_writer", "plot_advice", "unzip", "_append"}
ELSEWHERE |= {"_check_place", "run_layer", "_refuse_compiled"}


def name_of(number):
    """Whose call it is, and with which arguments, for pytest."""
    function, arguments = getattr(ROWS[number][0], "wrong", (None, ()))
    return f"{getattr(function, '__qualname__', '')}({','.join(sorted(arguments))})"


def check_refused(call, exception, words):
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    message = str(caught.value)
    assert message.startswith("segmoe_kernels.")
    for word in words.split(" | "):
        assert word in message, message
    arguments = getattr(call, "wrong", (None, set()))[1] - {"self"}
    assert not arguments or arguments & set(re.findall(r"\w+", message)), message


@pytest.mark.parametrize("number", range(len(ROWS)), ids=name_of)
def test_bad_call_is_refused(number):
    check_refused(*ROWS[number])


@pytest.fixture(scope="module")
def fake_rows():
    """The mode that fake tensors live in, and the rows anew, made of them."""
    names = [table.__name__ for table in TABLES]
    real = {name: sys.modules.pop(name) for name in names}
    mode = FakeTensorMode()
    try:
        with mode:
            rows = [row for name in names for row in importlib.import_module(name).ROWS]
            assert isinstance(sys.modules["bad_calls"].EXPERTS.up_proj, FakeTensor)
    finally:
        sys.modules.update(real)
    return mode, rows


@pytest.mark.parametrize(
    "number", [n for n, row in enumerate(ROWS) if not hasattr(row[0], "real")], ids=name_of
)
def test_bad_call_is_refused_under_fake_tensors(number, fake_rows):
    """The same words: checks look at metadata only."""
    mode, rows = fake_rows
    with mode:
        check_refused(*rows[number])


# What users import from.
PUBLIC = ["functional", "layer", "layer.decoding", "losses", "parallel", "series", "series.advise"]
PUBLIC += [
    f"models.{name}" for name in ("adapters", "cached", "checkpoints", "huggingface", "official")
]
PUBLIC += [
    "models.loading",
    "models.recipe",
    "models.swap",
    "stats",
    "stats.plots",
    "stats.writers",
]
# Arguments that another library checks, or that need what a table has not; "*": all of a function.
CHECKED_ELSEWHERE = {
    "SegMoEEncoderLayer.forward": {"*"},  # by torch, as those of its own encoder layer
    "load_pretrained": {"options"},  # by transformers
    "RoutingCollector": {"*"},  # made by `collect_routing_stats` only
    "shard_experts": {"group"},  # test_parallel.py: what is no group needs one to be refused
}


def public_arguments():
    """``(function, name of it, argument)`` of everything users call, from the signatures."""
    for place in PUBLIC:
        module = importlib.import_module(f"segmoe_kernels.{place}")
        for name in module.__all__:
            public = getattr(module, name)
            if not callable(public) or dataclasses.is_dataclass(public):
                continue
            functions = {name: public}
            if isinstance(public, type):
                if issubclass(public, tuple):
                    continue
                methods = {k: f for k, f in vars(public).items() if inspect.isfunction(f)}
                functions = {name: public} if "__init__" in methods else {}
                functions |= {f"{name}.{k}": f for k, f in methods.items() if not k.startswith("_")}
            for called, function in functions.items():
                for argument in inspect.signature(function).parameters.values():
                    if argument.kind is argument.VAR_KEYWORD:
                        continue
                    if argument.name != "self":
                        yield function, called, argument.name


def test_every_argument_of_every_public_function_has_a_bad_call():
    """Refused by name: the message has it."""
    wrong = set()
    for call, exception, _ in ROWS:
        function, arguments = getattr(call, "wrong", (None, ()))
        with pytest.raises(exception) as caught:
            call()
        words = set(re.findall(r"\w+", str(caught.value)))
        wrong |= {(function, argument) for argument in arguments if argument in words}
    arguments = list(public_arguments())
    assert len(arguments) > 120
    missed = [
        f"{called}({argument}=)"
        for function, called, argument in arguments
        if not {argument, "*"} & CHECKED_ELSEWHERE.get(called, set())
        and (function, argument) not in wrong
    ]
    assert not missed


CALLERS = [
    value for table in TABLES for value in vars(table).values() if hasattr(value, "function")
]
# Arrays are right there, anything is, or the call goes to a group of processes first.
TAKE_ARRAYS = {"values", "group"}


@pytest.mark.parametrize(
    "call", dict.fromkeys(CALLERS), ids=lambda call: call.function.__qualname__
)
def test_arrays_are_refused_by_name(call):
    """Also those of one element, which some comparisons take for a number."""
    for argument in inspect.signature(call.function).parameters.values():
        if argument.kind is argument.VAR_KEYWORD or argument.name in {"self", *TAKE_ARRAYS}:
            continue
        for array in (np.array([1, 2]), np.array([1.0]), np.array(["gelu"])):
            with pytest.raises((TypeError, ValueError), match=r"segmoe_kernels\.\w") as caught:
                call(**{argument.name: array})()
            assert re.search(rf"\b{argument.name}\b", str(caught.value)), argument.name


def test_numbers_of_numpy_are_options():
    integer, real = np.int64, np.float32
    layer = SegMoE(
        integer(4), np.int32(6), np.uint8(3), top_k=integer(2), segment_size=integer(3),
        shared_d_ff=integer(5), dropout=real(0.5), router_dropout=np.float16(0.25),
        router_temperature=integer(2), aux_loss_weight=real(0.5), z_loss_weight=np.float64(0.1),
    ).eval()  # fmt: skip
    plain = {int, float, str, bool, type(None)}
    kept = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    assert {name: value for name, value in kept.items() if type(value) not in plain} == {}
    assert (layer.experts.num_experts, type(layer.experts.num_experts)) == (3, int)
    x = torch.randn(2, 5, 4)
    layer.dropout, layer.router_temperature = real(0.5), real(2)  # as a study's loop sets them
    options = {"segment_size": integer(3), "top_k": integer(2)}
    weights = {"router_weight": layer.router.weight, "experts": layer.experts.weights()}
    y, routing = functional.seg_moe(
        x, **weights, **options, dropout=real(0), router_temperature=real(2)
    )
    assert torch.equal(routing.topk_ids, layer.forward_with_routing(x)[1].topk_ids)
    routed = functional.route(x, weights["router_weight"], **options, router_temperature=real(2))
    assert torch.equal(routed.router_probs, routing.router_probs)
    permutation = functional.permute(routed.topk_ids, integer(3))
    out = functional.expert_ffn(
        x, routed.topk_weights, permutation, weights["experts"], segment_size=integer(3),
        dropout=real(0),
    )  # fmt: skip
    torch.testing.assert_close(functional.combine(out), y)
    assert segment_schedule(np.array([5, 4]).tolist(), integer(2)) == [5, 4]
    state = to_official(SegMoE(4, 6, 3, segment_size=3))
    assert load_official(state, segment_size=integer(3), dropout=real(0.5)).dropout == 0.5


def test_words_of_other_libraries_are_no_names_of_ours():
    """And the signatures, which editors and `inspect` show, are the layer's own."""
    methods = (SegMoE.forward, SegMoE.forward_with_routing, SegMoE.step)
    ours = {name for f in (SegMoE, *methods) for name in inspect.signature(f).parameters}
    words = [word for others in validation.OTHER_NAMES.values() for word in others.split()]
    assert set(validation.OTHER_NAMES) < ours
    assert not ours & set(words)
    assert len(words) == len(set(words))
    assert list(inspect.signature(SegMoE.forward).parameters) == ["self", "x", "padding_mask"]


def raising_lines():
    """``(file, first line, last line)`` of each statement that raises a message of ours."""
    for module in CHECKED:
        path = Path(importlib.import_module(f"segmoe_kernels.{module}").__file__)
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
    for call, exception, _ in ROWS:
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


def right_call():
    experts = segmoe_kernels.FFNWeights(torch.randn(3, 6, 4), torch.randn(3, 4, 6))
    return {
        "x": torch.randn(2, 5, 4),
        "router_weight": torch.randn(3, 8),
        "experts": experts,
        "segment_size": 2,
        "padding_mask": torch.ones(2, 5, dtype=torch.bool),
        "backend": "reference",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.randn(2, 5, 4, dtype=torch.float64)},
        {"x": torch.randn(2, 5, 4).to_sparse()},
        {"router_weight": torch.randn(3, 9)},
        {"router_weight": torch.randn(3, 8, device="meta")},
        {"experts": segmoe_kernels.FFNWeights(torch.randn(3, 6, 4), torch.randn(3, 4, 7))},
        {"experts": (torch.randn(3, 6, 4), torch.randn(3, 4, 6), None, None, None, None)},
        {"padding_mask": torch.ones(2, 5)},
        {"padding_mask": torch.ones(5, 2, dtype=torch.bool)},
        {"segment_size": 2.0},
        {"top_k": True},
        {"renormalize": 1},
        {"pooling": "mean"},
        {"dropout": np.float32(1.0)},
        {"activation": ["gelu"]},
        {"backend": "nothing"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_right_call_does_not_admit_a_wrong_one(wrong):
    """Nor does the wrong one change anything."""
    call = right_call()
    functional.seg_moe(**call)
    before = call["x"].clone()
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"^segmoe_kernels\."):
            functional.seg_moe(**call | wrong)
    assert torch.equal(call["x"], before)


def test_a_call_is_checked_once_and_lengths_take_no_memory(monkeypatch):
    checked = []
    check = functional.check_layer
    monkeypatch.setattr(functional, "check_layer", lambda *a: checked.append(a) or check(*a))
    monkeypatch.setattr(functional, "_CHECKED", {})
    monkeypatch.setattr(functional, "_MOST_CHECKED", 8)
    call = right_call() | {"padding_mask": None}
    for _ in range(2):
        functional.seg_moe(**call)
    assert len(checked) == 1
    with torch.autocast("cpu", torch.bfloat16):  # weights of other dtypes
        functional.seg_moe(**call)
    assert len(checked) == 2
    for length in range(1, 30):
        functional.seg_moe(**call | {"x": torch.randn(1, length, 4)})
    assert len(checked) == 2
    for size in range(1, 30):
        weight = torch.randn(3, 4 * size)
        functional.seg_moe(**call | {"router_weight": weight, "segment_size": size})
        assert len(functional._CHECKED) <= 8
