"""The reader of CSV files: what it takes for numbers, what it refuses, and what it says."""

import gzip

import numpy as np
import pytest

from segmoe_kernels import series
from segmoe_kernels.series import constant_channels, read_series, read_table

HOURS = [f"2020-01-01 {hour:02}:00:00" for hour in range(24)]


def dated(cells, stamps=HOURS, header="date,a"):
    """A file of one channel with time stamps."""
    return "\n".join([header, *(f"{s},{c}" for s, c in zip(stamps, cells, strict=False))]) + "\n"


def write(tmp_path, content):
    path = tmp_path / "d.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# name: content, values, and names of channels
TAKEN = {
    "header": ("a,b\n1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "no header": ("1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "column 1,column 2"),
    "one column": ("load\n20.5\n21.75\n", [[20.5], [21.75]], "load"),
    "no newline at the end": ("a\n1.5\n2.5", [[1.5], [2.5]], "a"),
    "Windows line ends": (b"a,b\r\n1.5,2\r\n2.5,3\r\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "old line ends": (b"a,b\r1.5,2\r2.5,3\r", [[1.5, 2], [2.5, 3]], "a,b"),
    "separators of Unicode": ("a\u2028,b\n1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "empty lines at the ends": ("\na\n1.5\n2.5\n\n\n", [[1.5], [2.5]], "a"),
    "blanks": ("a, b\n1.5, 2 \n 2.5,\t3\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "quotes": ('"a","b"\n"1.5","2"\n"2.5","3"\n', [[1.5, 2], [2.5, 3]], "a,b"),
    "exponents": ("a,b\n1e3,-.5\n+2.E-1,3\n", [[1000, -0.5], [0.2, 3]], "a,b"),
    "names twice": ("a,a\n1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "a (column 1),a (column 2)"),
    "LD2011_2014": (
        '"";"MT_001";"MT_002"\n"2011-01-01 00:15:00";3,807;22,75\n"2011-01-01 00:30:00";5,076;22\n',
        [[3.807, 22.75], [5.076, 22]], "MT_001,MT_002",
    ),
    "semicolons": ("a;b\n1.5;2\n2.5;3\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "tabs": ("a\tb\n1.5\t2\n2.5\t3\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "decimal commas, no header": ("1,5;2\n2,5;3\n", [[1.5, 2], [2.5, 3]], "column 1,column 2"),
    "minus U+2212": (
        "date,a,t\nd1,1.5,\u22123.5\nd2,2.5,\u22124.5\n", [[1.5, -3.5], [2.5, -4.5]], "a,t",
    ),
    "rising, no header": ("1\n2\n5\n", [[1], [2], [5]], "column 1"),
    "BOM": (b"\xef\xbb\xbfa,b\n1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "BOM, no header": (b"\xef\xbb\xbf1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "column 1,column 2"),
    "BOM, quotes": (b'\xef\xbb\xbf"a","b"\n1.5,2\n2.5,3\n', [[1.5, 2], [2.5, 3]], "a,b"),
    "gzip by content": (gzip.compress(b"a\n1.5\n2.5\n"), [[1.5], [2.5]], "a"),
    "gzip and BOM": (gzip.compress(b"\xef\xbb\xbf1.5\n2.5\n"), [[1.5], [2.5]], "column 1"),
    "header 0,1": ("0,1\n1.5,2.5\n3.5,4\n", [[1.5, 2.5], [3.5, 4]], "0,1"),
    "header 0": ("0\n1.5\n2.5\n", [[1.5], [2.5]], "0"),
    "numbers as names below a date": (
        "date,7,0.1\n2020-01-01,1,2\n2020-01-02,3,4\n", [[1, 2], [3, 4]], "7,0.1",
    ),
    "numbers as names": ("a,7\n1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "a,7"),
    "numbers as names below text": ("station,7\nA,1.5\nB,2\n", [[1.5], [2]], "7"),
    "dates without header": (
        "2020-01-01,0,1\n2020-01-02,2.5,3\n", [[0, 1], [2.5, 3]], "column 2,column 3",
    ),
    "text without header": ("A,1.5\nB,2.5\n", [[1.5], [2.5]], "column 2"),
    "pandas index": (",a\n0,1.5\n1,2.5\n", [[1.5], [2.5]], "a"),
    "pandas index of a part": (",a,b\n7,1.5,2\n9,2.5,3\n", [[1.5, 2], [2.5, 3]], "a,b"),
    "pandas index, header 0,1": (",0,1\n0,1,2\n1,3,4\n", [[1, 2], [3, 4]], "0,1"),
    "index twice over": ("Unnamed: 0,a\n0,1.5\n1,2.5\n", [[1.5], [2.5]], "a"),
    "no index": (",a\n3,1.5\n1,2.5\n", [[3, 1.5], [1, 2.5]], "column 1,a"),
    "epoch": ("timestamp,a\n1467331200,1.5\n1467334800,2.5\n", [[1.5], [2.5]], "a"),
    "Unix time": ("Unix_Time (ms),a\n1467331200,1.5\n1467334800,2.5\n", [[1.5], [2.5]], "a"),
    "dates as numbers": ("date,a\n20200131,1.5\n20200201,2.5\n", [[1.5], [2.5]], "a"),
    "names of time with a number": (
        "TS1,TS2,PS1\n1,2,3\n4,5,6.5\n", [[1, 2, 3], [4, 5, 6.5]], "TS1,TS2,PS1",
    ),
    "text again below": ("A,5\nA,6.5\nA,7.25\n", [[5], [6.5], [7.25]], "column 2"),
    "text again below, whole numbers": ("A,5\nB,6\nA,7\n", [[5], [6], [7]], "column 2"),
    "names again below text": ("a,kind\n1.5,kind\n2.5,b\n", [[1.5], [2.5]], "a"),
    "text": ("a,kind\n1.5,calm\n2.5,\n", [[1.5], [2.5]], "a"),
    "comma in text": ('a,kind\n1.5,"calm, mild"\n2.5,x;y\n', [[1.5], [2.5]], "a"),
    "names that look missing": ("a,NA\n1.5,2\n2.5,3\n", [[1.5, 2], [2.5, 3]], "a,NA"),
}  # fmt: skip

NUMBER = "have a number everywhere"
# name: content, and words of the refusal
REFUSED = {
    "'?' in the first row": (
        "date,a,b\nd1,1.5,?\nd2,2.5,3\n", [NUMBER, "'?' in row 2, column 3 (b)"],
    ),
    "'?' later": ("date,a,b\nd1,1.5,3\nd2,2.5,?\n", [NUMBER, "'?' in row 3, column 3 (b)"]),
    "'?' of a file without header": ("?,1.5\n2,3\n", [NUMBER, "'?' in row 1, column 1"]),
    "missing in all rows": ("a,b\n1.5,\n2.5,\n", [NUMBER, "'' in row 2, column 2 (b)"]),
    "hole": ("a,b\n1.5,2\n,3\n", [NUMBER, "'' in row 3, column 1 (a)"]),
    "#N/A first": ("date,a,b\nd1,1.5,#N/A\nd2,2.5,3\n", [NUMBER, "'#N/A' in row 2"]),
    "nan": ("a,b\n1.5,nan\n2.5,3\n", [NUMBER, "'nan' in row 2"]),
    "inf": ("a,b\n1.5,2\n2.5,-inf\n", [NUMBER, "'-inf' in row 3"]),
    "beyond float64": ("a,b\n1.5,2\n2.5,1e400\n", [NUMBER, "'1e400' in row 3"]),
    "word among numbers": ("a\n1\n2\nbad\n4\n", [NUMBER, "'bad' in row 4, column 1 (a) of d.csv"]),
    "word above decimals": ("bad,0.5\n1,2\n3,4\n", [NUMBER, "'bad' in row 1"]),
    "thousands": (
        'date,a,load\nd1,1.5,"1,234.5"\nd2,2.5,"1,235.5"\n', [NUMBER, "'1,234.5' in row 2"],
    ),
    "thousands without decimals": ('a,b\n1.5,"1,234"\n2.5,"5,678"\n', [NUMBER, "'1,234'"]),
    "thousands by points": (
        "a;b\n1,5;1.234,5\n2,5;1.235,5\n", [NUMBER, "'1.234,5' in row 2, column 2"],
    ),
    "commas and tabs": ("a\tb\n1,234\t1\n1,235\t2\n", [NUMBER, "'1,234' in row 2"]),
    "thousands by blanks": ("a\n1\u00a0234\n1\u00a0235\n", [NUMBER, "row 2"]),
    "thousands by apostrophes": ("a\n1'234\n1'235\n", [NUMBER, "row 2"]),
    "two decimal marks": (
        "a;b\n1,5;1.5\n2,5;2.5\n", ["one decimal mark", "commas and with points in d.csv"],
    ),
    "decimal comma in one column": (
        "load\n20,5\n21,75\n", ["1 columns everywhere", "2 in row 2 of d.csv"],
    ),
    "per cent": ("date,a,h\nd1,1.5,45%\nd2,2.5,46%\n", [NUMBER, "'45%' in row 2"]),
    "currency": ("a\n$1.5\n$2.5\n", [NUMBER, "'$1.5' in row 2"]),
    "underscore": ("a,b\n1.5,1_100\n2.5,1_200\n", [NUMBER, "'1_100' in row 2"]),
    "digits of Unicode": ("a\n\u0661\u0662\n\u0663\n", [NUMBER, "row 2, column 1 (a)"]),
    "0,1 above whole numbers": ("0,1\n5,6\n7,8\n", ["names in words, or none", "0, 1 above whole"]),
    "7 below a word": (
        "A,7\nB,8\n", ["names in words, or none", "A, 7 above whole numbers in d.csv"],
    ),
    "word beside text again below": ("A,x,5\nA,1,6.5\n", [NUMBER, "'x' in row 1, column 2"]),
    "ragged": ("a,b\n1.5,2\n3\n", ["2 columns everywhere", "1 in row 3 of d.csv"]),
    "empty row inside": ("a\n1.5\n\n2.5\n", ["no empty row inside", "row 3 of d.csv"]),
    "open quote": ('a,b\n1.5,"2\n2.5,3\n', ["be a CSV file", "unexpected end of data", "d.csv"]),
    "long field": (
        "a\n" + "x" * 131_073 + "\n", ["be a CSV file", "larger than field limit", "row 2"],
    ),
    "header alone": ("a,b\n", ["columns of numbers", "a header alone in d.csv"]),
    "text alone": ("a,b\nc,d\ne,f\n", ["columns of numbers", "none in d.csv"]),
    "dates alone": ("date\n2020-01-01\n2020-01-02\n", ["columns of numbers", "none in d.csv"]),
    "nothing": ("", ["columns of numbers", "nothing in d.csv"]),
    "UTF-16": ("a,b\n1.5,2\n".encode("utf-16"), ["UTF-8", "UTF-16 or a binary file, d.csv"]),
    "UTF-16 without mark": (
        "a,b\n1.5,2\n".encode("utf-16-le"), ["UTF-8", "UTF-16 or a binary file"],
    ),
    "Latin-1": (
        "a,T (\u00b0C)\n1.5,2\n".encode("latin-1"), ["UTF-8", "0xb0 in row 1 of d.csv", "Latin-1"],
    ),
    "cut gzip": (gzip.compress(b"a\n1.5\n2.5\n" * 99)[:-9], ["a damaged gzip file", "d.csv"]),
    "damaged gzip": (b"\x1f\x8b\x08\x00garbage, and more of it", ["a damaged gzip file", "d.csv"]),
    "garbage behind gzip": (gzip.compress(b"a\n1.5\n2.5\n") + b"x" * 20, ["a damaged gzip file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_file_is_read_as_it_is_meant(name, tmp_path):
    content, values, names = TAKEN[name]
    table = read_table(write(tmp_path, content))
    assert table.values.tolist() == values
    assert list(table.columns) == names.split(",")


@pytest.mark.parametrize("name", REFUSED)
def test_file_is_refused_by_name(name, tmp_path):
    content, words = REFUSED[name]
    with pytest.raises(
        ValueError, match=r"segmoe_kernels\.read_table: expected path to "
    ) as caught:
        read_table(write(tmp_path, content))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_what_is_left_out_is_said(tmp_path):
    content = "date,when,kind,a\n2020-01-01,0,calm,1.5\n2020-01-02,1,mild,2.5\n"
    path = write(tmp_path, content.replace("when", "time"))
    table = read_table(path)
    assert table.left_out == {"date": "time stamps", "time": "time stamps", "kind": "text"}
    said = table.describe()
    assert said == [
        "Channels: a.",
        "Left out: date (time stamps), time (time stamps), kind (text).",
    ]
    many = ",".join(f"c{i}" for i in range(10))
    table = read_table(write(tmp_path, f"{many}\n{','.join(['1.5'] * 10)}\n"))
    assert table.describe() == ["Channels: c0, c1, c2, c3, c4, c5, c6, c7 and 2 more."]
    with pytest.warns(UserWarning, match="d.csv: No header: the first row was read as values"):
        assert read_series(write(tmp_path, "1.5\n2.5\n")).tolist() == [[1.5], [2.5]]
    path = write(tmp_path, "date,a,b\n2020-01-01,1,low\n2020-01-02,2,bad\n2020-01-03,3,7.5\n")
    assert read_table(path).left_out == {"date": "time stamps", "b": "text and numbers"}
    with pytest.warns(UserWarning, match=r"^d.csv: Left out: b \(text and numbers\).$"):
        read_series(path)
    assert read_table(write(tmp_path, "a;b\n1,5;2\n")).notes == ("Numbers have decimal commas.",)


def test_text_below_a_block_of_numbers_is_text(tmp_path):
    rows = ["a,1.5", *["7,2.5"] * series.BLOCK, *["a,3.5"] * (series.BLOCK + 1)]
    table = read_table(write(tmp_path, "\n".join(rows)))
    assert table.left_out == {"column 1": "text and numbers"}
    assert (table.values.shape, table.values[0]) == ((len(rows), 1), 1.5)


DAYS = [f"2020-01-{day:02}" for day in range(1, 29)]
# name: time stamps, and the sentences about them
STAMPED = {
    "in order": (HOURS, []),
    "days": (DAYS, []),
    "months": ([f"2020-{m:02}" for m in range(1, 13)], []),
    "slashes and short numbers": ([f"1990/1/{d} 0:00" for d in range(1, 29)], []),
    "day first": ([f"{d:02}/01/2020" for d in range(1, 29)], []),
    "month first": ([f"1/{d}/2020 1:30 PM" for d in range(1, 29)], []),
    "German": ([f"01.{m:02}.2020 00:00" for m in range(1, 13)], []),
    "noon": (["1/31/2020 11:00 AM", "1/31/2020 12:00 PM", "1/31/2020 1:00 PM"], []),
    "zones": (
        ["2020-01-01T00:30:00Z", "2020-01-01T02:00:00+01:00", "2020-01-01T00:00:00-01:30"], [],
    ),
    "gap": (
        [*HOURS[:3], *HOURS[5:9], *HOURS[12:]],
        [
            "2 gaps in the time stamps, the longest of 4:00:00 before row 9; "
            "the usual step is 1:00:00."
        ],
    ),
    "twice": (
        [*HOURS[:3], *HOURS[2:]],
        ["1 time stamps are the same as the one before, the first in row 5."],
    ),
    "backwards": (HOURS[::-1], ["Time stamps descend: the series runs backwards."]),
    "not in order": (
        [*HOURS[:3], HOURS[4], HOURS[3], *HOURS[4:]],
        [
            "1 time stamps are earlier than the one before, the first in row 6.",
            "1 gaps in the time stamps, the longest of 2:00:00 before row 5; "
            "the usual step is 1:00:00.",
        ],
    ),
    "two orders": (
        ["01/02/2020", "02/02/2020"],
        ["Time stamps were not checked: that of row 2 can't be read."],
    ),
    "no date": (
        [*DAYS[:3], "2020-01-44", *DAYS[4:]],
        ["Time stamps were not checked: that of row 5 can't be read."],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "stamps", "left_out", "said"),
    [
        ("Date", ["1 Jan 2020", "2 Jan 2020", "9 Jan 2020"], "text", "those of 'Date'"),
        ("Date", ["01/13/20", "01/14/20", "01/19/20"], "text", "those of 'Date'"),
        ("when", ["10:00", "10:01", "10:09"], "time stamps", "'when' has no date."),
    ],
)
def test_time_stamps_that_are_not_checked_are_named(tmp_path, header, stamps, left_out, said):
    table = read_table(write(tmp_path, dated([1.5, 2.5, 3.5], stamps, f"{header},a")))
    assert table.left_out == {header: left_out}
    (note,) = table.notes
    assert note.startswith(f"Time stamps were not checked: {said}")


@pytest.mark.parametrize("name", STAMPED)
def test_time_stamps_are_checked(name, tmp_path):
    stamps, said = STAMPED[name]
    table = read_table(write(tmp_path, dated([1.5] * len(stamps), stamps)))
    assert table.left_out == {"date": "time stamps"}
    assert list(table.notes) == said


def test_stamps_of_numbers_and_of_two_columns_are_checked(tmp_path):
    numbers = [3600 * i for i in (0, 1, 2, 4)]
    table = read_table(write(tmp_path, dated([1.5] * 4, numbers, "epoch,a")))
    assert table.notes == (
        "1 gaps in the time stamps, the longest of 7200 before row 5; the usual step is 3600.",
    )
    # Of two columns that are stamps the first is checked, in its own unit.
    both = [f"{hour},{i}" for hour, i in zip(HOURS[:3] + HOURS[5:6], numbers, strict=True)]
    table = read_table(write(tmp_path, dated([1.5] * 4, both, "date,epoch,a")))
    assert "the longest of 3:00:00 before row 5" in table.notes[0]
    halves = [1000 + i / 2 for i in range(6)]  # no years
    assert read_table(write(tmp_path, dated([1.5] * 6, halves, "time,a"))).notes == ()
    table = read_table(write(tmp_path, dated([1.5] * 3, ["20200131", "20200201", "20200203"])))
    assert "1 gaps in the time stamps, the longest of 2 days" in table.notes[0]
    clocks = [f"{day},{hour:02}:30:00" for day in DAYS[:2] for hour in range(24)]
    table = read_table(write(tmp_path, dated([1.5] * 48, clocks, "Date,Time,a")))
    assert (table.left_out, table.notes) == ({"Date": "time stamps", "Time": "time stamps"}, ())
    table = read_table(write(tmp_path, dated([1.5] * 47, clocks[:20] + clocks[21:], "Date,Time,a")))
    assert "before row 22" in table.notes[0]


def test_many_rows_are_read_in_blocks(tmp_path, monkeypatch):
    """A bad cell, and a change of decimal marks, behind the first block."""
    monkeypatch.setattr(series, "BLOCK", 4)
    values = np.random.default_rng(0).standard_normal((11, 2))
    rows = [f"{a!r};{b!r}" for a, b in values.tolist()]
    assert read_table(write(tmp_path, "\n".join(["a;b", *rows]))).values.tolist() == values.tolist()
    rows[9] = "1.5;x"
    with pytest.raises(ValueError, match=r"'x' in row 11, column 2 \(b\)"):
        read_table(write(tmp_path, "\n".join(["a;b", *rows])))
    rows[9] = "1,5;2"
    with pytest.raises(ValueError, match="one decimal mark"):
        read_table(write(tmp_path, "\n".join(["a;b", *rows])))


def test_sizes_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(series, "MAX_BYTES", 1000)
    read_table(write(tmp_path, "a\n" + "1\n" * 499))
    for content in (b"a\n" + b"1\n" * 500, gzip.compress(b"a\n" + b"1\n" * 500)):
        with pytest.raises(
            ValueError, match=r"at most 1000 bytes, got more than 1000 bytes in d.csv"
        ):
            read_table(write(tmp_path, content))


def test_constant_is_relative_to_the_size_of_a_channel():
    steps = np.arange(1000)[:, None] % 2
    moving = np.concatenate([1e9 + 2 * steps, 1e-12 * steps, 1e300 * steps], axis=1)
    still = np.concatenate([np.full((1000, 1), v) for v in (14.62, 0.1, 0.0, -1e9 - 0.1)], axis=1)
    assert not constant_channels(moving).any()
    assert constant_channels(still * (1 + 1e-15 * steps)).all()


# name of a file: rows that are unusual
REAL = {
    "ETTh1": 0, "ETTh2": 0, "ETTm1": 0, "ETTm2": 0, "exchange_rate": 0, "national_illness": 0,
    "weather": 2, "electricity_first55rows": 0, "traffic_first25rows": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_number_by_number(name, real_data):
    path = real_data / f"{name}.csv.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    table = read_table(path)
    assert list(table.columns) == lines[0].split(",")[1:]
    assert table.left_out == {"date": "time stamps"}
    assert len(table.notes) == REAL[name]
    expected = [[float(cell) for cell in line.split(",")[1:]] for line in lines[1:]]
    assert np.array_equal(table.values, expected)
