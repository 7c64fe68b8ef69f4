"""Reads the files that a run leaves in its work directory.

`metrics.jsonl` has one object a line: `step`, `seconds`, and scalars by name. `layers.jsonl` has
`step` and arrays by name. `config.json` is the configuration, `summary.json` the result. The names
of metrics are listed in `training/metric_log.py`. A file that is missing counts as empty; a last
line without its end is left out, because the run may be writing it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kimi_jax.core.errors import DataError


@dataclasses.dataclass(frozen=True)
class RunLog:
    """What was read.

    Attributes:
      workdir: where from.
      metrics: records of `metrics.jsonl`, in the order of the file.
      layers: records of `layers.jsonl`.
      config: nested options of the run.
      summary: results of the run; empty while it goes on.
    """

    workdir: pathlib.Path
    metrics: tuple[Mapping[str, Any], ...]
    layers: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A scalar over time.

        Args:
          name: of the metric.

        Returns:
          Steps and values, float64 [S] each; NaN where the value was not finite, empty where the
          metric was never recorded.
        """
        return _collect(self.metrics, name)

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """An array over time.

        Args:
          name: of the metric.

        Returns:
          Steps [S] and values [S, ...], float64, as `series` gives them.
        """
        return _collect(self.layers, name)

    def setting(self, path: str, default: Any = None) -> Any:
        """An option of the config by its dotted path, or `default` where there is none."""
        node = self.config
        for key in path.split("."):
            if not isinstance(node, Mapping) or key not in node:
                return default
            node = node[key]
        return node

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimizer step, where the config tells."""
        sequences = self.setting("training.batch_sequences")
        length = self.setting("data.sequence_length")
        return None if sequences is None or length is None else sequences * length


def read_run(workdir: str | pathlib.Path) -> RunLog:
    """Reads a finished or a running run.

    Args:
      workdir: folder of the run.

    Raises:
      DataError: the folder does not exist, or a file is not JSON.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise DataError(f"{workdir} is not a folder; give the work directory of a run")
    return RunLog(
        workdir=workdir,
        metrics=_read_lines(workdir / "metrics.jsonl"),
        layers=_read_lines(workdir / "layers.jsonl"),
        config=_read_object(workdir / "config.json"),
        summary=_read_object(workdir / "summary.json"),
    )


def _collect(records: tuple[Mapping[str, Any], ...], name: str) -> tuple[np.ndarray, np.ndarray]:
    having = [record for record in records if name in record]
    steps = np.array([record["step"] for record in having], np.float64)
    # null stands for a number that was not finite; NumPy reads it as NaN
    values = np.array([record[name] for record in having], np.float64)
    return steps, values


def _read_lines(path: pathlib.Path) -> tuple[Mapping[str, Any], ...]:
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return tuple(_parse(line, f"line {i} of {path}") for i, line in enumerate(whole, start=1))


def _read_object(path: pathlib.Path) -> Mapping[str, Any]:
    return _parse(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error}; repair it or remove it") from error
