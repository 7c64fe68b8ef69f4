"""What stops a run: numbers that are no longer finite, and a user or scheduler that asks it to."""

import math
import signal
from collections.abc import Mapping
from typing import Any

from kimi_jax.core.errors import TrainingFailedError

_WATCHED = ("loss/train", "optimizer/gradient_norm")


def check(step: int | None, metrics: Mapping[str, Any]) -> None:
    """Raises `TrainingFailedError` if the loss or the gradient norm of a step is not finite.

    Args:
      step: the step that the metrics belong to; None before the first.
      metrics: by the names of `metric_log`.
    """
    for name in _WATCHED:
        value = metrics.get(name)
        if value is not None and not math.isfinite(value):
            raise TrainingFailedError(
                f"{name} became {value} at step {step}; no checkpoint was written after it. Start "
                "again from the last checkpoint with a lower optimizer.schedule.peak or a smaller "
                "optimizer.max_grad_norm"
            )


class StopRequest:
    """A context manager that turns SIGINT and SIGTERM into a wish to stop after the current step.

    A second signal acts as it would without.
    """

    def __init__(self) -> None:
        """Listens to nothing yet."""
        self.signal: str | None = None  # name of the one received
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._restore()

    def _receive(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
