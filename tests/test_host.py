"""Host time of our call beside that of the official loop, in a process of its own without a GPU."""

import json

import pytest
from benchmark_runs import rows_of
from programs import run_python

from benchmarks.host import stub

pytestmark = pytest.mark.skipif(
    stub.missing() is not None, reason=f"benchmarks.host {stub.missing()}"
)
# Over the official loop's time, in the same turns: a third above what was measured.
LIMITS = {
    ("no shared expert", "infer"): 0.4,
    ("no shared expert", "forward + backward"): 0.4,
    ("shared expert", "infer"): 0.85,
    ("shared expert", "forward + backward"): 1.0,
    ("reference", "infer"): 1.9,
    ("reference", "forward + backward"): 1.6,
}


def run_host(*words):
    return run_python("-m", "benchmarks.host", *words).stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    cases = dict.fromkeys(case for case, _ in LIMITS)
    words = ["--cases", *cases, "--providers", "segmoe", "official", "--rounds", "80"]
    run_host("table", *words, "--json", str(folder / "host.json"))
    return {(row["case"], row["pass"], row["provider"]): row for row in rows_of(folder, "host")}


@pytest.mark.parametrize(("case", "passed"), LIMITS)
def test_a_call_takes_no_more_of_the_host_than_it_may(rows, case, passed):
    assert rows[case, passed, "official"]["over_official"] == 1
    assert rows[case, passed, "segmoe"]["over_official"] < LIMITS[case, passed]


def test_launches_are_counted(rows):
    infer, both = (rows["no shared expert", p, "segmoe"] for p in ("infer", "forward + backward"))
    assert infer["triton_launches"] == 3  # route, permute, experts
    assert both["triton_launches"] > infer["triton_launches"]
    assert rows["reference", "infer", "segmoe"]["triton_launches"] == 0


def test_a_profile_names_parts_of_a_call():
    lines = run_host("profile", "--rounds", "20").splitlines()
    parts = {line[:44].strip(): float(line.split()[-1]) for line in lines[1:]}
    assert {"tapes: keys", "tapes: played", "checks"} < parts.keys()
    assert parts.pop("all") == pytest.approx(sum(parts.values()), abs=1)
    assert all(us > 0 for us in parts.values())


@pytest.mark.parametrize("words", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=str)
def test_launches_that_are_played_back_are_tritons_own(words):
    """In `replay_worker`: the same launches, nothing new for new lengths, seen by who watches."""
    said = run_python("tests/replay_worker.py", *words).stdout.splitlines()
    assert json.loads(said[-1])["launches"] > 100
