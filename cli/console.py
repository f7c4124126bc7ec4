"""What the terminal shows: tables and figures on stdout, progress on stderr. Rich only here."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mskip.compressor.progress import Progress, silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Cell = str | Text

MAX_WIDTH = 100
PASSED, FAILED, WARNED, DIM = "green", "bold red", "yellow", "dim"


def prepare() -> None:
    """Make this process's output fit for people: no library chatter, no encoding errors.

    Environment and filters only, so that no heavy package is imported; what the user has
    set stays.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else forks warn
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main_process() -> bool:
    """Whether this process speaks; under `accelerate launch` only the first one does."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return rank == "0"


def console(*, stderr: bool = False) -> Console:
    """A console of at most `MAX_WIDTH` columns that prints text as it stands."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    made.width = min(made.width, MAX_WIDTH)
    return made


def say(text: Cell = "", style: str | None = None, *, whole: bool = False) -> None:
    """Print a line on stdout, wrapped between words; ``whole`` never wraps (paths, commands)."""
    console().print(text, style=style, soft_wrap=whole)


def note(text: str) -> None:
    """Print a line about what goes on, on stderr."""
    if main_process():
        console(stderr=True).print(text, style="bold", soft_wrap=True)


def complain(message: str, remedy: str) -> None:
    """Print an error and what to do about it on stderr."""
    screen = console(stderr=True)
    screen.print(Text.assemble(("error: ", FAILED), message), soft_wrap=not screen.is_terminal)
    if remedy:
        screen.print(remedy, soft_wrap=not screen.is_terminal)


def emit(report: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a report: as JSON and nothing else, or by ``show``. Only the main process does."""
    if not main_process():
        return
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


def shown(path: Path | str) -> str:
    """A path from here, where it lies below this folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# -- figures ----------------------------------------------------------------------------------


def shares(capacity: float | None, digits: int = 3) -> str:
    """A capacity with its skip rate, for a column headed "capacity (skip rate)"."""
    if capacity is None:
        return "not run"
    return f"{capacity:.{digits}f} ({1 - round(capacity, digits):.{digits}f})"


def capacity_words(capacity: float) -> str:
    """A capacity with its skip rate, in a sentence."""
    return f"{capacity:.3f} (skip rate {1 - round(capacity, 3):.3f})"


def milliseconds(value: float | None) -> str:
    """Three or more significant digits."""
    if value is None:
        return "not run"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value: float) -> str:
    """A duration as a person says it."""
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value // 60:.0f} min {value % 60:02.0f} s"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: 3, 5-7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def bar(share: float, width: int) -> str:
    """A horizontal bar of ``share`` of ``width`` columns, to an eighth of a column."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width, "·")


def histogram(values: Sequence[float], mark: float, bins: int) -> str:
    """How values in 0..1 are spread, one character a bin, with a │ where ``mark`` stands."""
    counts = [0] * bins
    for value in values:
        counts[min(int(value * bins), bins - 1)] += 1
    top = max(counts) or 1
    drawn = [" ▁▂▃▄▅▆▇█"[-(-count * 8 // top)] for count in counts]
    place = min(max(round(mark * bins), 0), bins)
    return "".join(drawn[:place]) + "│" + "".join(drawn[place:])


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table on stdout.

    Args:
        title: stands above it.
        columns: headings; ">" before one sets its column to the right.
        rows: cells as text, taken as it stands.
    """
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    made.show_edge = False
    made.show_header = any(columns)
    for heading in columns:
        right = heading.startswith(">")
        made.add_column(heading.removeprefix(">"), justify="right" if right else "left")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    screen = console()
    screen.print()
    screen.print(made)


def verdict(passed: bool) -> Text:
    """The word and the colour of a gate."""
    return Text("passed", PASSED) if passed else Text("FAILED", FAILED)


def decision(executed: bool) -> Text:
    """The word and the colour of a decision."""
    return Text("executed") if executed else Text("skipped", "cyan")


# -- progress ---------------------------------------------------------------------------------


class _Bars:
    """A bar a stage, for a terminal."""

    def __init__(self, bars: RichProgress) -> None:
        self.bars = bars
        self.stage = ""
        self.task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if self.task is None or stage != self.stage:
            self.close()
            self.stage = stage
            self.task = self.bars.add_task(stage, total=total, note=note)
        self.bars.update(self.task, completed=done, total=total, note=note)

    def close(self) -> None:
        """End the current stage where it stands: some need fewer units than they may take."""
        if self.task is not None:
            self.bars.update(self.task, total=max(self.bars.tasks[-1].completed, 1))


class _Lines:
    """A line a stage, for a log: its name when it begins, time and last note when it ends."""

    def __init__(self) -> None:
        self.stage = ""
        self.note = ""
        self.started = 0.0

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage != self.stage:
            self.close()
            self.stage, self.note, self.started = stage, "", time.monotonic()
            self._write(f"{stage} ... ")
        self.note = note

    def close(self) -> None:
        """End the line."""
        if self.stage:
            note = f"  {self.note}" if self.note else ""
            self._write(f"{seconds(time.monotonic() - self.started)}{note}\n")
        self.stage = ""

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


@contextmanager
def progress() -> Iterator[Progress]:
    """A `Progress` that shows stages on stderr while the block runs."""
    if not main_process():
        yield silent
        return
    screen = console(stderr=True)
    if not screen.is_terminal:
        lines = _Lines()
        try:
            yield lines
        finally:
            lines.close()
        return
    # Only here: most commands, --help with them, show no bar.
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn(
            "{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=screen, expand=True) as display:
        bars = _Bars(display)
        yield bars
        bars.close()
