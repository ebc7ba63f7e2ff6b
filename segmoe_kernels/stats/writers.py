"""Routing statistics into files: a CSV with a row for each entry, and TensorBoard."""

import csv
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import Tensor

from segmoe_kernels import validation as check

if sys.platform != "win32":
    import fcntl

__all__ = ["CSVWriter", "TensorBoardWriter", "flatten_stats"]

_START = b"step,epoch,"


def flatten_stats(entry: dict[str, Any]) -> dict[str, float]:
    """An entry as one number for each name.

    Args:
        entry: of `RoutingCollector`.

    Returns:
        ``moe/global/{key}`` and ``moe/layer_{i}/{key}``; what has a value for each expert is
        ``.../{key}/{e}``.

    Raises:
        TypeError: if entry is not a dict.
        ValueError: if it is not an entry of a collector.
    """
    return dict(_flat("flatten_stats", entry))


def _flat(function: str, entry: Any) -> Iterator[tuple[str, float]]:
    check.check_type(function, "entry", entry, dict, "be a dict")
    if not {"step", "epoch", "global", "layers"} <= set(entry):
        rule = "be an entry of RoutingCollector, such as end_step returns"
        check.fail_value(function, "entry", rule, f"the keys {list(entry)}")
    groups = [("global", entry["global"])]
    groups += [(f"layer_{i}", stats) for i, stats in entry["layers"].items()]
    for group, stats in groups:
        for key, value in stats.items():
            if isinstance(value, Tensor):
                for e, number in enumerate(value.tolist()):
                    yield f"moe/{group}/{key}/{e}", number
            else:
                yield f"moe/{group}/{key}", value


class CSVWriter(AbstractContextManager["CSVWriter"]):
    """A CSV file with a row for each entry: step, epoch, then the names of `flatten_stats`.

    A file of the same columns is continued, and no other one is touched. A row is written in one
    piece or not at all, so a program that ends at any moment leaves whole rows; should the machine
    have cut the last one, the next row takes its place. Several writers may share a file (not
    on Windows).

    Args:
        path: of the file; its folder has to exist.

    Raises:
        TypeError: if path is not a path.
        ValueError: if the file is there and has another beginning than those of this class.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        check.check_path("CSVWriter", "path", path)
        self._path = os.path.abspath(path)  # whatever the working directory becomes
        self._file = Path(path).open("a+b", buffering=0)  # noqa: SIM115  closed by `close`
        self._file.seek(0)
        start = self._file.read(len(_START))
        if start != _START[: len(start)]:
            self._file.close()
            rule = f"be a new file, or one that begins with {_START.decode()!r}"
            check.fail_value("CSVWriter", "path", rule, f"{start!r} in {self._path}")

    def write(self, entry: dict[str, Any]) -> None:
        """Append a row.

        Args:
            entry: of `RoutingCollector`.

        Raises:
            TypeError: if entry is not a dict.
            ValueError: if it is not an entry of a collector, or of other layers or experts.
            OSError: if another program has removed or replaced the file, or the row could not be
                written whole; nothing of it is left in the file.
        """
        numbers = dict(_flat("CSVWriter.write", entry))
        row = {"step": entry["step"], "epoch": entry["epoch"], **numbers}
        header, line = _csv_line(row), _csv_line(row.values())
        with _locked(self._file):
            self._check_place()
            size = self._end_of_rows(header)
            self._append(line if size else header + line, size)

    def _check_place(self) -> None:
        """Refuse a file that no path leads to any more: its rows are lost once it is closed."""
        try:
            there = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except (FileNotFoundError, NotADirectoryError):
            there = False
        if not there:
            message = f"{self._path} was removed or replaced by another program"
            raise OSError(f"segmoe_kernels.CSVWriter.write: {message}; the row was not written.")

    def _end_of_rows(self, header: bytes) -> int:
        """Where rows end in a file with this header; half a row behind them is taken away."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(size - 1, 0))
        last = self._file.read(1)
        self._file.seek(0)
        if last == b"\n" and self._file.read(len(header)) == header:
            return size
        self._file.seek(0)
        text = self._file.readall()
        rows = text[: text.rfind(b"\n") + 1]
        in_header = not rows and header.startswith(text)
        if not in_header and not rows.startswith(header):
            names = [part.decode().split("\n")[0] for part in (text, header)]
            there, ours = (set(next(csv.reader([line]), [])) for line in names)
            got = sorted(there ^ ours) or "another order"
            rule = "have the columns that the file has"
            check.fail_value("CSVWriter.write", "entry", rule, f"a difference in {got}")
        if len(rows) < len(text):
            what = f"the end of {self._path}, a row without its last byte, was taken away"
            warnings.warn(f"segmoe_kernels.CSVWriter: {what}.", RuntimeWarning, stacklevel=3)
            self._file.truncate(len(rows))
        return len(rows)

    def _append(self, data: bytes, size: int) -> None:
        """Write behind the first ``size`` bytes; what is written in part is taken back."""
        written = self._file.write(data)
        if written != len(data):
            self._file.truncate(size)
            message = f"only {written} of {len(data)} bytes could be written to {self._path}"
            raise OSError(f"segmoe_kernels.CSVWriter.write: {message}; the row was taken back.")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorBoardWriter(AbstractContextManager["TensorBoardWriter"]):
    """Scalars of TensorBoard by the names of `flatten_stats`, at the entry's step.

    Args:
        log_dir: folder of the event files.

    Raises:
        TypeError: if log_dir is not a path.
        ImportError: without tensorboard: ``pip install segmoe-kernels[tensorboard]``.
    """

    def __init__(self, log_dir: str | PathLike[str]) -> None:
        check.check_path("TensorBoardWriter", "log_dir", log_dir)
        self._writer: Any = _summary_writer()(fspath(log_dir))

    def write(self, entry: dict[str, Any]) -> None:
        """Add the scalars of an entry of `RoutingCollector`; errors as of `flatten_stats`."""
        for name, number in _flat("TensorBoardWriter.write", entry):
            self._writer.add_scalar(name, number, entry["step"])

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _csv_line(cells: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


@contextmanager
def _locked(file: Any) -> Iterator[None]:
    """Keep other writers out, where the system can: the lock goes with the process."""
    if sys.platform == "win32":
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = "needs tensorboard: pip install segmoe-kernels[tensorboard]"
        raise ImportError(f"segmoe_kernels.TensorBoardWriter {message}") from error
    return SummaryWriter
