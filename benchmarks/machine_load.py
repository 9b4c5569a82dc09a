"""How busy other processes keep the machine: measurements of several threads depend on it."""

import os
import time
from collections.abc import Callable


class LoadMonitor:
    """Measures the load of other processes, from its construction on.

    Args:
      worker_seconds: returns the processor time that our own processes beside this one have used.
    """

    def __init__(self, worker_seconds: Callable[[], float]):
        self._worker_seconds = worker_seconds
        self._start = self._now()

    def cores_used_by_others(self) -> float | None:
        """Returns how many cores other processes used on average; None where the system does not tell."""
        busy, ours, clock = (end - start for end, start in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - ours) / clock if busy > 0 else None

    def _now(self) -> tuple[float, float, float]:
        """Seconds of all cores, of our own processes, and of the clock."""
        return _busy_seconds(), time.process_time() + self._worker_seconds(), time.perf_counter()


def _busy_seconds() -> float:
    """The time that all cores have worked since the machine started, as Linux tells it; 0 elsewhere."""
    try:
        with open("/proc/stat") as lines:
            user, nice, system, _idle, _iowait, *interrupts_and_stolen = map(int, next(lines).split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
