"""Opt-in: tiles that a search found on the user's own GPU, in the place of the table's.

The environment variable SEGMOE_TILES names a file made by ``python -m benchmarks.tune --write``::

    {"tiles": {"sm_90": {"expert_ffn_dx_tile(d_model=64, ...)": {"block_m": 64, "num_warps": 4}}}}

A question to the table, without the number of rows (a bucket of it where the table takes one), has
the values that replace those of the table's answer. Nothing is searched at run time, and the same
file gives the same tiles in every process.
"""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from segmoe_kernels._triton.tile_table import TILES_OF, architecture, power
from segmoe_kernels.options import settings

__all__ = ["FUSED", "PRODUCT", "question", "read_tiles", "replaceable", "replaceable_fields"]

VARIABLE = "SEGMOE_TILES"
# What may be replaced: a fused kernel's block_k is the padded width, a product's is a choice.
FUSED = ("block_m", "block_n", "num_warps", "num_stages")
PRODUCT = (*FUSED, "block_k")

# Of each function of the table; the number of rows may change in every batch.
_MOST_KNOWN = 1024

_Answer = TypeVar("_Answer")
# Function of the table -> the fields that may be changed, filled where the table is defined.
_FIELDS: dict[str, tuple[str, ...]] = {}
_Replacements = dict[str, dict[str, dict[str, int]]]  # architecture -> question -> field -> value


def replaceable(*fields: str) -> Callable[[Callable[..., _Answer]], Callable[..., _Answer]]:
    """Let the file that SEGMOE_TILES names change the answers of a function of the table.

    Args:
        *fields: of an answer, that may be changed.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[..., _Answer]) -> Callable[..., _Answer]:
        @functools.lru_cache(_MOST_KNOWN)
        def find(path: str | None, arch: str, *args: Any, **kwargs: Any) -> _Answer:
            shipped = function(*args, **kwargs)
            if not path or shipped is None:
                return shipped
            found = _replacement(path, arch, question(function, *args, **kwargs))
            return shipped._replace(**found) if found else shipped  # type: ignore[attr-defined]

        @functools.wraps(function)
        def answer(*args: Any, **kwargs: Any) -> _Answer:
            return find(settings().tiles, architecture(), *args, **kwargs)

        _FIELDS[function.__name__] = fields
        return answer

    return decorate


def replaceable_fields() -> dict[str, tuple[str, ...]]:
    """Function of the table -> the fields of its answers that may be changed."""
    return dict(_FIELDS)


def question(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Name a call of a table's function, the same for every number of rows in a bucket.

    Args:
        function: of the table.
        *args: of the call.
        **kwargs: of the call.

    Returns:
        ``"name(argument=value, ...)"``.
    """
    words = []
    for name, value in _signature(function).bind(*args, **kwargs).arguments.items():
        if name == "rows_per_expert":
            words.append(f"{name}={power(value, 16, 128)}")
        else:
            words.append(f"{name}={str(value).removeprefix('torch.')}")
    return f"{function.__name__}({', '.join(words)})"


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _replacement(path: str, arch: str, asked: str) -> dict[str, int]:
    return _read_once(path).get(arch, {}).get(asked, {})


@functools.cache
def _read_once(path: str) -> _Replacements:
    return read_tiles(path)


def read_tiles(path: str) -> _Replacements:
    """Read and check a file of tiles; kernels do so once in a process.

    Args:
        path: of the file.

    Returns:
        Architecture -> question -> field -> value.

    Raises:
        ValueError: if it can't be read or holds what no search writes.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"segmoe_kernels: {VARIABLE}={path!r}: expected a file of python -m benchmarks.tune "
            f"--write, got {what}."
        )

    try:
        tiles = json.loads(Path(path).read_text(encoding="utf-8"))["tiles"]
    except OSError as error:
        raise refuse(f"{error.strerror} when it was opened") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refuse(f"{type(error).__name__}: {error}") from None
    if not isinstance(tiles, dict):
        raise refuse(f"tiles of type {type(tiles).__name__}")
    for arch, questions in tiles.items():
        if arch not in TILES_OF:
            raise refuse(f"the architecture {arch!r}, not one of {', '.join(TILES_OF)}")
        if not isinstance(questions, dict):
            raise refuse(f"{questions!r} for {arch}")
        for asked, fields in questions.items():
            fault = _fault(asked, fields)
            if fault is not None:
                raise refuse(f"{fault} for {asked!r}")
    found: _Replacements = tiles
    return found


def _fault(asked: str, fields: Any) -> str | None:
    """Say what is wrong with the values of one question, or None."""
    allowed = _FIELDS.get(asked.partition("(")[0])
    if allowed is None:
        return "values of no function of the table"
    if not isinstance(fields, dict) or not fields:
        return f"{fields!r}"
    for field, value in fields.items():
        if field not in allowed:
            return f"the field {field!r}, not one of {', '.join(allowed)},"
        whole = isinstance(value, int) and not isinstance(value, bool)
        least, most = {"num_warps": (1, 32), "num_stages": (1, 8)}.get(field, (16, 1024))
        power_of_two = field == "num_stages" or (whole and value & (value - 1) == 0)
        if not whole or not least <= value <= most or not power_of_two:
            kind = "a whole number" if field == "num_stages" else "a power of two"
            return f"{field}={value!r}, not {kind} from {least} to {most},"
    return None
