"""How fast a run goes, how much of the machine it uses, and how long it still takes."""

import time

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.model import accounting
from kimi_jax.training.device_peak import measure_matmul_peak, process_memory_bytes

_SMOOTHING = 0.9  # weight of the past in the average that predicts the time left


class Throughput:
    """Measures steps by the time between calls."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Measures the matrix product peak of the devices, which takes about a second."""
        self.peak_flops_per_second = measure_matmul_peak(config.compute.dtype.value)
        self._config = config
        self._flops = accounting.train_flops_per_step(
            config.model, config.training.batch_sequences, config.data.sequence_length
        )
        self._average: float | None = None
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Starts the clock of the next step now, after work that is no part of a step."""
        self._last = time.perf_counter()

    def tick(self, steps_left: int) -> dict[str, float]:
        """Ends a step and returns its metrics.

        Args:
          steps_left: how many steps the run still has to take.
        """
        now = time.perf_counter()
        seconds = now - self._last
        self._last = now
        # The first step compiles; the average forgets it as soon as there is a second one.
        known = self._average is not None and self._average <= 2 * seconds
        self._average = (
            _SMOOTHING * self._average + (1 - _SMOOTHING) * seconds if known else seconds
        )
        flops_per_second = self._flops / seconds
        return {
            "throughput/step_seconds": seconds,
            "throughput/tokens_per_second": self._config.batch_tokens / seconds,
            "throughput/model_flops_per_second": flops_per_second,
            "throughput/share_of_peak": flops_per_second / self.peak_flops_per_second,
            "memory/bytes_in_use": process_memory_bytes(),
            "time/seconds_left": self._average * steps_left,
        }
