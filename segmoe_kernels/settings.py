"""Settings from the environment, which is read once: at import, and where somebody says so."""

import os
from typing import NamedTuple

__all__ = ["Settings", "reload_settings", "settings"]


class Settings(NamedTuple):
    """What the variables say.

    Attributes:
        backend: SEGMOE_BACKEND, in the place of "auto".
        arch: SEGMOE_ARCH, whose tiles are taken, or None.
        tiles: SEGMOE_TILES, a file of tiles, or None.
        replay: whether launches are played back; not with SEGMOE_REPLAY=0.
    """

    backend: str
    arch: str | None
    tiles: str | None
    replay: bool


def settings() -> Settings:
    """What holds now.

    Returns:
        Settings.
    """
    return _NOW


def reload_settings() -> None:
    """Read the environment again: SEGMOE_BACKEND, SEGMOE_ARCH, SEGMOE_TILES and SEGMOE_REPLAY.

    They are read when the package is imported; whoever changes one later in the same process calls
    this. Layers and functions take the new ones in their next call.
    """
    global _NOW  # noqa: PLW0603  one place, read in every call
    _NOW = _read()


def _read() -> Settings:
    get = os.environ.get
    return Settings(
        get("SEGMOE_BACKEND", "auto"),
        get("SEGMOE_ARCH"),
        get("SEGMOE_TILES") or None,
        get("SEGMOE_REPLAY", "1") != "0",
    )


_NOW = _read()
