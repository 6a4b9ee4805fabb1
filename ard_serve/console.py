"""What people see in a terminal: progress bars with time left, tables, one-line errors, logging."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

T = TypeVar("T")

# Results go to stdout so that they can be piped; everything about the work itself goes to stderr.
out = Console()
err = Console(stderr=True)


def setup_logging(verbose: bool = False) -> None:
    """Log to stderr, plain when it is not a terminal."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=err, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "filelock", "asyncio", "urllib3", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Warns, where it is imported, of a kernel for CPUs that it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def progress(description: str, total: float) -> Iterator["Bar"]:
    """A progress bar with elapsed and remaining time; off a terminal, a line at most every ten per cent."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=err, disable=not err.is_terminal) as shown:
        yield Bar(shown, description, total)


class Bar:
    """One task of a progress display."""

    def __init__(self, shown: Progress, description: str, total: float) -> None:
        self._shown, self._description, self._total = shown, description, total
        self._task = shown.add_task(description, total=total, note="")
        self._done = 0.0
        self._printed_tenths = 0

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move by `amount` and replace the note behind the bar."""
        self._done += amount
        self._shown.update(self._task, advance=amount, note=note)
        tenths = int(10 * self._done / self._total) if self._total else 10
        if self._shown.disable and tenths > self._printed_tenths:
            self._printed_tenths = tenths
            left = self._shown.tasks[self._task].time_remaining
            tail = f", {left:.0f} s left" if left and tenths < 10 else ""
            err.print(f"{self._description}: {100 * self._done / self._total:.0f}%{tail} {note}", highlight=False)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate over `items` behind a progress bar."""
    with progress(description, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> None:
    """Print one table on stdout; the first `text_columns` columns are text, the others are numbers aligned right."""
    out.print(title, style="italic", highlight=False, soft_wrap=True)  # a table's own title is broken to its width
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < text_columns else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)
