"""The version matrix: which pairs are run, how results are read, and that its report is current."""

import json

import matrix
import pytest

RESULT = """<testsuites><testsuite>
<testcase classname="tests.test_route" name="test_a[1]" time="0.6"/>
<testcase classname="tests.test_route" name="test_a[2]" time="0.7">
<failure message="triton.runtime.errors.InterpreterError: ValueError('no such mask')"/></testcase>
<testcase classname="tests.test_route" name="test_b" time="0.1">
<failure message="InterpreterError: InterpreterError(&quot;ValueError('no such mask')&quot;)"/>
</testcase>
<testcase classname="tests.test_route" name="test_c" time="0"><skipped message="why"/></testcase>
<testcase classname="tests.test_route" name="test_d" time="0"><error message="assert 1 | 2"/>
</testcase></testsuite></testsuites>"""


def report(**tables):
    return {**matrix.fresh(every=1), **tables}


def row_of(torch, triton, **fields):
    row = {"torch": torch, "triton": triton, "numpy": "2.4.6", "passed": 3, "failed": 0}
    return {**row, "skipped": 0, "failures": {}, **fields}


def test_every_test_function_is_chosen_and_each_nth_of_its_parameters():
    ids = ["m::f[0]", "m::f[1]", "m::g", "m::f[2]", "m::f[3]", "n::f[0]"]
    assert matrix.chosen(ids, 3) == ["m::f[0]", "m::f[3]", "m::g", "n::f[0]"]
    assert sorted(matrix.chosen(ids, 1)) == sorted(ids)


@pytest.mark.parametrize(
    ("requirements", "cuda", "triton"),
    [
        (["filelock", "nvidia-nccl-cu12==2.27.5", 'triton==3.5.1; x == "y"'], True, "3.5.1"),
        (["cuda-toolkit[cublas]==13.0.3", "triton~=3.8.0; python_version < '3'"], True, "~=3.8.0"),
        (["filelock", "optree>=0.13.0; extra == 'optree'"], False, None),
    ],
    ids=["nvidia", "toolkit", "cpu"],
)
def test_a_wheel_is_judged_by_what_it_requires(requirements, cuda, triton):
    assert matrix.needs_cuda(requirements) is cuda
    assert matrix.own_triton(requirements) == triton


def test_results_are_counted_and_grouped_by_cause():
    assert matrix.counts(RESULT) == {
        "passed": 1,
        "failed": 3,
        "skipped": 1,
        "failures": {
            "ValueError: no such mask": ["test_route::test_a[2]", "test_route::test_b"],
            "assert 1 | 2": ["test_route::test_d"],
        },
        "seconds": 1,
    }


def test_table_joins_what_does_not_install_and_names_causes():
    failures = {"assert 1 | 2": ["m::f", "m::g"]}
    rows = {
        "torch 2.13, triton 3.6": row_of("2.13.0", "3.6.0", failed=2, failures=failures),
        "torch 2.13, triton 3.7": row_of("2.13.0", "3.7.1"),
        "torch 2.9, triton 3.6": {"reason": "only with CUDA"},
        "torch 2.9, triton 3.7": {"reason": "only with CUDA"},
    }
    lines = matrix.render(report(pairs=rows)).splitlines()
    first = lines.index("|---|---|---|--:|--:|--:|---|") + 1
    assert lines[first : first + 4] == [
        "| 2.13.0 | 3.7.1 | 2.4.6 | 3 | 0 | 0 | |",
        "| 2.13.0 | 3.6.0 | 2.4.6 | 3 | 2 | 0 | 2: assert 1 \\| 2 |",
        "| 2.9 | 3.6, 3.7 | | | | | only with CUDA |",
        "",
    ]


def test_modules_and_report_are_current():
    for name in matrix.MODULES:
        assert (matrix.ROOT / "tests" / f"test_{name}.py").is_file(), name
    committed = json.loads(matrix.REPORT.read_text(encoding="utf-8"))
    assert matrix.REPORT.with_suffix(".md").read_text(encoding="utf-8") == matrix.render(committed)
