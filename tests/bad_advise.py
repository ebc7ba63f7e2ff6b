"""Wrong calls of the segment-size advisor; rows as in `bad_calls`."""

import tempfile
from pathlib import Path

import numpy as np
from bad_calls import T, V, caller

from segmoe_kernels.series import read_series, read_table
from segmoe_kernels.series.advise import Advice, advise, plot_advice

SERIES = np.sin(np.arange(400.0))[:, None]
DATES = np.arange(400).astype("datetime64[D]")[:, None]
ask = caller(advise, values=SERIES)
draw = caller(plot_advice, advice=Advice(1, [0.0], [0.0], []))
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
    (ask(patch=0), V, "at least 1, got 0"),
    (ask(step=2.0), T, "be an int | 2.0"),
    (ask(max_size=0), V, "at least 1"),
    (ask(progress=1), T, "True or False | 1"),
    (ask(values=[1.0, 2.0]), V, "(N, C) | got list"),
    (ask(values=SERIES[:, 0]), V, "(N, C) | (400,)"),
    (ask(values=SERIES * np.nan), V, "finite | NaN"),
    (ask(values=SERIES + 1j), T, "real | complex128"),
    (ask(values=SERIES.astype(str)), T, "real | dtype <U"),
    (ask(values=DATES), T, "real | datetime64[D]"),
    (ask(values=SERIES.astype(object)), T, "real | object"),
    (ask(patch=16), V, "at least 1024 steps | got 400"),
    (ask(step=16), V, "at least 560 steps | step=16 | got 400"),
    (draw(advice=[4, 4]), T, "be an Advice | list"),
    (draw(patch=0), V, "plot_advice | at least 1"),
    (caller(read_table)(path=3), T, "be a path | got int"),
    (series(path=None), T, "be a path | got NoneType"),
    (read(""), V, "path | columns of numbers | series.csv"),
    (read('x\n1\n""\n'), V, "a number everywhere | '' | row 3"),
]  # fmt: skip
