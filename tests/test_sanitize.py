"""`sanitize`: what it asks of compute-sanitizer, and what it makes of the answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize

pytest.importorskip("triton")

# Stands for compute-sanitizer: says what the test tells it to, and runs nothing.
FAKE = """#!{python}
import json, sys
answers = json.loads({answers!r})
arguments = sys.argv[1:]
tool = arguments[arguments.index("--tool") + 1]
kind = "planted" if "--plant" in arguments else "layers"
text, status = answers.get(tool + " " + kind, answers["default"])
print("========= COMPUTE-SANITIZER")
print(text)
sys.exit(status)
"""
CLEAN = ["========= ERROR SUMMARY: 0 errors", 0]
FOUND = ["========= Invalid __global__ write\n========= ERROR SUMMARY: 2 errors", 9]
PLANTED = {"memcheck planted": FOUND, "initcheck planted": FOUND}


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """Run the command with a sanitizer that answers so; its exit status and results."""

    def run(**answers):
        fake = tmp_path / "compute-sanitizer"
        text = json.dumps({"default": CLEAN, **PLANTED, **answers})
        fake.write_text(FAKE.format(python=sys.executable, answers=text))
        fake.chmod(0o755)
        monkeypatch.setattr(sanitize, "run_layers", pytest.fail)
        compiled = subprocess.CompletedProcess([], 0, stdout="0 layers")
        real = subprocess.run

        def fast(command, **options):
            return compiled if command[0] == sys.executable else real(command, **options)

        monkeypatch.setattr(subprocess, "run", fast)
        words = ["--device", "cpu", "--sanitizer", str(fake), "--out", str(tmp_path)]
        status = sanitize.main(words)
        return status, json.loads((tmp_path / "sanitizer.json").read_text())["results"]

    return run


def test_sanitizer_that_finds_nothing_but_the_planted_faults_is_content(answered):
    status, results = answered()
    assert status == 0
    assert {name: row["status"] for name, row in results.items()} == {
        "memcheck planted": "found",
        "memcheck layers": "clean",
        "racecheck layers": "clean",
        "initcheck planted": "found",
        "initcheck layers": "clean",
        "synccheck layers": "clean",
    }


@pytest.mark.parametrize(
    ("name", "answer", "became"),
    [
        ("memcheck layers", FOUND, "found"),
        ("racecheck layers", ["========= RACECHECK SUMMARY: 3 hazards displayed", 0], "found"),
        ("synccheck layers", ["========= ERROR SUMMARY: 0 errors", 1], "found"),
        ("initcheck planted", CLEAN, "clean"),
        ("racecheck layers", ["Unable to find injection library", 0], "failed"),
    ],
)
def test_sanitizer_fails_where_something_is_found_missed_or_not_run(name, answer, became, answered):
    status, results = answered(**{name: answer})
    assert status == 1
    assert results[name]["status"] == became
    assert [row["good"] for row in results.values()].count(False) == 1


def test_sanitizer_says_what_is_missing(capsys, tmp_path):
    assert sanitize.main(["--sanitizer", str(tmp_path / "none")]) == 1
    assert "nvidia-cuda-sanitizer-api-cu12" in capsys.readouterr().out
    if not sanitize.torch.cuda.is_available():
        (tmp_path / "some").touch()
        assert sanitize.main(["--sanitizer", str(tmp_path / "some")]) == 1
        assert "no GPU here" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.interpreter
def test_sanitized_layers_launch_every_kernel(monkeypatch):
    """What is never launched is never looked at."""
    from benchmarks.traffic_meter import TrafficMeter

    monkeypatch.setattr(sanitize, "SHAPE", (1, 7))
    monkeypatch.setattr(sanitize, "DTYPES", ("bfloat16",))
    with TrafficMeter() as meter:
        assert sanitize.run_layers("cpu") == len(sanitize.LAYERS)
        sanitize.run_stages("cpu")
    pattern = sanitize.OURS.removeprefix("regex=")
    launched = {name for name in meter.kernels if re.match(pattern, name)}
    defined = set()
    for file in Path(sanitize.ROOT, "segmoe_kernels").rglob("*.py"):
        defined.update(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE))
    assert defined - launched == set()
