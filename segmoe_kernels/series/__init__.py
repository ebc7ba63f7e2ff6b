"""Series in CSV files: what is read, and what is said of it.

A cell is a number or it is not: nothing is guessed, skipped or filled in. Columns of time stamps
and of text are left out, and named; what else is not understood is refused with row and column.
"""

import codecs
import csv
import gzip
import io
import itertools
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from segmoe_kernels import validation as check
from segmoe_kernels.series import time_stamps

__all__ = ["SeriesTable", "read_series", "read_table"]

Array = npt.NDArray[np.float64]
# Cells of a column, one part for each block of rows; a part of numbers has forgotten its text.
Column = list[Array | list[str]]

MAX_BYTES = 1 << 30
BLOCK = 4096
# A channel that moves by less than this share of its size is constant but for rounding.
CONSTANT = 1e-9
TIME_NAMES = {"date", "datetime", "time", "timestamp", "epoch", "unix", "unixtime", "ts"}
MISSING = {"", "?", "-", "--", ".", "#n/a", "n/a", "na", "null", "none", "nat"}
MISSING |= {sign + word for sign in ("", "+", "-") for word in ("nan", "inf", "infinity")}

_PLAIN = frozenset("0123456789+-.eE \t\n")
_DIGITS = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+[.,]?[0-9]*|[.,][0-9]+)([eE][+-]?[0-9]+)?")
# Meant as a number, but programs differ in which: thousands, currencies, per cent, 1_100.
_LIKE_NUMBER = re.compile(
    r"\(?[^\w\s]?\s?[+-]?\s?[.,]?\d[\d.,'\u2019_\s]*([eEdD][+-]?\d+)?\s?[^\w\s]?\)?"
)


@dataclass(frozen=True)
class SeriesTable:
    """A series as it was read.

    Attributes:
        values: (N, C) float64, a row for each step.
        columns: C names of channels; "column 3" where the file has none.
        left_out: name of each other column, and what it holds.
        notes: what is unusual, as sentences: gaps in the time stamps, or that these were not
            checked; decimal commas.
    """

    values: Array
    columns: tuple[str, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]

    def describe(self) -> list[str]:
        """All that there is to say of the file, as sentences."""
        return [f"Channels: {_listed(self.columns)}.", *_said_of(self.left_out), *self.notes]


def read_series(path: str | PathLike[str]) -> Array:
    """Read the numbers of a CSV file; columns of text, and what `read_table` notes, are warnings.

    Args:
        path: see `read_table`, as for what is raised.

    Returns:
        (N, C) float64.
    """
    table = read_table(path)
    text = {name: what for name, what in table.left_out.items() if "text" in what}
    for note in (*_said_of(text), *table.notes):
        warnings.warn(f"{Path(path).name}: {note}", stacklevel=2)
    return table.values


def read_table(path: str | PathLike[str]) -> SeriesTable:
    """Read a CSV file: a row for each step, a column for each channel.

    Columns are separated by commas, tabs or semicolons; with the latter numbers may have decimal
    commas. Words above numbers are a header, and so is 0, 1, 2, ... above decimals, as
    pandas writes it; a word that its column has again below is a value. Left out are columns of
    dates and of text, numbers under a name such as "timestamp", and the nameless column of row
    numbers that pandas writes.

    Args:
        path: of the file, UTF-8 with or without byte order mark; gzip is known by its content.

    Returns:
        SeriesTable.

    Raises:
        OSError: if the file can't be read.
        TypeError: if path is not a path.
        ValueError: for a file in another encoding, a damaged one, one of more than 1 GiB or without
            numbers, rows of different lengths, a first row that may be names or values, and a
            missing, infinite or ambiguous value (1,234 in quotes, 45%, 1_100).
    """
    check.check_path("read_table", "path", path)
    file = Path(path)
    text = _text(file)
    delimiter = _delimiter(text)
    marks: set[str] = set()
    lines, first, columns = _read(text, delimiter, marks, file)
    kinds = [_kind(column) for column in columns]
    named = _is_header(first, columns, kinds, bool(marks), file)
    if not named:
        for column, cell in zip(columns, first, strict=True):
            column.insert(0, _part([cell], delimiter, marks))
        kinds = [_kind(column) for column in columns]
    lines = lines[named:]
    if not lines:
        _refuse("be a file with columns of numbers", f"a header alone in {file.name}")
    if len(marks) == 2:
        _refuse("have one decimal mark", f"numbers with commas and with points in {file.name}")
    names = _names(first if named else [""] * len(first))
    left: dict[str, str] = {}
    for number, (name, kind, column) in enumerate(zip(names, kinds, columns, strict=True), 1):
        for row, cell in _texts(column) if kind in {"number", "missing"} else ():
            if isinstance(_part([cell], delimiter, set()), list):
                got = f"{cell[:40]!r} in row {lines[row]}, column {number} ({name})"
                _refuse("have a number everywhere (fill gaps first)", f"{got} of {file.name}")
        # The index that pandas writes has no name.
        index = named and number == 1 and first[0].strip() in {"", "Unnamed: 0"}
        if what := _left_out(name, kind, column, index=index):
            left[name] = what
    by_name = dict(zip(names, columns, strict=True))
    used = {name: np.concatenate(by_name[name]) for name in names if name not in left}
    if not used:
        _refuse("be a file with columns of numbers", f"none in {file.name}")
    stamps = {name: by_name[name] for name, what in left.items() if what == "time stamps"}
    notes = [] if named else ["No header: the first row was read as values."]
    notes += ["Numbers have decimal commas."] if "," in marks else []
    notes += [
        f"Time stamps were not checked: those of {name!r} can't be read."
        for name, what in left.items()
        if what != "time stamps" and _is_time(name)
    ]
    notes += time_stamps.irregularities(stamps, lines)
    return SeriesTable(np.stack([*used.values()], axis=1), tuple(used), left, tuple(notes))


def unzip(content: bytes, most: int) -> bytes:
    """Unzip what is gzip by its content, and return all else as it is.

    A small file can hold more than there is memory: ValueError says so for more than ``most``
    bytes, and for a damaged file.
    """
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(content)) as stream:
                content = stream.read(most + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"a damaged gzip file ({error})") from None
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content


def constant_channels(values: Array) -> npt.NDArray[np.bool_]:
    """Which channels of (N, C) values move by less than a billionth of their size; (C,) bool."""
    constant: npt.NDArray[np.bool_] = np.ptp(values, axis=0) <= CONSTANT * np.abs(values).max(0)
    return constant


def _refuse(rule: str, got: str) -> NoReturn:
    check.fail_value("read_table", "path", rule, got)


def _text(file: Path) -> str:
    """The decoded content."""
    with file.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    try:
        content = unzip(content, MAX_BYTES)
    except ValueError as error:
        _refuse(f"be a whole file of at most {MAX_BYTES} bytes", f"{error} in {file.name}")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        _refuse("be UTF-8 text", f"UTF-16 or a binary file, {file.name}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        byte = f"the byte {content[error.start]:#04x} in row {row} of {file.name}"
        _refuse("be UTF-8 text", f"{byte}, as in Latin-1 or Windows-1252")
    return text.replace("\u2212", "-")  # the minus sign of typesetting


def _lines(text: str) -> io.StringIO:
    """Lines that end where those of a file do, and not at every separator that Unicode has."""
    return io.StringIO(text, newline="")


def _delimiter(text: str) -> str:
    """What separates columns: that which cuts the first rows alike, else a comma."""
    for candidate in ";\t":
        head = itertools.islice(_lines(text), 20)
        try:
            widths = {len(row) for row in csv.reader(head, delimiter=candidate) if row}
        except csv.Error:
            continue
        if len(widths) == 1 and max(widths) > 1:
            return candidate
    return ","


def _read(
    text: str, delimiter: str, marks: set[str], file: Path
) -> tuple[list[int], list[str], list[Column]]:
    """Number of each row in the file, the first row, and the columns below it."""
    rows = _rows(text, delimiter, file)
    line, first = next(rows, (0, []))
    if not first:
        _refuse("be a file with columns of numbers", f"nothing in {file.name}")
    lines = [line]
    columns: list[Column] = [[] for _ in first]
    while block := list(itertools.islice(rows, BLOCK)):
        for line, row in block:
            if len(row) != len(first):
                got = f"{len(row)} in row {line} of {file.name}"
                _refuse(f"have {len(first)} columns everywhere", got)
            lines.append(line)
        cells = zip(*(row for _, row in block), strict=True)
        for column, part in zip(columns, cells, strict=True):
            column.append(_part(part, delimiter, marks))
    return lines, first, columns


def _rows(text: str, delimiter: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows and their numbers in the file; empty ones are skipped at the ends only."""
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    began, empty = False, 0
    try:
        for row in reader:
            if row and empty:
                _refuse("have no empty row inside", f"row {empty} of {file.name}")
            if row:
                began = True
                yield reader.line_num, row
            elif began and not empty:
                empty = reader.line_num
    except csv.Error as error:
        _refuse("be a CSV file", f"'{error}' in row {reader.line_num} of {file.name}")


def _part(cells: Sequence[str], delimiter: str, marks: set[str]) -> Array | list[str]:
    """Cells as numbers where all of them are, and the decimal marks that these have."""
    text = "\n".join(cells)
    found = {mark for mark in ".," if mark in text}
    if set(text) - {","} <= _PLAIN and (delimiter == ";" or "," not in found):
        try:
            points = text.replace(",", ".").split("\n") if "," in found else cells
            values = np.array([float(cell) for cell in points])
        except ValueError:
            return list(cells)
        if len(values) == len(cells) and np.isfinite(values).all():
            marks |= found
            return values
    return list(cells)


def _kind(column: Column) -> str:
    """What most cells are that are not missing: "number", "time" or "text"; else "missing"."""
    counts = Counter(_kind_of_cell(cell) for _, cell in _texts(column))
    counts["number"] += sum(len(part) for part in column if isinstance(part, np.ndarray))
    known = counts.total() - counts["missing"]
    for kind in ("number", "time", "text"):
        if known and 2 * counts[kind] >= known:
            return kind
    return "text" if known else "missing"


def _texts(column: Column) -> Iterator[tuple[int, str]]:
    """Rows and cells of the parts that are not all numbers."""
    start = 0
    for part in column:
        if not isinstance(part, np.ndarray):
            yield from enumerate(part, start)
        start += len(part)


def _kind_of_cell(cell: str) -> str:
    cell = cell.strip()
    if cell.lower() in MISSING:
        return "missing"
    if time_stamps.matches(cell) and not _NUMBER.fullmatch(cell):
        return "time"
    return "number" if _LIKE_NUMBER.fullmatch(cell) else "text"


def _is_header(
    first: list[str], columns: list[Column], kinds: list[str], decimals: bool, file: Path
) -> bool:
    """Whether the first row has names, above columns of these kinds."""
    cells = [cell.strip() for cell in first]
    above = list(zip(map(_kind_of_cell, cells), kinds, strict=True))
    if ("time", "time") in above:
        return False
    if ("text", "time") in above:
        return True
    names = [cell for cell, kind in zip(cells, kinds, strict=True) if kind in {"number", "missing"}]
    repeated = (
        cell in {other.strip() for _, other in _texts(column)}
        for cell, column, pair in zip(cells, columns, above, strict=True)
        if pair == ("text", "text")
    )
    if any(map(_NUMBER.fullmatch, names)) and any(repeated):
        return False
    if ("text", "number") in above or ("text", "missing") in above:
        # Names may be whole numbers; beside a number with decimals a word is a bad cell.
        return all(_DIGITS.fullmatch(name) or not _NUMBER.fullmatch(name) for name in names)
    # pandas leaves the name of its index empty.
    corner = len(names) > 1 and cells[0] == "" and kinds[0] == "number"
    names = names[corner:]
    counted = names == [str(i) for i in range(len(names))]
    digits = ("text", "text") in above and all(map(_DIGITS.fullmatch, names))
    if not names or not (counted or digits):
        return False
    if not decimals and not corner:
        row = ", ".join(cells[:4])
        _refuse("have names in words, or none", f"{row} above whole numbers in {file.name}")
    return True


def _names(first: list[str]) -> list[str]:
    """A name of its own for each column."""
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(first, 1)]
    if len(set(names)) < len(names):
        names = [f"{name} (column {number})" for number, name in enumerate(names, 1)]
    return names


def _left_out(name: str, kind: str, column: Column, *, index: bool) -> str | None:
    """What a column holds that is no channel; None if it is one."""
    if kind == "text":
        numbers = any(isinstance(part, np.ndarray) for part in column) or any(
            _kind_of_cell(cell) == "number" for _, cell in _texts(column)
        )
        return "text and numbers" if numbers else "text"
    if kind == "time" or _is_time(name):
        return "time stamps"
    if index:
        values = np.concatenate(column)
        if (np.diff(values) > 0).all() and (values % 1 == 0).all():
            return "row numbers"
    return None


def _is_time(name: str) -> bool:
    """Whether it is a name of time stamps, but for a unit; one with digits is a channel's."""
    return re.sub(r"[(\[].*|[\W_]", "", name.lower()) in TIME_NAMES


def _said_of(left_out: dict[str, str]) -> list[str]:
    left = [f"{name} ({what})" for name, what in left_out.items()]
    return [f"Left out: {_listed(left)}."] if left else []


def _listed(names: Sequence[str]) -> str:
    """The first of many names, and how many more."""
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
