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


def test_pairs_are_all_combinations_newest_first():
    found = matrix.pairs(["2.9", "2.10"], ["3.6", "3.5"])
    assert [matrix.split(pair) for pair in found] == [
        ("2.10", "3.6"),
        ("2.10", "3.5"),
        ("2.9", "3.6"),
        ("2.9", "3.5"),
    ]


def test_releases_are_all_known_ones_unless_named():
    assert matrix.releases("", matrix.TORCH) == list(matrix.TORCH)
    assert matrix.releases("2.10, 2.9,2.10", matrix.TORCH) == ["2.9", "2.10"]
    with pytest.raises(ValueError, match=r"two numbers such as 2\.9, got '2\.9\.1'"):
        matrix.releases("2.9.1", matrix.TORCH)


def test_a_result_is_kept_unless_asked_again():
    rows = {"a": row_of("2.13.0", "3.7.1"), "b": {"reason": "does not install"}}
    assert matrix.wanted(rows, ["a", "b", "c"], again=False) == ["b", "c"]
    assert matrix.wanted(rows, ["a", "b", "c"], again=True) == ["a", "b", "c"]


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


def test_code_is_compiled_beside_the_newest_torch_that_ran():
    rows = {
        "torch 2.13, triton 3.5": {"reason": "does not install"},
        "torch 2.9, triton 3.5": row_of("2.9.1", "3.5.1"),
        "torch 2.10, triton 3.5": row_of("2.10.0", "3.5.1"),
    }
    assert matrix.newest_with("3.5", report(pairs=rows)) == "torch 2.10, triton 3.5"
    assert matrix.newest_with("3.6", report(pairs=rows)) is None


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


def test_a_step_that_fails_is_written_down_and_ends_nothing(tmp_path):
    def step(pair):
        raise matrix.Fault(f"{pair} is not to be had")

    path = tmp_path / "versions.json"
    found = matrix.Matrix(report(), path, tmp_path, pip=None, cuda=False)
    found.attempt("pairs", "torch 2.9, triton 3.5", step, "this")
    reason = {"torch 2.9, triton 3.5": {"reason": "this is not to be had"}}
    assert json.loads(path.read_text())["pairs"] == reason
    assert "| 2.9 | 3.5 | | | | | this is not to be had |" in path.with_suffix(".md").read_text()


def test_modules_and_report_are_current():
    for name in matrix.MODULES:
        assert (matrix.ROOT / "tests" / f"test_{name}.py").is_file(), name
    committed = json.loads(matrix.REPORT.read_text(encoding="utf-8"))
    assert matrix.REPORT.with_suffix(".md").read_text(encoding="utf-8") == matrix.render(committed)
