"""Where the forecasting data come from: a folder, the user's cache, or the official address."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from segmoe_kernels.series import read_table, unzip

_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
_OIL = "oil temperature, °C"
_EXCHANGE = "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/master"
_AUTOFORMER = "the Google Drive folder linked from https://github.com/thuml/Autoformer"
_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = 20
# Six times the largest file with an address, unzipped.
_MAX_BYTES = 64 << 20


class DataUnavailableError(RuntimeError):
    """The file is in no folder and could not be downloaded; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A benchmark file.

    Attributes:
        stem: file name without ``.csv`` or ``.csv.gz``.
        shape: rows and channels, whatever the packaging.
        sha256: accepted digests of the uncompressed content. A file that the user supplies may be
            another packaging of the same numbers; a download must match.
        url: official address, or None where there is no direct one.
        home: page to name when there is no direct address.
        last: what the last channel is, and its unit.
    """

    stem: str
    shape: tuple[int, int]
    sha256: tuple[str, ...] = ()
    url: str | None = None
    home: str = ""
    last: str = "value"


DATASETS = {
    "ETTh1": Dataset(
        "ETTh1",
        (17420, 7),
        ("f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",),
        f"{_ETT}/ETTh1.csv",
        last=_OIL,
    ),
    "ETTh2": Dataset(
        "ETTh2",
        (17420, 7),
        ("a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",),
        f"{_ETT}/ETTh2.csv",
        last=_OIL,
    ),
    "ETTm1": Dataset(
        "ETTm1",
        (69680, 7),
        ("6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",),
        f"{_ETT}/ETTm1.csv",
        last=_OIL,
    ),
    "ETTm2": Dataset(
        "ETTm2",
        (69680, 7),
        ("db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",),
        f"{_ETT}/ETTm2.csv",
        last=_OIL,
    ),
    "Weather": Dataset(
        "weather",
        (52696, 21),
        ("9b2b19b13e342d9c9b9c51620d42b4be232df7fba30e7f5c4968b7c79ab138ad",),
        home=_AUTOFORMER,
    ),
    # Hourly: 321 meters of the UCI electricity load diagrams, 862 road sensors of California.
    "ECL": Dataset("electricity", (26304, 321), home=_AUTOFORMER),
    "Traffic": Dataset("traffic", (17544, 862), home=_AUTOFORMER),
    # The upstream file has neither header nor dates; the packaged one has both, and its last two
    # channels are swapped, which no score here depends on.
    "exchange_rate": Dataset(
        "exchange_rate",
        (7588, 8),
        (
            "0127465b51e3cd3c360f8eb2be30cfd294689a2a55903eb8245aafc396626c7f",
            "d55e7aa2641009814a18ba3279431b13f6d413b0eab195b9ff21988d8cf94e97",
        ),
        f"{_EXCHANGE}/exchange_rate/exchange_rate.txt.gz",
    ),
}


def cache_dir() -> Path:
    """The user's cache: ``$XDG_CACHE_HOME/segmoe_kernels``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "segmoe_kernels"


def find_local(name: str, data_dir: Path | None = None) -> Path | None:
    """Look in ``data_dir`` (else ``$SEGMOE_DATA``), then in the cache.

    Args:
        name: key of `DATASETS`.
        data_dir: folder given by the user.

    Returns:
        The csv or gzipped csv, or None.
    """
    stem = DATASETS[name].stem
    chosen = data_dir or (Path(found) if (found := os.environ.get("SEGMOE_DATA")) else None)
    folders = [folder for folder in (chosen, cache_dir()) if folder is not None]
    for folder in folders:
        for candidate in (folder / f"{stem}.csv", folder / f"{stem}.csv.gz"):
            if candidate.is_file():
                return candidate
    return None


def find_or_download(name: str, data_dir: Path | None = None) -> Path:
    """Find a benchmark file, downloading it into the cache if need be.

    Args:
        name: key of `DATASETS`.
        data_dir: folder given by the user.

    Returns:
        Path of a csv or gzipped csv.

    Raises:
        DataUnavailableError: if there is no file and no way to get it.
    """
    found = find_local(name, data_dir)
    if found is not None:
        return found
    dataset = DATASETS[name]
    if dataset.url is None:
        reason = (
            f"{name} has no direct official address: get {dataset.stem}.csv from {dataset.home}"
        )
        raise DataUnavailableError(_three_ways(name, reason))
    try:
        return download(dataset, cache_dir())
    except (OSError, http.client.HTTPException, DataUnavailableError) as error:
        reason = f"downloading {dataset.url} failed: {error}"
        raise DataUnavailableError(_three_ways(name, reason)) from error


def download(dataset: Dataset, folder: Path) -> Path:
    """Download, verify, and only then give the file its name.

    Args:
        dataset: with an address.
        folder: made if missing; the temporary file lies in it too.

    Returns:
        ``folder/<stem>.csv``, uncompressed.

    Raises:
        OSError: if the address cannot be read.
        DataUnavailableError: if the content is not the expected one, damaged or too large; no file
            is left.
    """
    if dataset.url is None:
        raise ValueError(f"dataset must have an address, got none for {dataset.stem}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        content = unzip(_fetch(dataset.url), _MAX_BYTES)
    except ValueError as error:
        raise DataUnavailableError(f"the answer is {error}; nothing was kept") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest not in dataset.sha256:
        raise DataUnavailableError(
            f"the content must have the sha256 {' or '.join(dataset.sha256)}, got {digest}; "
            "nothing was kept"
        )
    target = folder / f"{dataset.stem}.csv"
    handle, temporary = tempfile.mkstemp(prefix=f".{dataset.stem}.", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _fetch(url: str) -> bytes:
    """Download; stops behind `_MAX_BYTES`, whatever the server says of the length."""
    parts = []
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        size = response.headers.get("Content-Length")
        if size is not None and not size.isdecimal():
            raise ValueError(f"of the Content-Length {size[:40]!r}, which is no number")
        total, left = int(size) if size else None, _MAX_BYTES + 1
        with tqdm(total=total, unit="B", unit_scale=True, desc=Path(url).name) as progress:
            while left and (chunk := response.read(min(_CHUNK_BYTES, left))):
                parts.append(chunk)
                left -= len(chunk)
                progress.update(len(chunk))
    return b"".join(parts)


def _three_ways(name: str, reason: str) -> str:
    stem = DATASETS[name].stem
    download = "run once with a network connection (the file is downloaded and verified), or "
    third = (download if DATASETS[name].url else "") + "take --data multiscale, which needs no file"
    return (
        f"{name} is not on this machine; {reason}\n"
        "Any of these three helps:\n"
        f"  1. --data-dir FOLDER or SEGMOE_DATA=FOLDER with {stem}.csv or {stem}.csv.gz in it\n"
        f"  2. put {stem}.csv into the cache, {cache_dir()}\n"
        f"  3. {third}"
    )


def check_shape(name: str, values: npt.NDArray[np.float64]) -> None:
    """Refuse a file that is not the whole benchmark, or another one.

    Args:
        name: key of `DATASETS`.
        values: (N, C) as read.

    Raises:
        ValueError: if rows or channels are not those of the published file.
    """
    rows, channels = DATASETS[name].shape
    if values.shape != (rows, channels):
        got = f"{values.shape[0]} rows of {values.shape[1]}"
        raise ValueError(f"{name} must have {rows} rows of {channels} channels, got {got}")


def read_values(path: Path) -> npt.NDArray[np.float64]:
    """Read a csv file as `segmoe_kernels.series.read_table` does, and print what it says of it.

    Args:
        path: of the file, plain or gzipped.

    Returns:
        (N, C) float64.

    Raises:
        ValueError: for what can't be read as numbers, with row and column.
    """
    table = read_table(path)
    for sentence in table.describe():
        print(f"{path.name}: {sentence}", file=sys.stderr)
    return table.values
