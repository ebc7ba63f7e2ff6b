"""Search for better tiles: what `_triton.tiles` should say, measured.

    python -m benchmarks.tune [--shapes 128-4-1-5-1e5] [--deadline SECONDS]
                              [--write tiles.json]

For each workload, the functions of the table that its calls ask are found and, those whose kernels
take most first, changed one value at a time (block sizes by 2, warps, stages), the rest as shipped;
a change that is correct and faster is kept and the search goes on from there. Every candidate has
to pass the criterion of the `gate`. Rows hold the time of the pass that the function serves. A
candidate that does not compile or is wrong is a row too. A search that was stopped goes on from the
rows of the same sources.

``--write`` puts the winners into a file, beside those of earlier searches; SEGMOE_TILES=tiles.json
makes the kernels take them. The shipped table is edited by hand, with the row beside it.
"""

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import DTYPES, make_case
from benchmarks.common import device_name, environment
from benchmarks.gate import Gate
from benchmarks.layer import calls, describe
from benchmarks.peers import Provider, route_ids
from benchmarks.profiles import kernel_rows
from benchmarks.shapes import Workload, find_workloads
from benchmarks.store import ROOT, Store, code_version, results_folder
from benchmarks.timing import Clock, summary, time_interleaved
from segmoe_kernels import SegMoE

Tile = Any
# A winner has to be this much faster: less is within the noise of the clocks.
MARGIN = 0.98


def _table() -> Any:
    # All that ask it, too: a module imported under a replacement would keep that for good.
    import segmoe_kernels.stages.whole  # noqa: F401
    from segmoe_kernels._triton import tiles

    return tiles


def _replaceable_fields() -> dict[str, tuple[str, ...]]:
    from segmoe_kernels._triton import tuned

    _table()  # fills it
    return tuned.replaceable_fields()


@contextlib.contextmanager
def overridden(name: str, replacement: Callable[..., Tile]) -> Iterator[None]:
    """Put a function in the place of one of the table's, wherever it was imported to."""
    from segmoe_kernels._triton.tape import forget

    original = getattr(_table(), name)
    places = [
        module
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("segmoe_kernels") and getattr(module, name, None) is original
    ]

    def put(function: Callable[..., Tile]) -> None:
        for module in places:
            setattr(module, name, function)
        forget()  # what is played back was decided before

    put(replacement)
    try:
        yield
    finally:
        put(original)


class Asked(NamedTuple):
    """What a call wanted to know of one function of the table.

    Attributes:
        tile: the answer.
        questions: as `segmoe_kernels._triton.tuned.question` words them.
    """

    tile: Tile
    questions: frozenset[str]


def asked_functions(run: Callable[[], object]) -> dict[str, Asked]:
    """Which functions of the table a call asks, and what they say.

    Args:
        run: the call.

    Returns:
        Function -> `Asked`; those that answer differently in one call are left out, since one
        replacement can't stand for both.
    """
    from segmoe_kernels._triton import tuned

    answers: dict[str, set[Tile]] = {}
    questions: dict[str, set[str]] = {}

    def spy(name: str, original: Callable[..., Tile]) -> Callable[..., Tile]:
        def ask(*args: Any, **kwargs: Any) -> Tile:
            tile = original(*args, **kwargs)
            if tile is not None:
                asked = tuned.question(original, *args, **kwargs)
                answers.setdefault(name, set()).add(tile)
                questions.setdefault(name, set()).add(asked)
            return tile

        return ask

    with contextlib.ExitStack() as stack:
        for name in _replaceable_fields():
            stack.enter_context(overridden(name, spy(name, getattr(_table(), name))))
        run()
    return {
        name: Asked(next(iter(tiles)), frozenset(questions[name]))
        for name, tiles in answers.items()
        if len(tiles) == 1
    }


# What may be tried, by field; block sizes and the like go by factors of two.
_RANGES = {
    "block_m": (16, 256),
    "block_n": (16, 256),
    "block_k": (16, 128),
    "num_warps": (2, 16),
    "num_stages": (1, 5),
}


def neighbours(tile: Tile, fields: Iterable[str]) -> Iterator[Tile]:
    """Tiles that differ from this one in one value: sizes and warps by 2, stages by 1.

    Args:
        tile: of any kind.
        fields: what may differ; those that the tile does not have are passed over.
    """
    for field in fields:
        value = getattr(tile, field, 0)
        if value <= 0:
            continue
        least, most = _RANGES[field]
        values = (value - 1, value + 1) if field == "num_stages" else (value // 2, 2 * value)
        for other in values:
            if least <= other <= most:
                yield tile._replace(**{field: other})


def fault_of(path: Path) -> ValueError | None:
    """Why winners could not be put into a file; None if they can."""
    from segmoe_kernels._triton import tuned

    try:
        if path.exists():
            tuned.read_tiles(str(path))
    except ValueError as error:
        return error
    return None


def write_tiles(path: Path, arch: str, questions: Iterable[str], fields: dict[str, int]) -> None:
    """Put a winner into a file for SEGMOE_TILES; what else is in it stays.

    Args:
        path: of the file; its folder is made.
        arch: whose tiles they are.
        questions: that the winner answers.
        fields: of it.

    Raises:
        ValueError: if the file holds what no search writes.
    """
    from segmoe_kernels._triton import tuned

    tiles = dict(tuned.read_tiles(str(path))) if path.exists() else {}
    mine = tiles.get(arch, {})
    for asked in questions:
        mine = {**mine, asked: {**mine.get(asked, {}), **fields}}
    tiles[arch] = dict(sorted(mine.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: the search may be stopped at any moment.
    partial = path.with_name(path.name + ".partial")
    text = json.dumps({"environment": environment(), "tiles": tiles}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def costliest(functions: Iterable[str], profiled: Iterable[dict[str, Any]]) -> list[str]:
    """The functions of the table whose kernels take most, first.

    Args:
        functions: names of them, ``<kernel>_tile``.
        profiled: rows of `profiles.kernel_rows`.
    """
    spent = dict.fromkeys(functions, 0.0)
    for row in profiled:
        kernel = row["kernel"].strip("_")
        mine = [name for name in spent if kernel.startswith(name.removesuffix("_tile"))]
        if mine:
            spent[max(mine, key=len)] += row["time_us"]
    return sorted(spent, key=lambda name: -spent[name])


def search(
    workload: Workload,
    layer: SegMoE,
    inputs: Any,
    emit: Callable[[dict[str, Any]], None],
    *,
    seconds_left: Callable[[], float],
    budget_s: float,
    only: str = "",
    most: int | None = None,
    rounds: int = 10,
    keep: Callable[[Iterable[str], dict[str, int]], None] = lambda *_: None,
    known: Callable[[str, str], dict[str, Any] | None] = lambda *_: None,
) -> None:
    """Tune the functions that a layer's forward and backward ask.

    Args:
        workload: for the rows.
        layer: on its device.
        inputs: x and dy.
        emit: gets a row for each candidate.
        seconds_left: the search stops when it says 0 or less.
        budget_s: seconds of timed calls for each candidate.
        only: names of functions have to hold this.
        most: candidates of each function; None is no limit.
        rounds: the least number of timed calls.
        keep: gets the questions that a winner answers, and the fields in which it differs.
        known: function and tile, in words -> the row that an earlier search made of them.
    """
    provider = Provider("segmoe", layer, layer, lambda x: route_ids(layer, x), dict, ours=True)
    gate, clock = Gate(layer, inputs), Clock(inputs.x.device)
    run = calls(provider, inputs, "forward+backward")
    asked = asked_functions(run)
    for name in costliest(asked, kernel_rows(run, clock.device)):
        if only not in name:
            continue
        shipped, questions = asked[name]
        passed = "forward" if "fwd" in name else "forward+backward"
        function = calls(provider, inputs, passed)
        identity = {"provider": "segmoe", "pass": passed, "mode": "eager", "function": name}

        def timed(tile: Tile, name: str = name, function: Any = function) -> dict[str, Any]:
            if (row := known(name, _words(tile))) is not None:
                return row
            with overridden(name, lambda *_, **__: tile):
                gate.check(provider)
                timings = time_interleaved(
                    {"it": function}, clock, budget_s=budget_s, least_rounds=rounds
                )
            return summary(timings["it"])

        best, seen, count = shipped, {shipped}, 0
        numbers = timed(shipped)
        shipped_ms = least = numbers["time_median_ms"]
        emit({**identity, "tile": _words(shipped), "shipped": True, **numbers})
        fields = _replaceable_fields()[name]
        queue = list(neighbours(best, fields))
        while queue and seconds_left() > 0 and (most is None or count < most):
            tile = queue.pop(0)
            if tile in seen:
                continue
            seen.add(tile)
            count += 1
            row = {**identity, "tile": _words(tile), "shipped": False}
            try:
                numbers = timed(tile)
            except Exception as error:  # does not compile, or is wrong
                emit({**row, "failed": describe(error)})
                continue
            if "failed" in numbers:
                continue
            found = numbers["time_median_ms"]
            emit({**row, **numbers, "time_over_shipped": found / shipped_ms})
            if found < MARGIN * least:
                best, least = tile, found
                queue = list(neighbours(best, fields))
        if best != shipped:
            keep(questions, {f: getattr(best, f) for f in fields})
        print(f"{workload.name} {name}: {_words(best)} (shipped {_words(shipped)})", flush=True)


def _words(tile: Tile) -> str:
    return " ".join(f"{key}={value}" for key, value in tile._asdict().items())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device_type, choices=("cuda", "cpu"))
    parser.add_argument("--shapes", default="headline", help="groups or names in shapes.py")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--only", default="", metavar="TEXT", help="functions whose name has TEXT")
    parser.add_argument("--budget", type=float, default=0.2, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=10, help="least timed calls (default: 10)")
    parser.add_argument("--most", type=int, metavar="N", help="candidates of a function")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--out", metavar="FOLDER", help="of the result file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="winners, for SEGMOE_TILES")
    args = parser.parse_args(arguments)
    if args.write is not None and (fault := fault_of(args.write)) is not None:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    started = time.monotonic()
    print("  ".join(f"{key} {value}" for key, value in environment().items()))
    device = torch.device(args.device)
    store = Store(
        results_folder(device, args.out) / "tune.json",
        seed=ROOT / device_name(device) / "tune.json",
    )
    code, done = code_version(), 0

    def left() -> float:
        return args.deadline - (time.monotonic() - started)

    for workload, part in itertools.product(find_workloads(args.shapes), ("routed",)):
        if left() <= 0:
            print("stopped at the deadline")
            break
        layer, inputs = make_case(
            workload, part=part, routing="uniform", dtype=DTYPES[args.dtype], device=device
        )
        if device.type == "cpu":
            layer.backend = "triton"  # the interpreter's times mean nothing, its results do
        prefix = f"{workload.name}/{part}/uniform/{args.dtype}"

        def emit(row: dict[str, Any], prefix: str = prefix) -> None:
            nonlocal done
            done += 1
            key = f"{prefix}/{row['function']}/{row['tile']}"
            row = {"configuration": key, "device": device_name(device), "code": code, **row}
            store.add([row])
            what = row.get("failed") or f"{row['time_median_ms']:.4f} ms"
            print(f"  {row['function']:<24} {row['tile']}: {what}", flush=True)

        def known(function: str, tile: str, prefix: str = prefix) -> dict[str, Any] | None:
            mine = (r for r in store.rows if r["configuration"] == f"{prefix}/{function}/{tile}")
            return next((row for row in mine if row["code"] == code), None)

        def keep(questions: Iterable[str], fields: dict[str, int]) -> None:
            from segmoe_kernels._triton.tile_table import architecture

            if args.write is not None:
                write_tiles(args.write, architecture(), questions, fields)

        try:
            search(
                workload,
                layer,
                inputs,
                emit,
                seconds_left=left,
                budget_s=args.budget,
                only=args.only,
                most=args.most,
                rounds=args.rounds,
                keep=keep,
                known=known,
            )
        except RuntimeError as error:
            print(f"skipped {workload.name}: {describe(error)}", flush=True)
    print(f"wrote {done} rows to {store.path}")
    if args.write is not None and args.write.exists():
        print(f"to use the winners: SEGMOE_TILES={args.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
