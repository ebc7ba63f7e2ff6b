"""The command line that the side-by-side measurements share.

One process for each configuration, so that none inherits another's memory, compiled code or
autotuning; rows are written after each, so that a run that is stopped keeps what it had and the
next one goes on from there. A configuration is a workload, a part of the layer, a routing, a dtype
and a device; its providers, passes and modes are measured in the one process, in turns.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES, PARTS, ROUTINGS
from benchmarks.common import device_name, environment
from benchmarks.shapes import Workload, find_workloads
from benchmarks.store import ROOT, Store, code_version, results_folder

__all__ = ["Configuration", "Emit", "Options", "Suite", "run_suite"]

PASSES = ("forward", "forward+backward")
MODES = ("eager", "graph")
# A configuration that can't even start in this time is left for the next run.
LEAST_SECONDS = 20.0

Emit = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What one process measures."""

    suite: str
    workload: str
    part: str
    routing: str
    dtype: str
    device: str
    dropout: float = 0.0

    @property
    def key(self) -> str:
        """Names it in rows."""
        words = [self.workload, self.part, self.routing, self.dtype]
        if self.dropout:
            words.append(f"dropout {self.dropout:g}")
        return "/".join(words)

    def find_workload(self) -> Workload:
        """The shape and the kind of expert."""
        return find_workloads(self.workload)[0]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured of each configuration, and for how long.

    Attributes:
        providers: names; which there are depends on the suite.
        passes: of `PASSES`.
        modes: of `MODES`.
        budget_s: seconds of timed calls for each pass and mode.
        rounds: the least number of timed calls.
        tf32: let float32 products round their operands to TF32.
    """

    providers: tuple[str, ...]
    passes: tuple[str, ...] = PASSES
    modes: tuple[str, ...] = ("eager",)
    budget_s: float = 1.0
    rounds: int = 10
    tf32: bool = False

    def identities(self) -> Iterator[dict[str, str]]:
        """Every provider, pass and mode."""
        for provider, passed, mode in itertools.product(self.providers, self.passes, self.modes):
            yield {"provider": provider, "pass": passed, "mode": mode}


@dataclasses.dataclass(frozen=True)
class Suite:
    """One of the measurements.

    Attributes:
        name: of its module and result file.
        parts: those measured unless told otherwise.
        providers: what ``--providers`` can name.
        passes: what ``--passes`` can name.
        modes: what ``--modes`` can name.
        measure: runs one configuration and hands out its rows.
        line: formats a row's numbers.
    """

    name: str
    parts: tuple[str, ...]
    providers: tuple[str, ...]
    passes: tuple[str, ...]
    modes: tuple[str, ...]
    measure: Callable[[Configuration, Options, Emit], None]
    line: Callable[[dict[str, Any]], str]


def run_suite(suite: Suite, description: str, arguments: list[str] | None = None) -> int:
    """Run the command line of a suite.

    Args:
        suite: what to run.
        description: for ``--help``.
        arguments: else those of the process.

    Returns:
        The exit status: 1 if this package's own results were refused or failed, else 0.
    """
    args = _parser(suite, description).parse_args(arguments)
    on_gpu = args.device == "cuda"
    args.shapes = args.shapes or ("headline" if on_gpu else "tiny")
    args.dtype = args.dtype or (("bfloat16",) if on_gpu else ("float32",))
    args.modes = args.modes or (suite.modes if on_gpu else suite.modes[:1])
    if args.worker:
        job = json.loads(args.worker)
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in job["options"].items()}
        _work(suite, Configuration(**job["configuration"]), Options(**options), Path(args.rows))
        return 0
    return _Run(suite, args).run()


def _parser(suite: Suite, description: str) -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)

    def choices(
        flag: str, allowed: tuple[str, ...], default: tuple[str, ...] | None, text: str
    ) -> None:
        def parse(value: str) -> tuple[str, ...]:
            names = tuple(value.split(","))
            for name in names:
                if name not in allowed:
                    raise argparse.ArgumentTypeError(f"choose from {', '.join(allowed)}")
            return names

        parser.add_argument(flag, type=parse, default=default, metavar="NAME,...", help=text)

    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cuda", "cpu"))
    parser.add_argument(
        "--shapes", help="groups or names in shapes.py (default: headline, or tiny)"
    )
    choices("--dtype", tuple(DTYPES), None, ", ".join(DTYPES))
    choices("--parts", PARTS, suite.parts, ", ".join(PARTS))
    choices("--routing", ROUTINGS, ("uniform",), ", ".join(ROUTINGS))
    parser.add_argument(
        "--dropout",
        type=lambda text: [float(word) for word in text.split(",")],
        default=[0.0],
        metavar="P,...",
        help="of the hidden layers, in training",
    )
    choices("--passes", suite.passes, suite.passes, ", ".join(suite.passes))
    choices("--modes", suite.modes, None, ", ".join(suite.modes))
    choices("--providers", suite.providers, suite.providers, ", ".join(suite.providers))
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", dest="budget_s")
    parser.add_argument("--rounds", type=int, default=10, help="least timed calls (default: 10)")
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32")
    parser.add_argument(
        "--limit", type=float, default=150.0, metavar="SECONDS", help="of a configuration"
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="of the whole run")
    parser.add_argument("--out", metavar="FOLDER", help="of the result file")
    parser.add_argument("--fresh", action="store_true", help="drop what the file holds")
    parser.add_argument("--retry", action="store_true", help="measure anew what failed")
    parser.add_argument("--list", action="store_true", help="print the configurations and stop")
    parser.add_argument("--in-process", action="store_true", help="start no process (debugging)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    return parser


class _Run:
    """The parent: goes through the configurations and keeps the file."""

    def __init__(self, suite: Suite, args: argparse.Namespace) -> None:
        self.suite, self.args = suite, args
        self.started = time.monotonic()
        self.code = code_version()
        self.options = Options(
            providers=args.providers,
            passes=args.passes,
            modes=args.modes,
            budget_s=args.budget_s,
            rounds=args.rounds,
            tf32=args.tf32,
        )
        file = f"{suite.name}.json"
        self.store = Store(
            results_folder(args.device, args.out) / file,
            seed=ROOT / device_name(args.device) / file,
            fresh=args.fresh,
        )

    def configurations(self) -> list[Configuration]:
        """All that the arguments ask for."""
        args = self.args
        product = itertools.product(
            find_workloads(args.shapes), args.parts, args.routing, args.dtype, args.dropout
        )
        return [
            Configuration(
                self.suite.name, workload.name, part, routing, dtype, args.device, dropout
            )
            for workload, part, routing, dtype, dropout in product
        ]

    def run(self) -> int:
        """Measure what is not in the file yet."""
        todo = self.configurations()
        if self.args.list:
            print("\n".join(configuration.key for configuration in todo))
            return 0
        print("  ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
        bad = 0
        for index, configuration in enumerate(todo):
            if self._is_done(configuration):
                print(f"{configuration.key}: already measured", flush=True)
                continue
            left = self._seconds_left()
            if left < LEAST_SECONDS:
                print(f"stopped at the deadline: {len(todo) - index} configurations left")
                break
            print(f"{configuration.key}:", flush=True)
            rows = self._measure(configuration, min(self.args.limit, left))
            self.store.add(rows)
            bad += sum(
                row["provider"].startswith("segmoe") and ("refused" in row or "failed" in row)
                for row in rows
            )
        print(f"wrote {self.store.path}", flush=True)
        return 1 if bad else 0

    def _seconds_left(self) -> float:
        if self.args.deadline is None:
            return float("inf")
        return self.args.deadline - (time.monotonic() - self.started)

    def _is_done(self, configuration: Configuration) -> bool:
        return all(
            self.store.has(
                (configuration.key, *identity.values()), self.code, retry=self.args.retry
            )
            for identity in self.options.identities()
        )

    def _measure(self, configuration: Configuration, limit_s: float) -> list[dict[str, Any]]:
        if self.args.in_process:
            rows: list[dict[str, Any]] = []
            _measure_all(self.suite, configuration, self.options, rows.append)
            return rows
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.json")
            why = _run_worker(self.suite, configuration, self.options, path, limit_s)
            rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if why is None or (why == "stopped" and limit_s < self.args.limit):
            # Cut off by the deadline: the next run measures what is missing.
            return rows
        if why == "stopped":
            why = f"took longer than {limit_s:.0f} s"
        print(f"  {why}", flush=True)
        there = {(row["provider"], row["pass"], row["mode"]) for row in rows}
        common = _common(configuration)
        return rows + [
            {**common, **identity, "failed": why}
            for identity in self.options.identities()
            if tuple(identity.values()) not in there
        ]


def _run_worker(
    suite: Suite, configuration: Configuration, options: Options, path: Path, limit_s: float
) -> str | None:
    """Measure in a process of its own; say what went wrong, "stopped" for the time limit."""
    job = {
        "configuration": dataclasses.asdict(configuration),
        "options": dataclasses.asdict(options),
    }
    command = [sys.executable, "-m", f"benchmarks.{suite.name}"]
    command += ["--worker", json.dumps(job), "--rows", str(path)]
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        command,
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # With the compilers that it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "stopped"
    if process.returncode:
        sys.stderr.write(errors)
        lines = errors.strip().splitlines() or ["no message"]
        return f"exit status {process.returncode}: {lines[-1][:300]}"
    return None


def _work(suite: Suite, configuration: Configuration, options: Options, path: Path) -> None:
    """The child: write the rows after each of them."""
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(rows), encoding="utf-8")
        partial.replace(path)

    _measure_all(suite, configuration, options, keep)


def _common(configuration: Configuration) -> dict[str, Any]:
    """What all rows of a configuration say."""
    workload = configuration.find_workload()
    found = environment()
    kept = ("commit", "torch", "triton", "gpu", "cuda")
    return {
        "configuration": configuration.key,
        **dataclasses.asdict(configuration),
        "device": device_name(configuration.device),
        "shape": str(workload.shape),
        "steps": workload.shape.steps,
        **dataclasses.asdict(workload.shape),
        "gated": workload.gated,
        "activation": workload.activation,
        "code": code_version(),
        **{key: found[key] for key in kept if key in found},
    }


def _measure_all(suite: Suite, configuration: Configuration, options: Options, keep: Emit) -> None:
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    common = _common(configuration)

    def emit(row: dict[str, Any]) -> None:
        full = {**common, **row}
        print(f"  {_line(suite, full)}", flush=True)
        keep(full)

    suite.measure(configuration, options, emit)


def _line(suite: Suite, row: dict[str, Any]) -> str:
    head = f"{row['provider']:<20}{row['pass']:<18}{row['mode']:<7}"
    for why in ("skipped", "refused", "failed"):
        if why in row:
            return f"{head}{why}: {row[why]}"
    return head + suite.line(row)
