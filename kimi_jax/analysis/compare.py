"""Curves of several runs in one figure, for ablations and comparisons."""

import enum
from collections.abc import Mapping
from typing import Any

import numpy as np

from kimi_jax.analysis import style
from kimi_jax.analysis.run_log import RunLog
from kimi_jax.core.errors import DataError

SMOOTHING_SHARE = 50  # curves are smoothed over one part in so many of a run


class Across(enum.Enum):
    """What the horizontal axis counts."""

    STEPS = "steps"
    TOKENS = "tokens"
    SECONDS = "seconds"


def curves(
    runs: Mapping[str, RunLog],
    *,
    metric: str = "loss/train",
    across: Across = Across.TOKENS,
    title: str = "Training loss",
    unit: str = "nats per token",
    horizontal: Mapping[str, int | float] | None = None,
    vertical: Mapping[str, int | float] | None = None,
) -> Any:
    """Draws one metric of several runs over each other, smoothed.

    Args:
      runs: logs by label; the order of colours and of the legend.
      metric: name of a scalar.
      across: what the horizontal axis counts.
      title: of the figure.
      unit: of the metric, for the vertical axis.
      horizontal: values to mark by a horizontal line, by their meaning.
      vertical: positions, in the unit of `across`, to mark by a vertical line.

    Returns:
      A matplotlib `Figure`; a run without the metric is named in the legend as not recorded.

    Raises:
      DataError: tokens are asked for and a run's config does not tell them.
    """
    figure, (axis,) = style.figure()
    for position, (name, run) in enumerate(runs.items()):
        color = style.PALETTE[position % len(style.PALETTE)]
        dashes = "-" if position < len(style.PALETTE) else "--"
        steps, values = run.series(metric)
        x = _positions(run, steps, metric, across, name)
        if not len(steps):
            axis.plot([], [], dashes, color=color, label=f"{name}: not recorded")
            continue
        window = len(steps) // SMOOTHING_SHARE
        if window >= 2:
            axis.plot(x, values, dashes, color=color, alpha=0.15, linewidth=0.7)
            values = style.smooth(values, window)
        axis.plot(x, values, dashes, color=color, linewidth=1.6, label=name)
    for text, value in (horizontal or {}).items():
        style.reference_line(axis, value, text)
    for text, value in (vertical or {}).items():
        _vertical_line(axis, value, text)
    style.label(axis, title=title, x=across.value, y=unit)
    _thousands(axis)
    style.legend(axis)
    return figure


def _positions(
    run: RunLog, steps: np.ndarray, metric: str, across: Across, name: str
) -> np.ndarray:
    if across is Across.STEPS or not len(steps):
        return steps
    if across is Across.SECONDS:
        return np.array([r["seconds"] for r in run.metrics if metric in r], np.float64)
    if run.tokens_per_step is None:
        raise DataError(
            f"the config.json of run {name!r} in {run.workdir} lacks training.batch_sequences or "
            "data.sequence_length, so its tokens are unknown; draw it across steps"
        )
    return (steps + 1) * run.tokens_per_step


def _vertical_line(axis: Any, value: int | float, text: str) -> None:
    axis.axvline(value, color=style.GREY, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
    axis.annotate(
        text, xy=(value, 1), xycoords=("data", "axes fraction"), xytext=(0, -4),
        textcoords="offset points", rotation=90, ha="center", va="top", fontsize=9,
        color=style.GREY, bbox={"facecolor": "white", "edgecolor": "none", "pad": 2.0}, zorder=5,
    )  # fmt: skip


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
