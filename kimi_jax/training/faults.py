"""What stops a run: numbers that are no longer finite, and a user or scheduler that asks it to."""

import math
import signal
from collections.abc import Mapping
from typing import Any

import jax

from kimi_jax.core.errors import TrainingFailedError
from kimi_jax.parallel.multihost import Maximum

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

    A second signal acts as it would without. One that any process receives stops all of them.
    """

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        """Listens to nothing yet.

        Args:
          mesh: the devices of the run.
        """
        self._received = 0  # number of the signal
        self._highest = Maximum(mesh)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._restore()

    def agreed(self) -> str | None:
        """Returns the name of the signal to stop for, the same in every process; None to go on.

        Every process calls it once a step. With several processes the answer is a step old.
        """
        number = self._highest(self._received)
        return signal.Signals(number).name if number else None

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
