"""How far a run is: a bar on the terminal, where tqdm is installed, below the tables."""

import importlib
from types import TracebackType


class Progress:
    """Counts cases. A context manager: the bar ends with it."""

    def __init__(self, cases: int):
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            self._bar = None
        else:
            # disable=None: no bar where nobody watches it.
            self._bar = tqdm(total=cases, unit="case", disable=None, leave=False, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, case: str) -> None:
        """Says what is measured now."""
        if self._bar is not None:
            self._bar.set_postfix_str(case)

    def advance(self) -> None:
        """A case is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, line: str) -> None:
        """A line of a table, above the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.clear()
            print(line, flush=True)
            self._bar.refresh()
