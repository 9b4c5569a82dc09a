import types

import pytest
import turns


def item(nodeid, *marks):
    return types.SimpleNamespace(nodeid=nodeid, get_closest_marker=dict.fromkeys(marks, True).get)


ITEMS = [item(f"tests/test_a.py::test_b[{i}]", *["long"] * (i % 3 > 0)) for i in range(300)]


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


def test_what_is_left_out_is_the_rest():
    taken, left = turns.split(ITEMS, "1/4")
    assert left
    assert sorted(map(id, taken + left)) == sorted(map(id, ITEMS))
