"""What the tests of the benchmarks share."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import peers

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
needs_scattermoe = pytest.mark.skipif(
    not (peers.SCATTERMOE_FOLDER / "scattermoe").is_dir(), reason="needs peers/scattermoe"
)


def rows_of(folder, name):
    """The rows of a result file."""
    return json.loads((folder / f"{name}.json").read_text())["rows"]
