"""Progress on stderr: the current stage, its time left, the stages to come; and how long each stage took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from mm_edge.errors import visible

# Reports progress: (steps done, of how many).
Advance = Callable[[int, int], None]

LOG_INTERVAL_S = 10.0
SHOWN = 3  # stages to come that are shown by name beside the current one


class Terminal(Console):
    """A console on which text cannot act: what does not print is shown as an escape, apart from ends of lines."""

    def __init__(self, **settings: Any) -> None:
        """Take the settings of a rich console.

        Numbers and paths in text are not coloured: finding them takes the square of the text's length, which the name
        in somebody's file can make minutes.
        """
        super().__init__(**{"highlight": False, **settings})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable with visible text; those of rich that move the cursor stay."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                text = "\n".join(visible(line) for line in segment.text.split("\n"))
                yield Segment(text, segment.style, segment.control)


class Stages:
    """Times the stages of a run and shows the progress of the current one.

    Attributes:
        seconds: wall-clock seconds per stage, in the order they ran; for a resumed stage, of this run alone.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Show progress on `console`; None shows nothing."""
        self.seconds: dict[str, float] = {}
        self._console = console
        self._to_come: tuple[str, ...] = ()

    def expect(self, names: Sequence[str]) -> None:
        """Show `names` as the stages to come, in this order. A later one that starts removes those before it."""
        self._to_come = tuple(names)
        if self._to_come:
            self.tell(f"stages to come: {', '.join(self._to_come)}")

    def tell(self, line: str) -> None:
        """Show one line, for example that a lost connection is made again."""
        if self._console is not None:
            self._console.print(visible(line), highlight=False, markup=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Run the body as stage `name`; call what is yielded with (done, total) to move the bar."""
        start = time.monotonic()
        if name in self._to_come:
            self._to_come = self._to_come[self._to_come.index(name) + 1 :]
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
        start = time.monotonic()
        if self._console.is_terminal:
            with Progress(*_columns(), console=self._console, transient=True) as progress:
                task = progress.add_task(name, total=None, then=self._then())
                yield lambda done, total: progress.update(task, completed=done, total=total)
        else:
            yield self._log(name)
        self._console.print(f"[dim]{name}: {time.monotonic() - start:.1f} s[/dim]", highlight=False)

    def _then(self) -> str:
        """Return the stages to come in a few words, the first SHOWN by name."""
        if not self._to_come:
            return ""
        more = len(self._to_come) - SHOWN
        return f"then {', '.join(self._to_come[:SHOWN])}" + (f" and {more} more" if more > 0 else "")

    def _log(self, name: str) -> Advance:
        """Return an `Advance` that prints a line every LOG_INTERVAL_S seconds, for output that is no terminal."""
        console, start = self._console, time.monotonic()
        last = start

        def advance(done: int, total: int) -> None:
            nonlocal last
            if console is not None and done < total and time.monotonic() - last > LOG_INTERVAL_S:
                last = time.monotonic()
                left = f", about {_words((last - start) * (total - done) / done)} left" if done else ""
                then = f"; {self._then()}" if self._to_come else ""
                console.print(f"{name}: {done} of {total}{left}{then}", highlight=False)

        return advance


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[then]}[/dim]"),
    )


def _words(seconds: float) -> str:
    """Return a length of time as it is said: 40 s, 3 min."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
