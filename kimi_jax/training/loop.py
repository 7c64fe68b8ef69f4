"""The loop around the train step."""

import contextlib
import os
from collections.abc import Callable
from contextlib import closing

import jax

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.errors import TrainingInterruptedError
from kimi_jax.data.corpus import Corpus
from kimi_jax.data.device_feed import DeviceFeed, open_feed
from kimi_jax.model import transformer
from kimi_jax.parallel.rules import TOKENS
from kimi_jax.training import faults
from kimi_jax.training import workdir as workdirs
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.metric_log import MetricLog
from kimi_jax.training.phases import compile_phases
from kimi_jax.training.progress import Progress
from kimi_jax.training.state import TrainState, abstract_state, initial_state
from kimi_jax.training.step import make_optimizer
from kimi_jax.training.throughput import Throughput

# Takes stored parameters and the run as it is at the step; returns metrics named eval/...
Evaluation = Callable[[transformer.TransformerParams, ExperimentConfig], dict[str, float]]


def train(
    config: ExperimentConfig,
    workdir: str | os.PathLike,
    corpus: Corpus,
    *,
    mesh: jax.sharding.Mesh,
    evaluate: Evaluation | None,
    read_weights: Callable[[], transformer.TransformerParams] | None = None,
    resume: bool = True,
) -> TrainState:
    """Trains until `training.num_steps`, from the newest checkpoint in `workdir`, if any.

    Args:
      config: the run.
      workdir: folder for `config.json`, metrics and checkpoints.
      corpus: the opened `config.data`.
      mesh: the devices; current (`jax.set_mesh`) while this runs.
      evaluate: measures parameters on held-out text; None where none is held out.
      read_weights: returns what step 0 starts from; None draws it.
      resume: False refuses a folder that holds a run.

    Returns:
      The final state, which is also the newest checkpoint.

    Raises:
      CheckpointMismatchError: the folder holds a run of another configuration.
      TrainingFailedError: the loss or its gradient is no longer finite.
      TrainingInterruptedError: the process was asked to stop; a checkpoint of the last step is
        written.
    """
    plan = transformer.specs(config.model)
    workdir = workdirs.claim(workdir, config, resume=resume)
    every, num_steps = config.training, config.training.num_steps
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        checkpoints = enter(Checkpointer(workdir, keep=every.checkpoints_to_keep))
        first_step = checkpoints.latest_step or 0
        train_step = compile_phases(config, plan, mesh, first_step=first_step)
        layout = jax.NamedSharding(mesh, TOKENS)
        feed = enter(closing(open_feed(corpus, config.data, every.batch_sequences, layout)))
        state = _resume_or_start(config, plan, mesh, checkpoints, feed, read_weights)
        log = enter(MetricLog(workdir, from_step=first_step, lines_every=every.log_every))
        progress = enter(Progress(num_steps))
        stop, throughput = enter(faults.StopRequest(mesh)), Throughput(config)
        for step in range(first_step, num_steps):
            state, metrics = train_step(step)(state, next(feed))
            log.write(step, metrics)  # records the step before: the host never waits for this one
            log.write(step, throughput.tick(num_steps - step - 1))
            faults.check(log.latest_step, log.latest)
            last = step + 1 == num_steps
            if evaluate is not None and (last or _due(step, every.eval_every)):
                log.write(step, evaluate(state.params, config.at_step(step)))
                throughput.restart()
            stopped_by = stop.agreed()
            if last or stopped_by or _due(step, every.checkpoint_every):
                _save(checkpoints, state, feed, log)
            progress.update(log.latest_step, log.latest)
            if stopped_by and not last:
                raise TrainingInterruptedError(step + 1, num_steps, stopped_by, workdir)
    return state


def _resume_or_start(
    config: ExperimentConfig,
    plan: transformer.TransformerParams,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpointer,
    feed: DeviceFeed,
    read_weights: Callable[[], transformer.TransformerParams] | None,
) -> TrainState:
    """Restores the newest checkpoint and the data cursor, or creates the state of step 0."""
    transformation = make_optimizer(config, plan)
    if checkpoints.latest_step is None:
        return initial_state(config, plan, transformation, read_weights and read_weights())
    like = abstract_state(config, plan, transformation, mesh)
    state, cursor = checkpoints.restore(like)
    feed.set_state(cursor)
    return state


def _save(checkpoints: Checkpointer, state: TrainState, feed: DeviceFeed, log: MetricLog) -> None:
    """Saves the state, unless its step's metrics say that it is broken."""
    log.flush()
    faults.check(log.latest_step, log.latest)
    checkpoints.save(state, feed.get_state())


def _due(step: int, every: int | None) -> bool:
    return every is not None and (step + 1) % every == 0
