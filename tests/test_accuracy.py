"""The accuracy budget: a few runs of each case here, and the committed report of many."""

import json

import accuracy
import pytest
import report_code

pytest.importorskip("triton")

REPORT = json.loads((accuracy.REPORTS / "accuracy.json").read_text())


def marks(dtype, options, size):
    """Layers of several tiles in float32 and bfloat16; the rest takes minutes."""
    chosen = size == "beyond two tiles" and dtype != "float16"
    return [] if chosen and options == "plain" else pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "options", "size"),
    [
        pytest.param(*case, id="-".join(case), marks=marks(*case))
        for case in accuracy.cases()
        if case[2] != "one step"
    ],
)
def test_outputs_and_gradients_are_within_the_accuracy_budget(dtype, options, size, device):
    """One step has too few numbers for one run; the report has 24 of them."""
    runs = accuracy.RUNS[size] if size == "one tile" else 1
    errors = accuracy.measure(dtype, options, size, runs=runs, device=device)
    assert len(errors) >= 5
    assert not accuracy.faults(dtype, errors, "one run" if runs == 1 else "all runs")


def test_the_accuracy_report_is_within_the_budget():
    found = {(c["dtype"], c["options"], c["size"]): c["errors"] for c in REPORT["cases"]}
    assert list(found) == list(accuracy.cases())
    for (dtype, _, size), errors in found.items():
        assert not accuracy.faults(dtype, errors, accuracy.limit_of(size))


def test_the_accuracy_report_is_of_its_numbers_and_knows_their_code():
    page = (accuracy.REPORTS / "accuracy.md").read_text()
    assert page == accuracy.render(REPORT), "run: python tests/accuracy.py --page"
    now = report_code.digests()
    assert set(now) >= {"stages/route/kernels.py", "_triton/ffn.py", "reference/experts.py"}
    assert report_code.changed_since(now) == []
    before = {**now, "reference/experts.py": "0" * 12, "stages/gone.py": "1" * 12}
    del before["_triton/ffn.py"]
    changed = ["_triton/ffn.py", "reference/experts.py", "stages/gone.py"]
    assert report_code.changed_since(before) == changed


@pytest.mark.parametrize("key", ["rms", "max"])
def test_the_accuracy_budget_notices_errors(key):
    errors = dict(REPORT["cases"][-1]["errors"])
    name = next(iter(errors))
    for wrong in (4 * errors[name][f"eager_{key}"] + 0.1 * errors[name]["size_rms"], float("nan")):
        assert accuracy.faults("bfloat16", {name: {**errors[name], key: wrong}}, "one run")
