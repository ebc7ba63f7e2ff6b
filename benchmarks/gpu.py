"""Everything that needs a GPU, in twelve minutes: stages in order of worth, stopped at any moment.

    python -m benchmarks.gpu [SECONDS]      on the GPU (also: make gpu); the default is 720
    python -m benchmarks.gpu rehearse       before that, without one (also: make rehearsal)

* ``smoke``: every kernel against float64, twice; one layer under compute-sanitizer -> smoke.json
* ``clock``: copy and GEMM rates; each kernel beside its modelled time; a refit -> clock.json
* ``peers``: routed part and whole layer beside every peer, eager and CUDA graph -> layer.json
* ``tiles``: the search for tiles, for the kernels that cost most -> tune.json
* ``tests``: those marked ``gpu``, then those of kernels, most telling first -> tests.json
* ``rest``: shapes of language models, ETTh1, the other shapes, all of compute-sanitizer

A stage has a limit of its own, and what it measured stays when it is stopped. The next call goes on
with what is missing on the same sources: stages that were not reached first, then those that met
their limit. Results go to the folder in the environment variable OUT, else to
``benchmarks/results/<device>/``, and start from what lies there; a copy is kept in ``build/gpu``.
gpu.json has the state, with hits and misses of the cache of kernels.

The rehearsal runs the same commands on `benchmarks.host.rehearsal`: all shapes, all launches, no
arithmetic, few rounds. It fills ``build/gpu/kernels.tar.gz`` with every kernel that they compile,
and is run with the Python, torch and triton of the machine that has the GPU, or the kernels are of
no use there. A second one finds all kernels and says what each stage would take:
``benchmarks/results/rehearsal.json``, of which nothing was measured on a GPU.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_cache
from benchmarks.common import device_name, environment
from benchmarks.store import ROOT, code_version, results_folder
from tests import outcome_log

# Left to a command for writing its file, before it is ended.
GRACE_SECONDS = 10.0
REPOSITORY = Path(__file__).resolve().parents[1]
BUILD = REPOSITORY / "build" / "gpu"
KERNELS, KEPT, FILE = BUILD / "kernels.tar.gz", BUILD / "results", "gpu.json"
NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Stage:
    """Commands that are run in turn.

    Attributes:
        name: of it.
        limit_s: for all of them.
        commands: words for Python's ``-m``; "{left}" stands for the seconds that are left,
            "{jobs}" for processes side by side.
    """

    name: str
    limit_s: float
    commands: tuple[str, ...]


_PEERS = "segmoe,grouped_mm,scattermoe,scattermoe_nosync,eager,official,transformers"
_LAYER = f"benchmarks.layer --providers {_PEERS} --budget 0.5 --limit 60 --deadline {{left}}"
_COMPILE = "--providers segmoe,compile,grouped_mm_compile --modes eager"
_PYTEST = "pytest -q -p tests.outcome_log -n {jobs}"
# Collecting all files takes long, and one that asks for what is not installed would stop the rest.
GPU_TESTS = ("numbers", "triton_layer", "in_processes", "stats")
TELLING = ("triton_layer", "routed", "experts", "route", "permute", "grouped_gemm", "grouped_ffn")
TELLING += ("combine", "shared", "partials", "numbers", "stage_properties", "precision", "compile")

STAGES = (
    Stage(
        "smoke",
        60,
        ("benchmarks.smoke", "tests.sanitize --tools memcheck --layers 1 --deadline {left}"),
    ),
    Stage("clock", 120, ("benchmarks.ceilings --budget 0.3", "benchmarks.clock measured")),
    Stage(
        "peers",
        240,
        (
            f"{_LAYER} --shapes 128-4-1-5-1e5",
            f"{_LAYER} --shapes 64-4-1-5-1e6,256-4-1-5-1e5 --parts routed",
            f"{_LAYER} {_COMPILE} --shapes 128-4-1-5-1e5 --parts routed",
            f"{_LAYER} --shapes 64-4-1-5-1e6,256-4-1-5-1e5 --parts whole",
            f"{_LAYER} --shapes 128-4-1-5-1e5 --parts routed --routing skewed",
        ),
    ),
    Stage(
        "tiles",
        180,
        ("benchmarks.tune --shapes 128-4-1-5-1e5,64-4-1-5-1e6 --budget 0.1 --deadline {left}",),
    ),
    Stage(
        "tests",
        120,
        (
            f"{_PYTEST} -m gpu {' '.join(f'tests/test_{name}.py' for name in GPU_TESTS)}",
            f"{_PYTEST} -m not&gpu {' '.join(f'tests/test_{name}.py' for name in TELLING)}",
        ),
    ),
    Stage(
        "rest",
        540,
        (
            f"{_LAYER} --shapes llm --parts routed",
            "benchmarks.etth1",
            f"{_LAYER} --shapes 128-8-2-5-1e6,weather-base-p4",
            "tests.sanitize --deadline {left}",
        ),
    ),
)
# Appended in a rehearsal, by the command's module: no time is worth anything there.
_FEW = "--budget 0 --rounds 2"
REHEARSED = {
    "benchmarks.ceilings": "--budget 0 --size 64 --copy-mib 1",
    "benchmarks.layer": f"{_FEW} --limit 3600",
    "benchmarks.tune": f"{_FEW} --most 3",
    "tests.sanitize": "--work",
    "pytest": "--collect-only",
    "benchmarks.etth1": "--epochs 1 --train-fraction 0.02 --val-stride 500 --test-stride 500",
}


def command_of(words: str, left_s: float, *, rehearsed: bool) -> list[str]:
    """The command line of a stage's words."""
    jobs = min(8, max(1, (os.cpu_count() or 1) // 2))
    module, *rest = words.format(left=f"{left_s:.0f}", jobs=jobs).split()
    extra = REHEARSED.get(module, "").split() if rehearsed else []
    return [sys.executable, "-m", module, *(w.replace("&", " ") for w in rest), *extra]


def run_command(words: str, folder: Path, limit_s: float, *, rehearsed: bool) -> dict[str, Any]:
    """Run one command of a stage, for so long at most.

    Args:
        words: as in `Stage`.
        folder: of the results.
        limit_s: seconds; it is told of `GRACE_SECONDS` less.
        rehearsed: without a GPU.

    Returns:
        ``command, exit_status`` (None if it was ended), ``time_s``, ``cpu_s`` and how many kernels
        were a ``hit`` or a ``miss``.
    """
    command = command_of(words, limit_s - GRACE_SECONDS, rehearsed=rehearsed)
    print(f"$ {' '.join(command[2:])}", flush=True)
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        begun, used = time.monotonic(), _cpu_s()
        variables = {**os.environ, **_variables(folder, log.name, rehearsed=rehearsed)}
        status = _wait(command, variables, limit_s)
        asked = Counter(line.split()[0] for line in log)
    spent = {"time_s": time.monotonic() - begun, "cpu_s": _cpu_s() - used}
    said = {"command": words, "exit_status": status, **{k: round(v, 1) for k, v in spent.items()}}
    return {**said, **{what: asked[what] for what in ("hit", "miss")}}


def _cpu_s() -> float:
    """Processor time of what was waited for: others on the machine don't count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _wait(command: list[str], variables: dict[str, str], limit_s: float) -> int | None:
    # What has a limit is ended with all that it started.
    session = limit_s < NO_LIMIT
    process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, start_new_session=session)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        for sign in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_SECONDS / 2)
        return None


def _variables(folder: Path, log: str, *, rehearsed: bool) -> dict[str, str]:
    found = {
        outcome_log.VARIABLE: str(folder / "tests.json"),
        kernel_cache.LOG: log,
        "OUT": str(folder),
        "PYTHONPATH": str(REPOSITORY),
        "TRITON_CACHE_DIR": str(BUILD / "triton"),
        "TRITON_CACHE_MANAGER": "benchmarks.kernel_cache:Carried",
    }
    # Text of a kernel on its way to machine code is for those who read it.
    return found | ({"GPU_REHEARSAL": "1", "TRITON_STORE_BINARY_ONLY": "1"} if rehearsed else {})


class Run:
    """One call on a GPU: where it writes, what is left, what became of each stage.

    Args:
        seconds: for all stages.
        folder: of the results.
    """

    def __init__(self, seconds: float, folder: Path) -> None:
        self.ends = time.monotonic() + seconds
        self.folder, self.code = folder, code_version()
        source = KEPT if KEPT.is_dir() else ROOT / device_name("cuda")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FILE).exists():
            _copy(source, folder)
        self.stages: dict[str, Any] = {}
        if (folder / FILE).exists():
            self.stages = json.loads((folder / FILE).read_text(encoding="utf-8"))["stages"]

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def todo(self) -> list[Stage]:
        """What is not done on these sources, those that met their limit last."""

        def status(stage: Stage) -> str:
            known = self.stages.get(stage.name, {})
            return str(known["status"]) if known.get("code") == self.code else ""

        found = [stage for stage in STAGES if status(stage) not in {"done", "failed"}]
        return sorted(found, key=lambda stage: status(stage) == "stopped")

    def run(self, stage: Stage) -> str:
        """Run the commands of a stage; return its status.

        That is "done", or "failed" where a command was not content; "stopped" at the stage's limit,
        or "cut" at that of the call.
        """
        limit = time.monotonic() + min(stage.limit_s, self.left())
        ended = "cut" if self.left() < stage.limit_s else "stopped"
        commands: list[dict[str, Any]] = []
        for words in stage.commands:
            left = limit - time.monotonic()
            if left < 2 * GRACE_SECONDS:
                break
            self._write(stage, "started", commands)
            commands.append(run_command(words, self.folder, left, rehearsed=False))
        statuses = [command["exit_status"] for command in commands]
        # A command that stops itself at its deadline has used it up.
        whole = limit - time.monotonic() > GRACE_SECONDS and len(statuses) == len(stage.commands)
        status = ("failed" if any(statuses) else "done") if whole else ended
        self._write(stage, status, commands)
        return status

    def _write(self, stage: Stage, status: str, commands: list[dict[str, Any]]) -> None:
        self.stages[stage.name] = {"code": self.code, "status": status, "commands": commands}
        text = json.dumps({"environment": environment(), "stages": self.stages}, indent=1)
        (self.folder / FILE).write_text(text + "\n", encoding="utf-8")
        _copy(self.folder, KEPT)


def _copy(source: Path, target: Path) -> None:
    """Copy results, not what was made of them."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        shutil.copy(path, target)


def run(seconds: float) -> int:
    """Run the stages on the GPU; the exit status is 1 if one of them failed."""
    with contextlib.ExitStack() as stack:
        if not kernel_cache.unpack(KERNELS, BUILD):
            # Kernels of another Triton: this machine's processors compile while the GPU works.
            words = [sys.executable, "-m", "benchmarks.gpu", "compile"]
            with_them = subprocess.Popen(words, cwd=REPOSITORY, start_new_session=True)
            stack.callback(os.killpg, with_them.pid, signal.SIGKILL)
        folder = results_folder("cuda").absolute()
        call, failed = Run(seconds, folder), False
        while (todo := call.todo()) and call.left() > 3 * GRACE_SECONDS:
            print(f"== {todo[0].name}, {call.left():.0f} s are left", flush=True)
            status = call.run(todo[0])
            failed |= status == "failed"
            print(f"== {todo[0].name}: {status}", flush=True)
    print(f"results in {folder}; left to do: {', '.join(s.name for s in call.todo()) or 'nothing'}")
    return int(failed)


def compile_kernels() -> None:
    """Rehearse for the kernels alone, several commands side by side."""
    words = [words for stage in STAGES for words in stage.commands]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        each = functools.partial(run_command, limit_s=NO_LIMIT, rehearsed=True)
        list(pool.map(lambda item: each(item[1], Path(folder, str(item[0]))), enumerate(words)))


def rehearse(out: Path) -> int:
    """Run every command without a GPU and say what came of it.

    Args:
        out: of the report.

    Returns:
        1 if a command failed, or a row of ours.
    """
    stages, bad = {}, 0
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), []
        for stage in STAGES:
            commands = []
            for words in stage.commands:
                said = run_command(words, folder, NO_LIMIT, rehearsed=True)
                rows = [row for path in sorted(folder.glob("*.json")) for row in _rows(path)]
                added = [row for row in rows if row not in before]
                failed = [row for row in added if "failed" in row or "refused" in row]
                timed = _timed_s(words, added)
                commands.append({**said, "rows": len(added), "failed": failed, "timed_s": timed})
                before, bad = rows, bad + (said["exit_status"] != 0) + len(failed)
                stages[stage.name] = {
                    "limit_s": stage.limit_s,
                    "estimated_s": _estimated_s(commands),
                    "commands": commands,
                }
                text = {"rehearsal": True, "environment": environment(), "stages": stages}
                out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
            kernel_cache.pack(BUILD, KERNELS)  # what there is, should the rest be stopped
    print(f"{KERNELS}: {KERNELS.stat().st_size / 2**20:.1f} MiB; report in {out}")
    return int(bad > 0)


def _estimated_s(commands: list[dict[str, Any]]) -> float | None:
    """What the host takes here and what is timed; None where it took time to compile."""
    if any(command["miss"] for command in commands):
        return None
    return round(sum(command["cpu_s"] + command["timed_s"] for command in commands), 1)


def _rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    return found


def _timed_s(words: str, rows: list[dict[str, Any]]) -> float:
    """Seconds of timed calls that a command's budget would take on a GPU."""
    budget = re.search(r"--budget ([\d.]+)", words)
    keys = ("configuration", "pass", "mode")  # in which providers take turns
    groups = {tuple(row[key] for key in keys) for row in rows if "time_median_ms" in row}
    return round(len(groups) * float(budget[1]), 1) if budget else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="720", help="seconds, rehearse or compile")
    what = parser.parse_args(arguments).what
    if what == "rehearse":
        return rehearse(ROOT / "rehearsal.json")
    if what == "compile":
        compile_kernels()
        return 0
    if not torch.cuda.is_available():
        print("no GPU here: python -m benchmarks.gpu rehearse")
        return 1
    return run(float(what))


if __name__ == "__main__":
    sys.exit(main())
