"""One look for every figure: palette, grid, labels, and the note that stands for missing data."""

from typing import Any

import numpy as np

BLUE = "#2563a8"
ORANGE = "#d9772b"
GREEN = "#2f8f5b"
RED = "#c0392b"
PURPLE = "#7d5ba6"
TEAL = "#2a9d9d"
GREY = "#6b7280"
INK = "#1f2937"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, GREY)
GRID = "#e5e7eb"

WIDTH_INCHES = 8.0
DOTS_PER_INCH = 110  # readable at its own size on a page 900 pixels wide


def figure(
    panels: int = 1, *, height: float = 4.2, shared_x: bool = True, ratios: Any = None
) -> tuple[Any, list[Any]]:
    """Makes a figure of stacked panels, outside matplotlib's global state.

    Args:
      panels: how many, from top to bottom.
      height: of the whole figure, in inches.
      shared_x: whether the panels have one horizontal axis.
      ratios: relative heights of the panels; None makes them equal.

    Returns:
      The figure and its axes.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    grid = made.subplots(
        panels,
        1,
        sharex=shared_x,
        squeeze=False,
        gridspec_kw=None if ratios is None else {"height_ratios": ratios},
    )
    axes = list(grid[:, 0])
    for axis in axes:
        _dress(axis)
    return made, axes


def label(axis: Any, *, title: str = "", x: str = "", y: str = "") -> None:
    """Writes the title and the names of the axes, units included."""
    if title:
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)


def legend(axis: Any, **options: Any) -> None:
    """Shows the legend where something has a label."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def missing(axis: Any, what: str) -> None:
    """Replaces an empty panel by a sentence."""
    axis.text(
        0.5, 0.5, f"not recorded: {what}", transform=axis.transAxes, ha="center", va="center",
        color=GREY, style="italic",
    )  # fmt: skip
    axis.grid(visible=False)
    axis.set_yticks([])
    if not any(other.lines for other in axis.get_shared_x_axes().get_siblings(axis)):
        axis.tick_params(labelbottom=False)
    for side in axis.spines.values():
        side.set_visible(False)


def reference_line(axis: Any, value: int | float, text: str, color: str = GREY) -> None:
    """Draws a dashed horizontal line with its meaning written on it, at the right."""
    axis.axhline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
    axis.annotate(
        text, xy=(1, value), xycoords=("axes fraction", "data"), xytext=(-4, 0),
        textcoords="offset points", ha="right", va="center", fontsize=9, color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2.0}, zorder=5,
    )  # fmt: skip


def remark(axis: Any, text: str) -> None:
    """Writes a short fact at the right, above a panel."""
    axis.set_title(text, loc="right", fontsize=9, color=GREY)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values around each position.

    Args:
      values: [S].
      window: how many values are averaged. Near the start, where curves are steep, as many on each
        side as there are before; near the end, those that there are.

    Returns:
      [S]; NaN where no value is finite.
    """
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    here = np.arange(len(values))
    before = np.minimum(window // 2, here)
    first, end = here - before, np.minimum(here + before, len(values) - 1) + 1
    number = counts[end] - counts[first]
    total = totals[end] - totals[first]
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)


def _dress(axis: Any) -> None:
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, length=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    for name, side in axis.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color("#9ca3af")
