import types

import pytest
import turns


def item(nodeid, long=None, **parameters):
    return types.SimpleNamespace(
        nodeid=nodeid,
        get_closest_marker={"long": long and long.mark}.get,
        callspec=types.SimpleNamespace(params=parameters),
    )


ITEMS = [item(f"tests/test_a.py::test_b[{i}]", pytest.mark.long if i % 3 else None) for i in range(300)]


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_every_long_test_is_in_one_part_and_others_in_all(parts):
    taken = [turns.split(ITEMS, f"{part}/{parts}")[0] for part in range(parts)]
    for each in ITEMS:
        is_long = each.get_closest_marker("long")
        assert sum(each in of_part for of_part in taken) == (1 if is_long else parts)
    assert all(len(of_part) < 0.7 * len(ITEMS) for of_part in taken) or parts < 4


@pytest.mark.parametrize("text", ["", "4/4", "1", "-1/4", "0/0", "1/4 "])
def test_a_part_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="TEST_PART must be"):
        turns.split(ITEMS, text)


def test_cases_that_a_mark_leaves_out_are_always_taken():
    long = pytest.mark.long(n=1, m=3)
    items = [item(f"test[{n}-{m}]", long, n=n, m=m, other=n + m) for n in range(8) for m in range(8)]
    always = set.intersection(*(set(map(id, turns.split(items, f"{part}/8")[0])) for part in range(8)))
    assert always == {id(items[8 + 3])}


def test_a_mark_of_a_parameter_that_there_is_not():
    with pytest.raises(KeyError, match="m"):
        turns.split([item("test[1]", pytest.mark.long(m=1), n=1)], "0/1")


def test_what_is_left_out_is_the_rest():
    taken, left = turns.split(ITEMS, "1/4")
    assert left
    assert sorted(map(id, taken + left)) == sorted(map(id, ITEMS))
