"""The programs of a run whose weights are rounded from some step on."""

from collections.abc import Callable
from typing import Any

import jax

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.training.step import TrainStep, compile_train_step


def compile_phases(
    config: ExperimentConfig, plan: Any, mesh: jax.sharding.Mesh, *, first_step: int
) -> Callable[[int], TrainStep]:
    """Compiles what a run needs from `first_step` on, each program in a thread of its own.

    The program for rounded weights compiles while the one before it already trains.

    Args:
      config: the run.
      plan: specs of the parameters.
      mesh: the devices.
      first_step: the first step that will be taken.

    Returns:
      `step -> (state, batch) -> (state, metrics)`.
    """
    final = compile_train_step(config.at_step(config.training.num_steps), plan, mesh)
    first = config.at_step(first_step)
    if first == config.at_step(config.training.num_steps):
        return lambda step: final
    early = compile_train_step(first, plan, mesh)
    return lambda step: early if config.at_step(step) == first else final
