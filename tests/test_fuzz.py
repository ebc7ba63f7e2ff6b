"""Random layers, both backends against float64; `make fuzz` runs 5,000."""

import collections
import json

import fuzz
import pytest

pytest.importorskip("triton")

PARTS = 2


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, PARTS))]
)
def test_random_layers_agree_with_float64(part):
    """15 examples a part, in parallel processes; the report is of 5,000."""
    seen = collections.Counter()
    fuzz.run(15, seen, part)
    assert seen["examples"] >= 14


def test_the_fuzz_report_is_of_5000_examples_without_failure():
    report = json.loads((fuzz.REPORTS / "fuzz.json").read_text())
    assert report["seen"]["examples"] >= 4900  # a part may find its last ones drawn before
    assert not report["failures"]
    assert report["code"]
    page = (fuzz.REPORTS / "fuzz.md").read_text()
    assert page == fuzz.render(report), "run: python tests/fuzz.py --page"
