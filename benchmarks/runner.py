"""The command line of `layer`: configurations, processes, deadlines and the result file.

One process for each configuration, so that none inherits another's memory, compiled code or
autotuning; rows are written after each, so that a run that is stopped keeps what it had and the
next one goes on from there. A configuration is a workload, a part of the layer, a routing, a dtype
and a device; its providers, passes and modes are measured in the one process, in turns.
"""

import argparse
import contextlib
import dataclasses
import functools
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
from typing import Any, Protocol

import torch

from benchmarks.cases import DTYPES, PARTS, ROUTINGS
from benchmarks.common import device_name, environment
from benchmarks.peers import PROVIDERS
from benchmarks.shapes import Workload, find_workloads
from benchmarks.store import ROOT, Store, code_version, results_folder

PASSES = ("forward", "forward+backward")
MODES = ("eager", "graph")
FILE = "layer.json"
# A configuration that can't even start in this time is left for the next run.
LEAST_SECONDS = 20.0

Emit = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What one process measures."""

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
        providers: names in `peers`.
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


class Measure(Protocol):
    """Runs one configuration and hands out its rows."""

    def __call__(self, configuration: Configuration, options: Options, emit: Emit) -> None:
        """Measure."""


def run(
    measure: Measure,
    line: Callable[[dict[str, Any]], str],
    description: str,
    arguments: list[str] | None = None,
) -> int:
    """Run the command line.

    Args:
        measure: what is done with a configuration.
        line: formats a row's numbers.
        description: for ``--help``.
        arguments: else those of the process.

    Returns:
        The exit status: 1 if this package's own results were refused or failed, else 0.
    """
    args = _parser(description).parse_args(arguments)
    on_gpu = args.device == "cuda"
    args.shapes = args.shapes or ("headline" if on_gpu else "tiny")
    args.dtype = args.dtype or (("bfloat16",) if on_gpu else ("float32",))
    args.modes = args.modes or (MODES if on_gpu else MODES[:1])
    if args.worker:
        job = json.loads(args.worker)
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in job["options"].items()}
        chosen = Configuration(**job["configuration"]), Options(**options)
        _work(functools.partial(_measure_all, measure, line, *chosen), Path(args.rows))
        return 0
    return _Run(functools.partial(_measure_all, measure, line), args).run()


def _parser(description: str) -> argparse.ArgumentParser:
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
    choices("--parts", PARTS, PARTS, ", ".join(PARTS))
    choices("--routing", ROUTINGS, ("uniform",), ", ".join(ROUTINGS))
    parser.add_argument(
        "--dropout",
        type=lambda text: [float(word) for word in text.split(",")],
        default=[0.0],
        metavar="P,...",
        help="of the hidden layers, in training",
    )
    choices("--passes", PASSES, PASSES, ", ".join(PASSES))
    choices("--modes", MODES, None, ", ".join(MODES))
    choices("--providers", tuple(PROVIDERS), tuple(PROVIDERS), ", ".join(PROVIDERS))
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

    def __init__(self, measure: Callable[..., None], args: argparse.Namespace) -> None:
        self.measure, self.args = measure, args
        self.started = time.monotonic()
        self.code = code_version()
        names = [field.name for field in dataclasses.fields(Options)]
        self.options = Options(**{name: getattr(args, name) for name in names})
        self.store = Store(
            results_folder(args.device, args.out) / FILE,
            seed=ROOT / device_name(args.device) / FILE,
            fresh=args.fresh,
        )

    def configurations(self) -> list[Configuration]:
        """All that the arguments ask for."""
        args = self.args
        product = itertools.product(
            find_workloads(args.shapes), args.parts, args.routing, args.dtype, args.dropout
        )
        return [
            Configuration(workload.name, part, routing, dtype, args.device, dropout)
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
            self.measure(configuration, self.options, rows.append)
            return rows
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.json")
            why = _run_worker(configuration, self.options, path, limit_s)
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
    configuration: Configuration, options: Options, path: Path, limit_s: float
) -> str | None:
    """Measure in a process of its own; say what went wrong, "stopped" for the time limit."""
    job = {
        "configuration": dataclasses.asdict(configuration),
        "options": dataclasses.asdict(options),
    }
    command = [sys.executable, "-m", "benchmarks.layer"]
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


def _work(measure: Callable[[Emit], None], path: Path) -> None:
    """The child: write the rows after each of them."""
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(rows), encoding="utf-8")
        partial.replace(path)

    measure(keep)


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


def _measure_all(
    measure: Measure,
    line: Callable[[dict[str, Any]], str],
    configuration: Configuration,
    options: Options,
    keep: Emit,
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    common = _common(configuration)

    def emit(row: dict[str, Any]) -> None:
        head = f"{row['provider']:<20}{row['pass']:<18}{row['mode']:<7}"
        why = [f"{key}: {row[key]}" for key in ("skipped", "refused", "failed") if key in row]
        print(f"  {head}{why[0] if why else line(row)}", flush=True)
        keep({**common, **row})

    measure(configuration, options, emit)
