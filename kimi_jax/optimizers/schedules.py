"""Learning rate by step: warm-up, stable phase, decay, anneal."""

import jax
import jax.numpy as jnp
import optax

from kimi_jax.configs.optimizer import Decay, ScheduleConfig
from kimi_jax.core.errors import require

_SECTION = "optimizer.schedule"


def learning_rate_schedule(config: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """Builds the schedule of a run of `num_steps` optimizer steps.

    Step s, counted from 0, has gone (s + 1 - start) / length of a phase that begins after `start`
    steps, so that the last step of each phase has exactly the phase's final value, and the first
    step of warm-up already learns.

    Args:
      config: the phases.
      num_steps: length of the run, in optimizer steps.

    Returns:
      A function from step numbers, a Python integer or an integer array of any shape, to float32
      learning rates of that shape; it can be traced.

    Raises:
      ConfigError: the phases are longer than the run, or a value is given for a phase that does not
        exist.
    """
    _check_values(config)
    stable_steps = _stable_steps(config, num_steps)
    decay_start = config.warmup_steps + stable_steps
    anneal_start = decay_start + config.decay_steps
    decays = config.decay_steps > 0 and config.decay is not Decay.CONSTANT
    decayed = config.final if decays else config.peak
    start = decayed if config.anneal_start is None else config.anneal_start

    def learning_rate(step) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1.0
        rate = config.peak * _progress(done, 0, config.warmup_steps)
        if decays:
            fraction = _progress(done, decay_start, config.decay_steps)
            decay = decayed + (config.peak - decayed) * _remaining(config.decay, fraction)
            rate = jnp.where(done > decay_start, decay, rate)
        if config.anneal_steps:
            fraction = _progress(done, anneal_start, config.anneal_steps)
            anneal = start + (config.anneal_final - start) * fraction
            rate = jnp.where(done > anneal_start, anneal, rate)
        return rate

    return learning_rate


def _progress(done: jax.Array, start: int, length: int) -> jax.Array:
    """Fraction of a phase that lies behind, in [0, 1]; an empty phase is over at once."""
    return jnp.clip((done - start) / length, 0.0, 1.0) if length else jnp.ones_like(done)


def _remaining(decay: Decay, fraction: jax.Array) -> jax.Array:
    """How much of the way from `final` to `peak` is left, from 1 to 0."""
    if decay is Decay.COSINE:
        return 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))
    return 1.0 - fraction


def _stable_steps(config: ScheduleConfig, num_steps: int) -> int:
    """Length of the stable phase, which fills the run where it is not given."""
    moving_steps = config.warmup_steps + config.decay_steps + config.anneal_steps
    used_steps = moving_steps + (config.stable_steps or 0)
    require(
        used_steps <= num_steps,
        f"{_SECTION} needs {used_steps} steps (warmup_steps {config.warmup_steps}, stable_steps "
        f"{config.stable_steps}, decay_steps {config.decay_steps}, anneal_steps "
        f"{config.anneal_steps}) but training.num_steps is {num_steps}; shorten a phase or train "
        "longer",
    )
    return num_steps - moving_steps if config.stable_steps is None else config.stable_steps


def _check_values(config: ScheduleConfig) -> None:
    """Raises `ConfigError` for a value that no phase would ever reach."""
    require(
        config.final == 0 or (config.decay_steps > 0 and config.decay is not Decay.CONSTANT),
        f"{_SECTION}.final is {config.final} but nothing decays; set {_SECTION}.decay_steps above "
        f"0 (now {config.decay_steps}) and {_SECTION}.decay to 'cosine' or 'linear' (now "
        f"{config.decay.value!r}), or leave final at 0",
    )
    for name, unused in (("anneal_start", None), ("anneal_final", 0)):
        value = getattr(config, name)
        require(
            value == unused or config.anneal_steps > 0,
            f"{_SECTION}.{name} is {value} but {_SECTION}.anneal_steps is 0; set anneal_steps "
            f"above 0 or leave {name} at {unused}",
        )
