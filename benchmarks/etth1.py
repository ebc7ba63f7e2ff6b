"""A forecaster on ETTh1 with the sizes, epochs and rates of the official small recipe, on a GPU.

    python -m benchmarks.etth1 [options of examples/train_forecaster.py]

What of the recipe is the example's instead stands in `examples/studies/runs.py`. ETTh1.csv.gz is
looked for in ``build/gpu``. The result goes to etth1.json.
"""

import shutil
import sys
from pathlib import Path

from benchmarks.store import results_folder
from examples import train_forecaster

BUILD = Path(__file__).resolve().parents[1] / "build" / "gpu"
RECIPE = (
    "--data ETTh1 --quiet --no-plots --device cuda --horizon 32 --roll-out 96 192 336 720 "
    "--segment-sizes 3,5,5,5 --d-model 128 --d-ff 256 --num-heads 4 --router-dropout 0.2 "
    "--epochs 20 --batch-size 128 --learning-rate 3.2e-4 --weight-decay 0.1 --train-fraction 1"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    out = BUILD / "etth1"
    places = ["--data-dir", str(BUILD), "--out", str(out)]
    status = train_forecaster.main([*RECIPE.split(), *places, *given])
    if status == 0:
        folder = results_folder("cuda")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "result.json", folder / "etth1.json")
    return status


if __name__ == "__main__":
    sys.exit(main())
