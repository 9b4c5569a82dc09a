"""A progress bar on the terminal below the tables, where tqdm is installed."""

import importlib
from types import TracebackType


class Progress:
    """A bar that counts cases. A context manager: the bar is closed at its end."""

    def __init__(self, cases: int):
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            self._bar = None
        else:
            # disable=None shows the bar on terminals only.
            self._bar = tqdm(total=cases, unit="case", disable=None, leave=False, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, case: str) -> None:
        """Shows the case that is being measured."""
        if self._bar is not None:
            self._bar.set_postfix_str(case)

    def advance(self) -> None:
        """Counts a case as done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.clear()
            print(line, flush=True)
            self._bar.refresh()
