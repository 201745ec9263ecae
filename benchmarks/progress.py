"""A progress bar on standard error, if somebody is looking."""

import sys
import time
from types import TracebackType

WIDTH = 30  # characters
REFRESH_SECONDS = 0.25


class Progress:
    """Shows how far a run is. Where nobody is looking, it says only which run begins."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._began = time.monotonic()
        self._shown = 0.0
        self._live = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        if not self._live:
            print(self._title, file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            print(file=sys.stderr)

    def say(self, state: str) -> None:
        self._show(state, self._total if state == "ending" else 0)

    def update(self, sent: int, done: int) -> None:
        if done == self._total or time.monotonic() - self._shown > REFRESH_SECONDS:
            self._show(f"{done}/{self._total} answered, {sent - done} in progress", done)

    def _show(self, state: str, done: int) -> None:
        self._shown = time.monotonic()
        if self._live:
            bar = ("█" * (WIDTH * done // self._total)).ljust(WIDTH, "░")
            text = f"{self._title} {bar} {state}, {self._shown - self._began:.0f} s"
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
