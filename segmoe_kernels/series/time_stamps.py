"""Time stamps of a series: gaps, doubled ones, and those that go back."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_CLOCK = r"(?P<hour>\d{1,2}):(?P<minute>\d\d)(:(?P<second>\d\d(\.\d+)?))?( ?(?P<half>[AaPp])[Mm])?"
_DAY = (
    r"(?P<year>\d{4})([-/.](?P<month>\d{1,2})([-/.](?P<day>\d{1,2}))?|(?P<mm>\d\d)(?P<dd>\d\d))"
    r"|(?P<one>\d{1,2})(?P<mark>[-/.])(?P<two>\d{1,2})[-/.](?P<last>\d{4})"
)
_ZONE = r"( ?(Z|UTC|(?P<zone>[+-]\d\d):?(?P<quarter>\d\d)))?"
_STAMP = re.compile(rf"({_DAY})([T ] ?{_CLOCK}{_ZONE})?", re.ASCII)
_TIME = re.compile(_CLOCK, re.ASCII)
_EPOCH = datetime(1970, 1, 1)


def matches(text: str) -> bool:
    """Whether this is a date, a time of the day, or both."""
    return bool(_STAMP.fullmatch(text) or _TIME.fullmatch(text))


def irregularities(columns: Mapping[str, Sequence[Any]], lines: Sequence[int]) -> list[str]:
    """What is unusual about the time stamps of a series, as sentences; none if they rise equally.

    Columns by name are in parts, lists of text or arrays of numbers; a date in one and the time of
    the day in another are taken together. ``lines`` are the rows' numbers in the file.
    """
    stamps = clock = None
    dated = True
    for column in columns.values():
        if all(isinstance(part, np.ndarray) for part in column):
            numbers = np.concatenate(column)
            found = _seconds([f"{number:.15g}" for number in numbers])
            days = bool(np.isfinite(found).all())
            found = found if days else numbers
        else:
            cells = [str(cell).strip() for part in column for cell in part]
            clocks = [_TIME.fullmatch(cell) for cell in cells]
            if all(clocks):
                clock = np.array([_of_day(found) for found in clocks if found])
                continue
            found, days = _seconds(cells), True
        if stamps is None:
            stamps, dated = found, days
    if stamps is None:
        names = ", ".join(map(repr, columns))
        return [f"Time stamps were not checked: {names} has no date."] if columns else []
    if clock is not None and not (stamps % 86400).any():
        stamps = stamps + clock
    bad = np.flatnonzero(~np.isfinite(stamps))
    if len(bad):
        return [f"Time stamps were not checked: that of row {lines[bad[0]]} can't be read."]
    return _faults(stamps, lines, dated)


def _faults(stamps: Array, lines: Sequence[int], dated: bool) -> list[str]:
    """Descending order, steps back, doubled stamps and gaps."""

    def length(amount: float) -> str:
        return str(timedelta(seconds=float(amount))) if dated else f"{amount:g}"

    steps = np.diff(stamps)
    said = []
    if len(steps) and (steps <= 0).all() and (steps < 0).any():
        said.append("Time stamps descend: the series runs backwards.")
        steps = -steps
    for fault, what in (((steps < 0), "earlier than"), ((steps == 0), "the same as")):
        rows = np.flatnonzero(fault)
        if len(rows):
            first = lines[rows[0] + 1]
            said.append(
                f"{len(rows)} time stamps are {what} the one before, the first in row {first}."
            )
    forward, counts = np.unique(steps[steps > 0], return_counts=True)
    if len(forward):
        usual = forward[counts.argmax()]
        gaps = np.flatnonzero(steps > 1.5 * usual)
        if len(gaps):
            longest = gaps[steps[gaps].argmax()]
            said.append(
                f"{len(gaps)} gaps in the time stamps, the longest of {length(steps[longest])} "
                f"before row {lines[longest + 1]}; the usual step is {length(usual)}."
            )
    return said


def _seconds(cells: Sequence[str]) -> Array:
    """Seconds since 1970; NaN where a cell is no date, or which number is the day is open."""
    found = [_STAMP.fullmatch(cell) for cell in cells]
    pairs = [(int(m["one"]), int(m["two"])) for m in found if m and m["one"]]
    day_first = any(one > 12 for one, _ in pairs) or any(m and m["mark"] == "." for m in found)
    month_first = any(two > 12 for _, two in pairs)
    if pairs and day_first == month_first:
        return np.full(len(cells), np.nan)
    return np.array([np.nan if m is None else _since_1970(m, day_first) for m in found])


def _since_1970(stamp: re.Match[str], day_first: bool) -> float:
    if stamp["one"]:
        day, month = (stamp["one"], stamp["two"]) if day_first else (stamp["two"], stamp["one"])
        year = stamp["last"]
    else:
        year, month = stamp["year"], stamp["month"] or stamp["mm"]
        day = stamp["day"] or stamp["dd"] or "1"
    try:
        days = datetime(int(year), int(month), int(day)) - _EPOCH
    except ValueError:
        return float("nan")
    zone = int(stamp["zone"] or 0) * 3600
    zone += int(f"{(stamp['zone'] or '+')[0]}{stamp['quarter'] or 0}") * 60
    return days.total_seconds() + (_of_day(stamp) if stamp["hour"] else 0.0) - zone


def _of_day(clock: re.Match[str]) -> float:
    """Seconds since midnight."""
    hour = int(clock["hour"])
    if clock["half"]:
        hour = hour % 12 + 12 * (clock["half"].lower() == "p")
    return hour * 3600 + int(clock["minute"]) * 60 + float(clock["second"] or 0)
