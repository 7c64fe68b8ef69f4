"""Shows a run on the terminal: a table at the start, then a live display, or lines in a log file.

The names of the metrics shown are those of `training/metric_log.py`; any of them may be absent.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kimi_jax.parallel.multihost import is_first

LINE_SECONDS = 10.0  # between two lines where the display cannot be redrawn
LOG_FILE_WIDTH = 120  # columns of a table that goes to a file
GIB = 2**30

Rows = Sequence[Sequence[str]]


def print_banner(
    title: str, sections: Mapping[str, Rows], *, console: Console | None = None
) -> None:
    """Prints what a run is before it starts: one table for each section.

    Args:
      title: name of the run.
      sections: rows of text by heading, such as mesh, parameters, optimizer or corpus; the first
        cell of a row says what the others are.
      console: where to; None is standard output.
    """
    console = console or _standard_output()
    console.print(Text(title, style="bold"))
    for heading, rows in sections.items():
        table = Table(title=heading, title_justify="left", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        console.print()
        console.print(table)
    console.print()


class Progress:
    """A context manager that shows the newest metrics of a run.

    On a terminal the display is redrawn in place; elsewhere a line is printed for the first step,
    the last one, and every `line_seconds` between them. Metrics arrive one step late, so after the
    last step the log is flushed and shown once more:

        progress.update(log.latest_step, log.latest)
    """

    def __init__(
        self,
        num_steps: int,
        *,
        console: Console | None = None,
        line_seconds: int | float = LINE_SECONDS,
    ) -> None:
        """Shows nothing yet.

        Args:
          num_steps: steps of the whole run, those before a resumption included.
          console: where to; None is standard output.
          line_seconds: least time between two lines where the display cannot be redrawn.
        """
        self._num_steps = num_steps
        self._console = console or _standard_output()
        self._line_seconds = line_seconds
        self._seen: dict[str, Any] = {}
        self._step: int | None = None
        self._started = time.monotonic()
        self._last_line: float | None = None
        self._printed_step: int | None = None
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._console.is_terminal:
            self._live.stop()
        elif self._printed_step != self._step:
            self._print_line()

    def update(self, step: int | None, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a step.

        Args:
          step: of the metrics, counted from 0; None, before the first were fetched, shows nothing.
          metrics: by name; what is absent keeps the value it was last shown with.
        """
        if step is None:
            return
        self._seen.update(metrics)
        self._step = step
        waited = self._last_line is None or time.monotonic() - self._last_line >= self._line_seconds
        if waited and not self._console.is_terminal:
            self._print_line()

    def note(self, message: str) -> None:
        """Prints a line that stays, above the live display."""
        self._console.print(Text(message), soft_wrap=True)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        self._printed_step = self._step
        parts = [f"step {self._step + 1}/{self._num_steps}"]
        parts += [f"{name} {text}" for name, text in self._values()]
        self._console.print(Text(", ".join(parts)), soft_wrap=True)

    def _render(self) -> Panel:
        done = 0 if self._step is None else self._step + 1
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        waiting = "compiling the first step" if self._step is None else f"step {done}"
        bar.add_row(
            f"{waiting} of {self._num_steps}", ProgressBar(total=self._num_steps, completed=done)
        )
        values = Table.grid(padding=(0, 2), expand=True)
        for _ in range(3):
            values.add_column(style="cyan", no_wrap=True)
            values.add_column(justify="right", no_wrap=True)
        cells = [cell for pair in self._values() for cell in pair]
        for start in range(0, len(cells), 6):
            values.add_row(*cells[start : start + 6])
        return Panel(Group(bar, values))

    def _values(self) -> list[tuple[str, str]]:
        values = [
            (name, text.format(self._seen[metric] * scale))
            for metric, name, text, scale in _SHOWN
            if metric in self._seen
        ]
        values.append(("elapsed", clock(time.monotonic() - self._started)))
        if "time/seconds_left" in self._seen:
            values.append(("left", clock(self._seen["time/seconds_left"])))
        return values


# metric, name on the display, format, factor
_SHOWN = (
    ("loss/train", "loss", "{:.4f}", 1),
    ("eval/bits_per_byte", "held-out bits/byte", "{:.4f}", 1),
    ("optimizer/learning_rate", "learning rate", "{:.2e}", 1),
    ("qk_clip/max_logit", "max logit", "{:.1f}", 1),
    ("qk_clip/heads_clipped", "heads clipped", "{:.0f}", 1),
    ("optimizer/gradient_norm", "gradient norm", "{:.3g}", 1),
    ("throughput/tokens_per_second", "tokens/s", "{:,.0f}", 1),
    ("throughput/share_of_peak", "of peak", "{:.1f} %", 100),
    ("memory/bytes_in_use", "memory", "{:.2f} GiB", 1 / GIB),
)


def clock(seconds: int | float) -> str:
    """Writes a duration as h:mm:ss; `?` where it is not finite."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _standard_output() -> Console:
    if not is_first():
        return Console(quiet=True, force_terminal=False)
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_FILE_WIDTH)
