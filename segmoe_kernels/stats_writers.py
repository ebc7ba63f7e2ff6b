"""Routing statistics into files: a CSV with a row for each entry, and TensorBoard."""

import csv
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import Tensor

from segmoe_kernels import validation as check

__all__ = ["CSVWriter", "TensorBoardWriter", "flatten_stats"]


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
    if not isinstance(entry, dict):
        check.fail_type(function, "entry", "be a dict", type(entry).__name__)
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

    A row is handed to the system in one piece, so a program that ends at any moment leaves whole
    rows; should the machine have cut the last one, opening the file anew takes its rest away. A
    file that exists is continued.

    Args:
        path: of the file; its folder has to exist.

    Raises:
        TypeError: if path is not a path.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        _check_path("CSVWriter", "path", path)
        self._file = Path(path).open("a+b", buffering=0)  # noqa: SIM115  closed by `close`
        self._file.seek(0)
        text = self._file.read()
        self._file.truncate(text.rfind(b"\n") + 1)
        first = text.partition(b"\n")[0].decode() if b"\n" in text else ""
        self._header = next(csv.reader([first]), [])

    def write(self, entry: dict[str, Any]) -> None:
        """Append a row.

        Args:
            entry: of `RoutingCollector`.

        Raises:
            TypeError: if entry is not a dict.
            ValueError: if it is not an entry of a collector, or has other layers or experts than
                the file.
        """
        numbers = dict(_flat("CSVWriter.write", entry))
        row = {"step": entry["step"], "epoch": entry["epoch"], **numbers}
        if self._header and self._header != list(row):
            rule = "have the columns that the file has"
            got = sorted(set(row) ^ set(self._header)) or "another order"
            check.fail_value("CSVWriter.write", "entry", rule, f"a difference in {got}")
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        if not self._header:
            lines.writerow(row)
        lines.writerow(row.values())
        self._file.write(text.getvalue().encode())
        self._header = list(row)

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
        _check_path("TensorBoardWriter", "log_dir", log_dir)
        self._writer: Any = _summary_writer()(fspath(log_dir))

    def write(self, entry: dict[str, Any]) -> None:
        """Add the scalars of an entry.

        Args:
            entry: of `RoutingCollector`.

        Raises:
            TypeError: if entry is not a dict.
            ValueError: if it is not an entry of a collector.
        """
        for name, number in _flat("TensorBoardWriter.write", entry):
            self._writer.add_scalar(name, number, entry["step"])

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_path(function: str, argument: str, path: Any) -> None:
    if not isinstance(path, str | PathLike):
        check.fail_type(function, argument, "be a path", type(path).__name__)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = "needs tensorboard: pip install segmoe-kernels[tensorboard]"
        raise ImportError(f"segmoe_kernels.TensorBoardWriter {message}") from error
    return SummaryWriter
