"""How busy other processes keep the machine: with that, figures for several threads stand or fall."""

import os
import time


class Neighbours:
    """Watches from its construction on."""

    def __init__(self):
        self._start = _now()

    def cores(self) -> float | None:
        """How many cores others have used on average, None where the system does not tell."""
        busy, own, clock = (end - start for end, start in zip(_now(), self._start, strict=True))
        return max(0.0, busy - own) / clock if busy > 0 else None


def _now() -> tuple[float, float, float]:
    """Seconds: of work on all cores, of this process's own, and of the clock."""
    return _busy_seconds(), time.process_time(), time.perf_counter()


def _busy_seconds() -> float:
    """Since the machine started, as Linux tells; elsewhere 0."""
    try:
        with open("/proc/stat") as lines:
            user, nice, system, _idle, _iowait, *interrupts_and_stolen = map(int, next(lines).split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
