"""Wrong calls of the segment-size advisor; rows as in `bad_calls`."""

import tempfile
from pathlib import Path

import numpy as np
from bad_calls import caller

from segmoe_kernels.series import read_series, read_table
from segmoe_kernels.series.advise import Advice, advise, plot_advice

SERIES = np.sin(np.arange(400.0))[:, None]
DATES = np.arange(400).astype("datetime64[D]")[:, None]
ask = caller(advise, values=SERIES)
draw = caller(plot_advice, values=SERIES, advice=Advice([1], 1, [0.0], [], None, []))
series = caller(read_series)


def read(text):
    def call():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "series.csv")
            path.write_text(text)
            read_series(path)

    call.wrong = read_series, {"path"}
    return call


ROWS = [
    ("advise_patch", ask(patch=0), ValueError, ["patch", "at least 1, got 0"]),
    ("advise_layers", ask(num_layers=2.0), TypeError, ["num_layers", "be an int", "2.0"]),
    ("advise_max_size", ask(max_size=0), ValueError, ["max_size", "at least 1"]),
    ("advise_look_back", ask(look_back=4), ValueError, ["look_back", "at least 8, got 4"]),
    ("advise_list", ask(values=[1.0, 2.0]), ValueError, ["values", "(N, C)", "got list"]),
    ("advise_flat", ask(values=SERIES[:, 0]), ValueError, ["values", "(N, C)", "(400,)"]),
    ("advise_nan", ask(values=SERIES * np.nan), ValueError, ["values", "finite", "NaN"]),
    ("advise_complex", ask(values=SERIES + 1j), TypeError, ["values", "real", "complex128"]),
    ("advise_text", ask(values=SERIES.astype(str)), TypeError, ["values", "real", "dtype <U"]),
    ("advise_dates", ask(values=DATES), TypeError, ["values", "real", "datetime64[D]"]),
    ("advise_objects", ask(values=SERIES.astype(object)), TypeError, ["values", "real", "object"]),
    ("advise_short", ask(patch=16), ValueError, ["at least 576 steps", "9 patches", "got 400"]),
    ("picture_values", draw(values=None), ValueError, ["plot_advice", "values", "NoneType"]),
    ("picture_complex", draw(values=SERIES * 1j), TypeError, ["plot_advice", "values", "real"]),
    ("picture_nan", draw(values=SERIES * np.nan), ValueError, ["plot_advice", "values", "finite"]),
    ("picture_advice", draw(advice=[4, 4]), TypeError, ["advice", "be an Advice", "list"]),
    ("picture_short", draw(values=SERIES[:7]), ValueError, ["plot_advice", "values", "8 steps"]),
    ("picture_patch", draw(patch=0), ValueError, ["plot_advice", "patch", "at least 1"]),
    ("picture_look_back", draw(look_back=0.5), TypeError, ["look_back", "be an int"]),
    ("table_path", caller(read_table)(path=3), TypeError, ["path", "be a path", "got int"]),
    ("series_path", series(path=None), TypeError, ["path", "be a path", "got NoneType"]),
    ("series_empty", read(""), ValueError, ["path", "columns of numbers", "series.csv"]),
    ("series_hole", read('x\n1\n""\n'), ValueError, ["a number everywhere", "''", "row 3"]),
]
