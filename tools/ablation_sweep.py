"""Runs experiments that differ in optimizer, schedule and seed, quickly and each of them once."""

import dataclasses
import functools
import math
import pathlib
import time
from contextlib import closing
from typing import Any

import jax
import numpy as np
import optax

from kimi_jax.analysis.run_log import RunLog, read_run
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import OptimizerConfig, OptimizerName, ScheduleConfig
from kimi_jax.configs.quantization import QuantizationConfig
from kimi_jax.data.batches import Batch
from kimi_jax.data.corpus import open_corpus
from kimi_jax.data.device_feed import open_feed
from kimi_jax.data.pipeline import held_out_batches
from kimi_jax.evaluation.perplexity import HeldOutEvaluation
from kimi_jax.model import transformer
from kimi_jax.optimizers.schedules import learning_rate_schedule
from kimi_jax.parallel import mesh as meshes
from kimi_jax.parallel.rules import TOKENS
from kimi_jax.training import workdir
from kimi_jax.training.metric_log import MetricLog
from kimi_jax.training.progress import clock
from kimi_jax.training.state import TrainState, initial_state
from kimi_jax.training.step import make_optimizer, train_step

_EVALUATIONS = 8  # in one run


class Sweep:
    """Runs experiments that share model and corpus, and remembers finished ones."""

    def __init__(self, base: ExperimentConfig, folder: pathlib.Path) -> None:
        """Opens the corpus.

        Args:
          base: what all runs share.
          folder: where each run has a folder of its own.
        """
        self._folder = folder
        self._corpus = open_corpus(base.data)
        held_out = held_out_batches(self._corpus, base.data, base.training.batch_sequences)
        self._mesh = meshes.make_mesh(base.parallel, base.model.num_routed_experts)
        self._plan = transformer.specs(base.model)
        self._evaluate = HeldOutEvaluation(held_out, self._mesh)
        self._step_of: dict[tuple[OptimizerConfig, QuantizationConfig], Any] = {}
        self._steps_done, self._seconds = 0, 0.0
        self._seen: set[str] = set()
        self.steps_planned = 0
        print(f"measured on {held_out.num_tokens:,} held-out tokens", flush=True)

    def run(
        self, name: str, config: ExperimentConfig, *, rounded: QuantizationConfig | None = None
    ) -> RunLog:
        """Returns the log of a run, which is trained first where that has not been done.

        Args:
          name: of its folder.
          config: the run.
          rounded: how to round its last weights for one more measurement, eval/rounded_loss.
        """
        folder = workdir.claim(self._folder / name, config, resume=True)
        if name not in self._seen:
            self._seen.add(name)
            self.steps_planned -= config.training.num_steps
        if math.isfinite(final_loss(read_run(folder))):
            return read_run(folder)
        started = time.monotonic()
        with jax.set_mesh(self._mesh):
            self._train(config, folder, rounded)
        log = read_run(folder)
        seconds = time.monotonic() - started
        self._steps_done += config.training.num_steps
        self._seconds += seconds
        left = max(0, self.steps_planned) * self._seconds / self._steps_done
        print(
            f"{name}: held-out loss {final_loss(log):.4f}, {seconds:.0f} s, {clock(left)} left",
            flush=True,
        )
        return log

    def _train(
        self, config: ExperimentConfig, folder: pathlib.Path, rounded: QuantizationConfig | None
    ) -> None:
        """Trains without checkpoints; a loss that is not finite ends the run early."""
        training, schedule = config.training, config.optimizer.schedule
        rate_at = learning_rate_schedule(schedule, training.num_steps)
        rates = np.asarray(rate_at(np.arange(training.num_steps)))
        state = initial_state(config, self._plan, make_optimizer(config, self._plan))
        layout = jax.NamedSharding(self._mesh, TOKENS)
        feed = open_feed(self._corpus, config.data, training.batch_sequences, layout)
        with closing(feed), MetricLog(folder, layers_every=1) as log:
            for step, rate in enumerate(rates):
                train_at_rate = self._compiled_step(config.at_step(step))
                state, metrics = train_at_rate(state, next(feed), rate)
                log.write(step, metrics | {"optimizer/learning_rate": rate})
                if (step + 1) % training.eval_every == 0 or step + 1 == training.num_steps:
                    log.write(step, self._evaluate(state.params, config.at_step(step)))
                if not math.isfinite(log.latest.get("loss/train", 0.0)):
                    break
            if rounded is not None:
                measured = self._evaluate(
                    state.params, dataclasses.replace(config, quantization=rounded)
                )
                log.write(step, {"eval/rounded_loss": measured["eval/loss"]})

    def _compiled_step(self, config: ExperimentConfig) -> Any:
        """Returns `(state, batch, rate) -> (state, metrics)`.

        The learning rate is an argument, so that runs that differ in their schedules share a
        program: compiling one takes as long as running it.
        """
        unit = dataclasses.replace(config.optimizer, schedule=ScheduleConfig(peak=1.0))
        key = (unit, config.quantization)
        if key not in self._step_of:
            config = dataclasses.replace(config, optimizer=unit)
            step = functools.partial(step_at_rate, config=config, plan=self._plan)
            self._step_of[key] = jax.jit(step, donate_argnums=0)
        return self._step_of[key]


def step_at_rate(state: TrainState, batch: Batch, rate: Any, *, config: Any, plan: Any) -> Any:
    """Takes the training step of `config`, whose learning rate is 1, at another rate.

    The update, weight decay included, is proportional to the rate.
    """
    unit = make_optimizer(config, plan)

    def update(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = unit.update(gradients, state, params)
        return jax.tree.map(lambda leaf: rate * leaf, updates), state

    transformation = optax.GradientTransformation(unit.init, update)
    return train_step(state, batch, config=config, plan=plan, transformation=transformation)


def vary(
    base: ExperimentConfig,
    *,
    optimizer: OptimizerName,
    peak: float,
    seed: int = 0,
    share: float = 1.0,
) -> ExperimentConfig:
    """Returns `base` with another optimizer, learning rate, seed, or share of its tokens.

    AdamW runs without QK-clip. The seed is of the weights and of the order of the data.
    """
    rescaled = with_peak(base.optimizer.schedule, peak)
    threshold = base.optimizer.qk_clip_threshold if optimizer is OptimizerName.MUON_CLIP else None
    varied = dataclasses.replace(
        base,
        optimizer=dataclasses.replace(
            base.optimizer, name=optimizer, schedule=rescaled, qk_clip_threshold=threshold
        ),
        data=dataclasses.replace(base.data, seed=seed),
        training=dataclasses.replace(base.training, seed=seed),
    )
    return with_steps(varied, round(base.training.num_steps * share))


def with_peak(schedule: ScheduleConfig, peak: float) -> ScheduleConfig:
    """Returns a schedule whose rates are all higher or lower by the same factor."""
    names = ("final", "anneal_start", "anneal_final")
    rates = {name: getattr(schedule, name) for name in names}
    scaled = {name: rate / schedule.peak * peak for name, rate in rates.items() if rate}
    return dataclasses.replace(schedule, peak=peak, **scaled)


def with_steps(config: ExperimentConfig, num_steps: int) -> ExperimentConfig:
    """Returns a longer or shorter run; its phases keep their shares."""
    stretch = num_steps / config.training.num_steps
    schedule = config.optimizer.schedule
    names = ("warmup_steps", "stable_steps", "decay_steps", "anneal_steps")
    phases = {name: getattr(schedule, name) for name in names}
    stretched = {name: round(steps * stretch) for name, steps in phases.items() if steps}
    schedule = dataclasses.replace(schedule, **stretched)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, schedule=schedule),
        training=dataclasses.replace(
            config.training, num_steps=num_steps, eval_every=max(1, num_steps // _EVALUATIONS)
        ),
        quantization=dataclasses.replace(
            config.quantization, start_step=round(config.quantization.start_step * stretch)
        ),
    )


def final_loss(log: RunLog) -> float:
    """Held-out loss at the end of a run, in nats per token; infinite where it did not get there."""
    steps, losses = log.series("eval/loss")
    finished = len(steps) and steps[-1] + 1 == log.setting("training.num_steps")
    return float(losses[-1]) if finished and np.isfinite(losses[-1]) else math.inf
