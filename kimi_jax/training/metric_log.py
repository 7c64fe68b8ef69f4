"""Writes what a run measures to the files that the report, TensorBoard and people read.

Names are stable, and say the unit where it is not obvious. In `metrics.jsonl`, one object a line
with `step` (counted from 0), `seconds` of training so far, and the scalars that were given:

    loss/train                        nats per token, mean over the batch
    loss/balance                      sequence-wise balance loss, already weighted
    eval/loss                         nats per token of held-out text
    eval/bits_per_byte                bits per byte of held-out text
    optimizer/learning_rate
    optimizer/gradient_norm           global, before it is limited
    optimizer/update_rms_muon         root mean square of the update before the learning rate
    optimizer/update_rms_adamw        the same for the parameters that AdamW updates
    qk_clip/max_logit                 largest attention logit of any head in any layer
    qk_clip/heads_clipped             heads clipped in this step
    qk_clip/heads_clipped_ever        heads clipped at least once in this run
    experts/max_violation             largest load of an expert relative to an even one, minus 1
    experts/tokens_dropped            assignments that no expert computed
    throughput/tokens_per_second
    throughput/step_seconds
    throughput/model_flops_per_second
    throughput/share_of_peak          of the measured matrix product peak of all devices, 0 to 1
    memory/bytes_in_use
    time/seconds_left

In `layers.jsonl`, for every n-th step and the last one, the arrays:

    max_logit     [L, N]      largest attention logit
    clipped_ever  [L, N]      whether the head was ever clipped
    expert_load   [L_moe, E]  assignments that each expert received

A number that is not finite is written as null.
"""

import io
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kimi_jax.core.errors import DataError, KimiError
from kimi_jax.parallel.multihost import is_first

METRICS_FILE = "metrics.jsonl"
LAYERS_FILE = "layers.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
EVALUATION = "eval/"  # prefix of what is measured on held-out text

Metrics = Mapping[str, Any]  # name -> float, numpy array or jax.Array


class MetricLog:
    """A context manager that records metrics one step late, so that the host never waits.

    `write` only keeps the arrays it is given, which the device may still be computing, and fetches
    those of the call before, which are done by then. In a run of several processes the first
    alone writes files; arrays must be replicated, since every process fetches them.

    Leaving the context records the last step. Where it is left by an error that is not the run's
    own (`KimiError`) nor an interruption, the arrays not yet fetched are given up, because the
    device may never deliver them.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        from_step: int = 0,
        lines_every: int = 1,
        layers_every: int = 10,
    ) -> None:
        """Opens the files of a run.

        Args:
          workdir: folder of the run; made if it does not exist.
          from_step: step the run starts or resumes with; lines of this step and later ones, which
            were written after the checkpoint, are cut off.
          lines_every: steps between two records of the scalars; a step that was evaluated (with a
            metric eval/...) and the last one are always recorded.
          layers_every: steps between two records of the arrays; the last is always recorded.

        Raises:
          DataError: an earlier line is not JSON.
        """
        self._writer = _Writer(pathlib.Path(workdir), from_step) if is_first() else None
        self._lines_every = lines_every
        self._layers_every = layers_every
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._latest: dict[str, Any] = {}
        self._latest_step: int | None = None
        self._scalars: dict[str, Any] = {}  # of `latest`, in their own precision
        self._line_step: int | None = None
        self._layers_step: int | None = None

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is None or isinstance(error, KimiError | KeyboardInterrupt):
                self.flush()
            if self._latest_step != self._line_step:
                self._write_line()
            if self._latest_step != self._layers_step:
                self._write_layers()
        finally:
            if self._writer is not None:
                self._writer.close()

    @property
    def latest(self) -> dict[str, Any]:
        """Metrics of `latest_step`: a float for each scalar, a numpy array for the rest."""
        return self._latest

    @property
    def latest_step(self) -> int | None:
        """The last step whose metrics were fetched; None before the first."""
        return self._latest_step

    def write(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step and records those of the step before.

        Args:
          step: counted from 0, never smaller than in the call before; another call for the same
            step adds to the first, unless `flush` has recorded it.
          metrics: scalars and arrays by name.
        """
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        if self._pending is not None and self._pending[0] == step:
            self._pending[1].update(metrics)
            return
        self.flush()
        assert self._latest_step is None or step > self._latest_step, (step, self._latest_step)
        self._pending = (step, dict(metrics))

    def flush(self) -> None:
        """Waits for the metrics given last and records them."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        host = jax.device_get(metrics)
        self._latest = {k: float(v) if np.ndim(v) == 0 else np.asarray(v) for k, v in host.items()}
        self._latest_step = step
        self._scalars = {k: v for k, v in host.items() if np.ndim(v) == 0}
        evaluated = any(name.startswith(EVALUATION) for name in self._scalars)
        if evaluated or step % self._lines_every == 0:
            self._write_line()
        if step % self._layers_every == 0:
            self._write_layers()

    def _write_line(self) -> None:
        self._line_step = self._latest_step
        if self._writer is not None:
            self._writer.scalars(self._latest_step, self._scalars)

    def _write_layers(self) -> None:
        self._layers_step = self._latest_step
        arrays = {k: v for k, v in self._latest.items() if isinstance(v, np.ndarray)}
        if arrays and self._writer is not None:
            self._writer.arrays(self._latest_step, arrays)


class _Writer:
    """The open files of one run."""

    def __init__(self, workdir: pathlib.Path, from_step: int) -> None:
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        cut_lines(workdir / LAYERS_FILE, from_step)
        last = cut_lines(workdir / METRICS_FILE, from_step)
        seconds_before = last["seconds"] if last else 0.0
        self._start = time.monotonic() - seconds_before
        self._metrics = open(workdir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._layers = open(workdir / LAYERS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(workdir / TENSORBOARD_FOLDER), purge_step=from_step)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        seconds = round(time.monotonic() - self._start, 3)
        numbers = {name: _plain(value) for name, value in values.items()}
        _append(self._metrics, {"step": step, "seconds": seconds, **numbers})
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)

    def arrays(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        _append(self._layers, {"step": step} | {k: _plain(v) for k, v in values.items()})
        for name, value in values.items():
            finite = np.asarray(value, np.float64)
            finite = finite[np.isfinite(finite)]
            if finite.size:
                self._board.add_histogram(f"layers/{name}", finite, step)

    def close(self) -> None:
        self._metrics.close()
        self._layers.close()
        self._board.close()


def cut_lines(path: pathlib.Path, from_step: int) -> dict[str, Any] | None:
    """Removes the records of `from_step` and later, and a last line that was cut short.

    Args:
      path: a file of one JSON object a line, each with `step`; it need not exist.
      from_step: the first step to remove.

    Returns:
      The last record that is left, or None.

    Raises:
      DataError: a line before the last is not JSON.
    """
    if not path.exists():
        return None
    kept = [record for record in _records(path) if record["step"] < from_step]
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        for record in kept:
            _append(file, record)
        os.fsync(file.fileno())
    temporary.replace(path)
    return kept[-1] if kept else None


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):  # the process was killed while it wrote this
            return
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"line {number} of {path} is not JSON ({error}); it should be one object with "
                "`step`. Repair or remove the line, or choose another work directory"
            ) from error


def _append(file: io.TextIOBase, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def _plain(value: Any) -> int | float | list | None:
    """Numbers as the shortest decimals that read back as the same value in their own precision."""
    if np.ndim(value):
        return [_plain(part) for part in value]
    dtype = np.asarray(value).dtype
    if dtype.kind in "iub":
        return int(value)
    number = float(value)
    if not np.isfinite(number):
        return None
    return number if dtype == np.float64 else float(str(np.float32(number)))
