r"""Host time of a call, without a GPU: see the package's docstring for what is not in it.

    python -m benchmarks.host table [--cases "no shared expert" reference] [--json FILE]
    python -m benchmarks.host profile [--case "no shared expert"] [--pass "forward + backward"]

``table``: this package's calls and those of the peers, in turns, each over the official loop's.
``profile``: where the microseconds of one of our calls go.
"""

from benchmarks.host import stub

if __name__ == "__main__" and (reason := stub.missing()) is not None:
    raise SystemExit(f"skipped: benchmarks.host {reason}")
LIBRARY = stub.install()

import argparse  # noqa: E402  triton is imported by what follows
import os  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.common import write_json  # noqa: E402
from benchmarks.host.calls import CASES, DTYPES, PASSES, PROVIDERS, calls_of, measure  # noqa: E402
from benchmarks.host.parts import profile  # noqa: E402

YARDSTICK = "official"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="beside the peers")
    table.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    table.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    table.add_argument("--json", help="write rows there")
    parts = commands.add_parser("profile", help="by part")
    parts.add_argument("--case", default=next(iter(CASES)), choices=CASES)
    parts.add_argument("--pass", default=PASSES[-1], choices=PASSES, dest="passed")
    for command in (table, parts):
        command.add_argument("--dtype", default="bf16", choices=DTYPES)
        command.add_argument("--rounds", type=int, default=200)
    return parser


def _rows(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    load = os.getloadavg()[0]
    calls, skipped = calls_of(CASES[case], DTYPES[options.dtype], options.providers)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", flush=True)
    timings = measure(calls, rounds=options.rounds)
    rows = []
    for (name, passed), timing in timings.items():
        before = LIBRARY.stub_launches()
        calls[name, passed]()
        rows.append(
            {
                "case": case,
                "pass": passed,
                "provider": name,
                "us": [round(1e3 * t, 1) for t in timing.quartiles()],
                "over_official": round(timing.ratio(timings[YARDSTICK, passed]), 3),
                "rounds": options.rounds,
                "load": [round(load, 1), round(os.getloadavg()[0], 1)],
                "triton_launches": LIBRARY.stub_launches() - before,
            }
        )
    return rows


def _table(options: argparse.Namespace) -> None:
    print(f"{'case':26}{'pass':20}{'provider':19}{'us':>7}{'/ official':>12}{'launches':>10}")
    rows = []
    for case in options.cases:
        for row in _rows(case, options):
            rows.append(row)
            us, ratio = row["us"][1], row["over_official"]
            words = f"{case:26}{row['pass']:20}{row['provider']:19}"
            print(f"{words}{us:7.0f}{ratio:12.2f}{row['triton_launches']:10}", flush=True)
    if options.json:
        write_json(rows, options.json)


def _profile(options: argparse.Namespace) -> None:
    key = ("segmoe", options.passed)
    found = profile(CASES[options.case], DTYPES[options.dtype], key, calls=options.rounds)
    print(f"{'part':44}{'times':>6}{'us':>8}")
    for part, times, us in found:
        print(f"{part:44}{times:6}{us:8.1f}")
    print(f"{'all':50}{sum(us for *_, us in found):8.1f}")


if __name__ == "__main__":
    OPTIONS = _parser().parse_args()
    {"table": _table, "profile": _profile}[OPTIONS.command](OPTIONS)
