"""Result files: rows that survive an interruption, and are not measured twice.

A file is ``{"environment": {...}, "rows": [...]}``. A row says what was measured
(``configuration, provider, pass, mode``), of which code, and either its numbers, with the unit at
the end of each key, or why there are none: ``skipped`` (can't be used here), ``refused`` (wrong
results), ``failed`` (broke, or took too long).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import segmoe_kernels
from benchmarks.common import device_name, environment

IDENTITY = ("configuration", "provider", "pass", "mode")
ROOT = Path(__file__).resolve().parent / "results"


def code_version() -> str:
    """A digest of the package's sources: what was measured, committed or not."""
    digest = hashlib.sha256()
    folder = Path(segmoe_kernels.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def results_folder(device: Any, out: str | None = None) -> Path:
    """Where results of a device go.

    Args:
        device: a torch device or its name.
        out: a folder that is taken as it is; else the environment variable OUT names it; else it
            is ``benchmarks/results/<device>``.
    """
    chosen = out or os.environ.get("OUT")
    return Path(chosen) if chosen else ROOT / device_name(device)


class Store:
    """The rows of one result file, written as a whole after each addition.

    Several processes may add to a file: each reads what the others wrote before it writes.

    Args:
        path: of the file; its folder is made.
        seed: rows to start from where there is no file yet: those of an earlier run that wrote
            elsewhere.
        fresh: start without rows.
    """

    def __init__(self, path: Path, *, seed: Path | None = None, fresh: bool = False) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        # Rows of the file from before a fresh start, which go when the first row comes.
        self._old: list[dict[str, Any]] = _rows(path) if fresh else []
        for source in () if fresh else (path, seed):
            if source is not None and source.exists():
                self.rows = _rows(source)
                break

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Put rows in, in place of those of the same identity, and write the file."""
        added = {_identity(row): row for row in rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            there = [row for row in _rows(self.path) if row not in self._old]
            known = {_identity(row): row for row in (*self.rows, *there)}
            self.rows = [row for key, row in known.items() if key not in added]
            self.rows += added.values()
            # Whole or not at all: the process may be stopped at any moment.
            partial = self.path.with_name(self.path.name + ".partial")
            lines = ",\n".join(map(json.dumps, self.rows))
            text = f'{{"environment": {json.dumps(environment())},\n"rows": [\n{lines}\n]}}\n'
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)

    def has(self, identity: tuple[str, ...], code: str, *, retry: bool = False) -> bool:
        """Whether a row of this identity and code is there.

        Args:
            identity: values of `IDENTITY`.
            code: of `code_version`.
            retry: a row that failed does not count.
        """
        return any(
            _identity(row) == identity and row["code"] == code and not (retry and "failed" in row)
            for row in self.rows
        )


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in IDENTITY)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it is not there."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes, and stores of this one, from writing; the lock goes with the process.

    It is the folder's, since the file is another one after each addition.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
