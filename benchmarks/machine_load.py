"""How busy other processes keep the machine: with that, figures for several threads stand or fall."""

import os
import time
from collections.abc import Callable


class LoadMonitor:
    """Watches from its construction on."""

    def __init__(self, our_seconds: Callable[[], float]):
        """``our_seconds``: processor time of our own processes beside this one."""
        self._our_seconds = our_seconds
        self._start = self._now()

    def cores(self) -> float | None:
        """How many cores others have used on average, None where the system does not tell."""
        busy, own, clock = (end - start for end, start in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / clock if busy > 0 else None

    def _now(self) -> tuple[float, float, float]:
        """Seconds: of work on all cores, of our own processes, and of the clock."""
        return _busy_seconds(), time.process_time() + self._our_seconds(), time.perf_counter()


def _busy_seconds() -> float:
    """Since the machine started, as Linux tells; elsewhere 0."""
    try:
        with open("/proc/stat") as lines:
            user, nice, system, _idle, _iowait, *interrupts_and_stolen = map(int, next(lines).split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
