"""One optimizer step: loss and gradients, MuonClip, QK-clip, load balancing, and what to report."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.data.batches import Batch, abstract_batch
from kimi_jax.model import loss, transformer
from kimi_jax.model.stats import ModelStats
from kimi_jax.optimizers import load_balance, muon_clip, qk_clip
from kimi_jax.optimizers.schedules import learning_rate_schedule
from kimi_jax.parallel.rules import TOKENS
from kimi_jax.parallel.topologies import lowering_platform
from kimi_jax.quantization.qat import attach
from kimi_jax.training.accumulate import accumulate, split_micro_batches
from kimi_jax.training.state import TrainState, abstract_state

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_optimizer(config: ExperimentConfig, plan: Any) -> optax.GradientTransformation:
    """Builds the optimizer that the configuration describes."""
    return muon_clip.muon_clip(config.optimizer, plan, config.training.num_steps)


def lower_train_step(
    config: ExperimentConfig, plan: Any, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    """Lowers `train_step` for the mesh, whose devices need not be there.

    Args:
      config: the run.
      plan: specs of the parameters.
      mesh: the devices.

    Returns:
      The program before it is compiled; it gives up its first argument, the old state.
    """
    with jax.set_mesh(mesh):
        transformation = make_optimizer(config, plan)
        step = functools.partial(
            train_step, config=config, plan=plan, transformation=transformation
        )
        state = abstract_state(config, plan, transformation, mesh)
        batch = abstract_batch(
            config.training.batch_sequences,
            config.data.sequence_length,
            jax.NamedSharding(mesh, TOKENS),
        )
        traced = jax.jit(step, donate_argnums=0).trace(state, batch)
        return traced.lower(lowering_platforms=(lowering_platform(mesh.devices.flat[0]),))


def compile_train_step(config: ExperimentConfig, plan: Any, mesh: jax.sharding.Mesh) -> TrainStep:
    """Compiles `train_step` in a thread of its own, beside whatever the caller does meanwhile.

    Args:
      config: the run.
      plan: specs of the parameters.
      mesh: the devices.

    Returns:
      `(state, batch) -> (state, metrics)`, which gives up the old state. Its first call waits for
      the compiler, and raises what the compiler raised.
    """
    compiler = ThreadPoolExecutor(1, thread_name_prefix="compile_train_step")
    compiled = compiler.submit(lambda: lower_train_step(config, plan, mesh).compile())
    compiler.shutdown(wait=False)
    return lambda state, batch: compiled.result()(state, batch)


@jax.named_scope("train_step")
def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: ExperimentConfig,
    plan: transformer.TransformerParams,
    transformation: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step (arXiv 2507.20534, algorithm 1).

    Args:
      state: before the step.
      batch: leaves [B, T], sequences split over the mesh.
      config: the run.
      plan: specs of the parameters.
      transformation: from `make_optimizer`.

    Returns:
      The state after the step and its metrics, by the names of `metric_log`.
    """
    loss_fn = functools.partial(batch_share_of_loss, config=config)
    micro_batches = split_micro_batches(batch, config.training.accumulation_steps)
    working = transformer.to_stages(state.params, config=config.model, choices=config.compute)
    rounded = transformer.quantize(
        state.params,
        config=config.model,
        choices=config.compute,
        quantization=config.quantization,
    )
    constants = (jnp.sum(batch.weights), rounded)
    gradients, parts, stats = accumulate(loss_fn, working, micro_batches, constants)
    gradients = transformer.from_stages(gradients, config=config.model)
    with jax.named_scope("optimizer"):
        updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    params, clipped = clip_attention(params, plan, stats, config=config)
    params = balance_experts(params, stats, config=config)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        optimizer=optimizer,
        clipped_ever=state.clipped_ever | clipped,
        rng=state.rng,
    )
    metrics = parts | _metrics(new_state, clipped, stats, config=config)
    return new_state, metrics


def batch_share_of_loss(
    params: transformer.TransformerParams,
    micro_batch: Batch,
    constants: tuple[jax.Array, Any],
    *,
    config: ExperimentConfig,
) -> tuple[jax.Array, tuple[Metrics, ModelStats]]:
    """Returns a micro-batch's share of the batch's loss, of parameters from `to_stages`.

    sum(weight * -log p) / total_weight, the weight of the whole batch, plus alpha times the mean of
    the balance losses over the batch's sequences and layers.

    Args:
      params: differentiated.
      micro_batch: some of the batch's rows.
      constants: total_weight, and the quantised weights from `transformer.quantize`.
      config: the run.

    Returns:
      The share, and with it its parts by name and the statistics.
    """
    total_weight, rounded = constants
    params = attach(params, rounded)
    losses, stats = loss.batch_losses(
        params, micro_batch, config=config.model, choices=config.compute
    )
    cross_entropy = jnp.sum(losses * micro_batch.weights) / total_weight
    parts = {"loss/train": cross_entropy}
    weight = config.optimizer.balance_loss_weight
    if weight is None or stats.balance_loss is None:
        return cross_entropy, (parts, stats)
    sequences = config.training.batch_sequences * config.model.num_moe_layers
    parts["loss/balance"] = weight * stats.balance_loss / sequences
    return cross_entropy + parts["loss/balance"], (parts, stats)


@jax.named_scope("qk_clip")
def clip_attention(
    params: transformer.TransformerParams,
    plan: transformer.TransformerParams,
    stats: ModelStats,
    *,
    config: ExperimentConfig,
) -> tuple[transformer.TransformerParams, jax.Array]:
    """Applies QK-clip to the updated master weights with the maxima of this step's forward pass.

    The compute copies are cast from the masters when a layer runs, so they are clipped with them.

    Returns:
      The parameters, and which heads were clipped, bool [L, N].
    """
    threshold = config.optimizer.qk_clip_threshold
    if threshold is None:
        return params, jnp.zeros(stats.max_logit.shape, bool)
    dense = config.model.num_dense_layers
    maxima = {"dense_blocks": stats.max_logit[:dense], "moe_blocks": stats.max_logit[dense:]}
    clipped_stacks = {
        name: qk_clip.qk_clip(
            getattr(params, name), getattr(plan, name), maximum, threshold=threshold
        )
        for name, maximum in maxima.items()
        if getattr(params, name) is not None
    }
    clipped = qk_clip.clipped_heads(stats.max_logit, threshold=threshold)
    return dataclasses.replace(params, **clipped_stacks), clipped


def balance_experts(
    params: transformer.TransformerParams, stats: ModelStats, *, config: ExperimentConfig
) -> transformer.TransformerParams:
    """Moves the routers' selection biases towards an even load."""
    rate = config.optimizer.selection_bias_rate
    if rate is None or params.moe_blocks is None:
        return params
    moe = params.moe_blocks.feed_forward
    bias = load_balance.balance_selection_bias(
        moe.router.selection_bias, stats.expert_load, rate=rate
    )
    moe = moe.replace(router=moe.router.replace(selection_bias=bias))
    return params.replace(moe_blocks=params.moe_blocks.replace(feed_forward=moe))


def _metrics(
    state: TrainState, clipped: jax.Array, stats: ModelStats, *, config: ExperimentConfig
) -> Metrics:
    schedule = learning_rate_schedule(config.optimizer.schedule, config.training.num_steps)
    metrics = {
        "optimizer/learning_rate": schedule(state.step - 1),
        "qk_clip/max_logit": jnp.max(stats.max_logit),
        "qk_clip/heads_clipped": jnp.sum(clipped),
        "qk_clip/heads_clipped_ever": jnp.sum(state.clipped_ever),
        "max_logit": stats.max_logit,
        "clipped_ever": state.clipped_ever,
    }
    if stats.expert_load is not None:
        metrics["experts/max_violation"] = jnp.max(load_balance.max_violation(stats.expert_load))
        metrics["expert_load"] = stats.expert_load
        metrics["experts/dropped"] = stats.dropped
    return metrics | muon_clip.optimizer_metrics(state.optimizer)
