"""What is exhaustive takes turns: of the tests marked ``long``, a run takes one part.

The environment variable ``TEST_PART=K/N`` chooses the K-th of N parts, from 0; ``0/1`` is all. It is a
variable, since tests start processes that run tests, and ``tests/selftest/run`` reads it too.

``@pytest.mark.long(n=5, dtype=np.float32)`` leaves out the cases whose parameters are these: they run always.
"""

import os
import re
import zlib

DEFAULT = "0/16"


def chosen_part(text):
    """(K, N) of ``"K/N"``."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if part >= parts:
        raise ValueError(f"TEST_PART must be K/N with 0 <= K < N, not {text!r}")
    return part, parts


def takes_turns(item):
    """Whether a test is ``long``, and not one of the cases that its mark leaves out."""
    mark = item.get_closest_marker("long")
    if mark is None:
        return False
    runs_always = mark.kwargs and all(item.callspec.params[name] == x for name, x in mark.kwargs.items())
    return not runs_always


def split(items, text):
    """Those of the tests ``items`` that run, and those that are left to other parts."""
    part, parts = chosen_part(text)
    taken, left = [], []
    for item in items:
        # The name decides, so that a test stays in its part when others come and go.
        is_taken = not takes_turns(item) or zlib.crc32(item.nodeid.encode()) % parts == part
        (taken if is_taken else left).append(item)
    return taken, left


def of_this_run(items):
    return split(items, os.environ.get("TEST_PART", DEFAULT))
