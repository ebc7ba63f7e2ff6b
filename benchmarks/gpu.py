"""Everything that needs a GPU, in steps that can be stopped and go on later.

    python -m benchmarks.gpu [--step NAME,...] [--deadline SECONDS]      (also: make gpu)

Steps, in order:

* ``clock``: the modelled clock beside the measured one, kernel by kernel -> clock.json
* ``tests``: every test, those marked ``gpu`` first -> tests.json
* ``ceilings``: copy rate and GEMM rate of the device -> ceilings.json
* ``layer``: the headline shapes beside every peer, routed part and whole layer, uniform and skewed
  routing, eager and CUDA graph; memory -> layer.json
* ``compiled``: the same for the peers under ``torch.compile``
* ``tune``: the search for tiles -> tune.json
* ``stages``: microbenchmarks of each stage, by pytest-benchmark -> stages.json
* ``llm``, ``paper``, ``grid``: the other shapes -> layer.json
* ``sanitize``: the kernels under compute-sanitizer -> sanitizer.json

Each step has a deadline of its own below ten minutes and leaves its results behind when it is
stopped. A step that was finished on the same sources is not run again; one that was not goes on
with what is missing. Results go to the folder in the environment variable OUT, else to
``benchmarks/results/<device>/``, and start from what lies there. gpu.json holds the state.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import device_name, environment
from benchmarks.store import ROOT, code_version, results_folder
from tests import outcome_log

STEP_SECONDS = 540.0
# Left to a command for writing its file, before it is ended.
GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Step:
    """Commands that are run in turn, each a module of this folder with arguments.

    Attributes:
        name: for ``--step``.
        commands: words; "{deadline}" stands for the seconds that are left, "{folder}" for that of
            the results.
        quick: the same for a machine without a GPU, on tiny shapes.
    """

    name: str
    commands: tuple[str, ...]
    quick: tuple[str, ...]


_TINY = "--device cpu --shapes tiny-k2 --rounds 2 --budget 0 --deadline {deadline}"
_FAST_PEERS = "--providers segmoe,eager,grouped_mm,official"

# Compilation takes most of the time of its peers, so they come in a step of their own.
_PEERS = (
    "--providers segmoe,eager,grouped_mm,official,scattermoe,scattermoe_nosync,liger,transformers"
)
_COMPILED = "--providers segmoe,compile,grouped_mm_compile"
_STAGES = (
    "pytest benchmarks/test_stages.py -q --benchmark-only --benchmark-json={folder}/stages.json"
)
_LLM_PEERS = "--providers segmoe,grouped_mm,scattermoe,scattermoe_nosync,liger,transformers"

STEPS = (
    Step("clock", ("clock measured",), ("clock measured",)),
    Step("tests", ("tests",), ("tests",)),
    Step("ceilings", ("ceilings",), ("ceilings --device cpu --size 64 --copy-mib 1 --budget 0",)),
    Step(
        "layer",
        (
            f"layer --shapes headline --parts routed {_PEERS} --deadline {{deadline}}",
            f"layer --shapes headline --parts whole {_PEERS} --deadline {{deadline}}",
            f"layer --shapes headline --parts routed --routing skewed {_PEERS} "
            "--deadline {deadline}",
        ),
        (f"layer {_TINY} {_FAST_PEERS} --routing uniform,skewed",),
    ),
    Step("compiled", (f"layer --shapes headline {_COMPILED} --deadline {{deadline}}",), ()),
    Step("tune", ("tune --shapes headline --deadline {deadline}",), ()),
    Step("stages", (_STAGES,), (f"{_STAGES} --shapes tiny-k2 --rounds 2 -k combine",)),
    Step(
        "llm",
        (f"layer --shapes llm --parts routed {_LLM_PEERS} --limit 300 --deadline {{deadline}}",),
        (),
    ),
    Step("paper", (f"layer --shapes paper {_PEERS} --deadline {{deadline}}",), ()),
    Step("grid", (f"layer --shapes grid --parts routed {_PEERS} --deadline {{deadline}}",), ()),
    Step("sanitize", ("sanitize --deadline {deadline}",), ()),
)
QUICK_TESTS = ("tests/test_losses.py",)


def _command(words: str, deadline_s: float, folder: Path, *, quick: bool) -> list[str]:
    module, *rest = words.format(deadline=f"{deadline_s:.0f}", folder=folder).split()
    if module == "tests":
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "tests.outcome_log"]
        # Compilation of the kernels takes most of the time, and the processors do it side by side.
        if not quick and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
        return command + list(QUICK_TESTS if quick else ())
    if module == "pytest":
        return [sys.executable, "-m", module, *rest]
    if module == "sanitize":
        return [sys.executable, "tests/sanitize.py", *rest, "--out", str(folder)]
    return [sys.executable, "-m", f"benchmarks.{module}", *rest, "--out", str(folder)]


def _run(command: list[str], folder: Path, limit_s: float) -> int | None:
    """Run a command, for so long at most; return its exit status, None if it was ended."""
    root = Path(__file__).resolve().parents[1]
    log = {outcome_log.VARIABLE: str(folder / "tests.json"), "OUT": str(folder)}
    process = subprocess.Popen(command, cwd=root, env={**os.environ, **log}, start_new_session=True)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        for sign in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_SECONDS / 2)
        return None


class _State:
    """gpu.json: what became of each step."""

    def __init__(self, folder: Path, seed: Path) -> None:
        self.path = folder / "gpu.json"
        self.steps: dict[str, dict[str, Any]] = {}
        for source in (self.path, seed / "gpu.json"):
            if source.exists():
                self.steps = json.loads(source.read_text(encoding="utf-8"))["steps"]
                break

    def is_done(self, name: str, code: str) -> bool:
        step = self.steps.get(name, {})
        return step.get("status") == "done" and step.get("code") == code

    def write(self, name: str, **facts: Any) -> None:
        self.steps[name] = facts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment(), "steps": self.steps}, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")


def _run_step(step: Step, folder: Path, limit_s: float, *, quick: bool) -> tuple[str, list[Any]]:
    """Run the commands of a step; return its status and their exit statuses."""
    started, statuses = time.monotonic(), []
    for words in step.quick if quick else step.commands:
        left = limit_s - (time.monotonic() - started)
        if left < GRACE_SECONDS:
            return "stopped", statuses
        command = _command(words, left - GRACE_SECONDS, folder, quick=quick)
        print(f"$ {' '.join(command[1:])}", flush=True)
        statuses.append(_run(command, folder, left))
        if statuses[-1] is None:
            return "stopped", statuses
    # A command that stops itself at its deadline has used it up.
    stopped = time.monotonic() - started > limit_s - 3 * GRACE_SECONDS
    if stopped:
        return "stopped", statuses
    return ("failed" if any(statuses) else "done"), statuses


def _seed(folder: Path, kept: Path) -> None:
    """Start from the results of earlier runs."""
    if folder.resolve() == kept.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source, target = kept / "tests.json", folder / "tests.json"
    if source.exists() and not target.exists():
        target.write_bytes(source.read_bytes())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", default=",".join(names), metavar="NAME,...", help="which ones")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), metavar="SECONDS", help="of all steps"
    )
    parser.add_argument(
        "--step-deadline", type=float, default=STEP_SECONDS, metavar="SECONDS", help="of each"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few tests, few peers")
    parser.add_argument("--again", action="store_true", help="run steps that are done, too")
    parser.add_argument("--out", metavar="FOLDER", help="of the results")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    args = parser.parse_args(arguments)
    chosen = args.step.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--step must name {', '.join(names)}, got {unknown[0]!r}")
    if args.list:
        print("\n".join(names))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: --device cpu --quick exercises the steps without one")
        return 1
    quick = args.quick or args.device == "cpu"
    started, code = time.monotonic(), code_version()
    folder = results_folder(args.device, args.out).absolute()
    kept = ROOT / device_name(args.device)
    _seed(folder, kept)
    state, bad = _State(folder, kept), 0
    for step in (step for step in STEPS if step.name in chosen):
        if state.is_done(step.name, code) and not args.again:
            print(f"== {step.name}: already done", flush=True)
            continue
        left = args.deadline - (time.monotonic() - started)
        if left < 2 * GRACE_SECONDS:
            print(f"== stopped at the deadline, before {step.name}", flush=True)
            break
        print(f"== {step.name}", flush=True)
        if quick and not step.quick:
            print("needs a GPU: skipped", flush=True)
            continue
        begun = time.monotonic()
        state.write(step.name, status="started", code=code)
        status, statuses = _run_step(step, folder, min(args.step_deadline, left), quick=quick)
        seconds = time.monotonic() - begun
        state.write(step.name, status=status, code=code, time_s=seconds, exit_statuses=statuses)
        print(f"== {step.name}: {status} after {seconds:.0f} s", flush=True)
        bad += status == "failed"
    print(f"results in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
