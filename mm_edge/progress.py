"""Progress of long stages on stderr, and how long each stage took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int], None]


class Stages:
    """Times the stages of a run and shows the one at work.

    Attributes:
        seconds: wall-clock seconds per stage, in the order they ran; a resumed stage counts what it took this time.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Show progress on `console`; None shows nothing."""
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Run the body as stage `name`; call what is yielded with (done, total) to move the bar."""
        start = time.monotonic()
        try:
            with self._bar(name) as advance:
                yield advance
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)

    @contextlib.contextmanager
    def _bar(self, name: str) -> Iterator[Advance]:
        if self._console is None:
            yield lambda done, total: None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self._console.print(f"[dim]{name}: {progress.tasks[task].finished_time or progress.tasks[task].elapsed or 0:.1f} s[/dim]")
