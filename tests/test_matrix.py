"""The version matrix: which tests are run."""

import matrix


def test_every_test_function_is_chosen_and_each_nth_of_its_parameters():
    ids = ["m::f[0]", "m::f[1]", "m::g", "m::f[2]", "m::f[3]", "n::f[0]"]
    assert matrix.chosen(ids, 3) == ["m::f[0]", "m::f[3]", "m::g", "n::f[0]"]
    assert sorted(matrix.chosen(ids, 1)) == sorted(ids)
    for name in matrix.MODULES:
        assert (matrix.ROOT / "tests" / f"test_{name}.py").is_file(), name
