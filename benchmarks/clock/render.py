"""Tables of modelled rows in Markdown, for `report`."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
PEER = "scattermoe"
LAUNCHES = (1, 2)


def is_modelled(rows: Sequence[Row]) -> bool:
    """Whether a file's rows are the clock's."""
    return any(row.get("kind") == "layer" and "pass" in row for row in rows)


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown; the first column is text, the others numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(words) + " |" for words in [head, rule, *lines])


def sections(rows: Sequence[Row]) -> list[str]:
    """Tables of layers, of what bounds them, of the checks and of the sensitivity.

    Args:
        rows: of ``results/clock/<arch>.json``.
    """
    layers = [row for row in rows if row["kind"] == "layer" and "pass" in row]
    parts = [_layers(layers, launch_us) for launch_us in LAUNCHES] if layers else []
    if layers:
        parts.append(_bounds(layers))
    if checks := [row for row in rows if row["kind"] == "check"]:
        parts.append(_checks(checks))
    if moved := [row for row in rows if row["kind"] == "sensitivity" and "pass" in row]:
        parts.append(_sensitivity(moved))
    return parts


def _us(row: Row, launch_us: int) -> float:
    us: float = row[f"modelled_us_with_{launch_us}us_launches"]
    return us


def _layers(rows: Sequence[Row], launch_us: int) -> str:
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    ours = [name for name in providers if name != PEER]
    head = ["shape, D-E-k-P-rows", *(f"{name} fwd / bwd" for name in providers)]
    if PEER in providers:
        head += [f"{PEER} / {name}, fwd and both" for name in ours]
    lines = []
    for shape in dict.fromkeys(row["configuration"] for row in rows):
        times = {
            name: [_us(r, launch_us) for r in rows if (r["configuration"], r["provider"]) == key]
            for name in providers
            for key in [(shape, name)]
        }
        cells = [" / ".join(f"{us:.0f}" for us in times[name]) for name in providers]
        peer = times.get(PEER)
        for name in ours if PEER in providers else ():
            ratios = ""
            if peer and times[name]:
                ratios = f"{peer[0] / times[name][0]:.2f}, {sum(peer) / sum(times[name]):.2f}"
            cells.append(ratios)
        lines.append([shape, *cells])
    title = f"## Layers, modelled us, {launch_us} us a launch"
    return f"{title}\n\n{table(head, lines)}"


def _bounds(rows: Sequence[Row]) -> str:
    """The three longest launches of each pass of ours, with what bounds each."""
    lines = []
    for row in rows:
        if row["provider"] == PEER:
            continue
        longest = sorted(row["calls"], key=lambda call: -call["modelled_us"])[:3]
        words = [
            f"{call['name'].removesuffix('_kernel')} {call['modelled_us']:.0f} ({call['bound']})"
            for call in longest
        ]
        label = f"{row['configuration']} {row['provider']} {row['pass']}"
        lines.append([label, f"{row['launches']}", ", ".join(words)])
    head = ["layer", "launches", "longest, modelled us (bound)"]
    return f"## What bounds them, modelled\n\n{table(head, lines)}"


def _checks(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        published = row["published"]
        if isinstance(published, list):
            published = f"{published[0]} to {published[1]}"
        lines.append(
            [f"{row['configuration']}, {row['unit']}", str(published), f"{row['modelled']}"]
        )
    head = ["", "published", "modelled"]
    return f"## The model against published times\n\n{table(head, lines)}"


def _sensitivity(rows: Sequence[Row]) -> str:
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    lines = []
    for key in dict.fromkeys((r["configuration"], r["provider"], r["pass"]) for r in rows):
        mine = {
            row["machine"]: f"{_us(row, 1):.0f}"
            for row in rows
            if (row["configuration"], row["provider"], row["pass"]) == key
        }
        lines.append([" ".join(key), *(mine.get(machine, "") for machine in machines)])
    title = "## What moves with numbers from memory, modelled us, 1 us a launch"
    return f"{title}\n\n{table(['layer', *machines], lines)}"
