"""How many operations a training step has to execute, in closed form, to compare programs with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kimi_jax.configs.compute import Remat
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.configs.optimizer import OptimizerConfig, OptimizerName
from kimi_jax.model.accounting import SWIGLU_MATRICES, FlopsPerToken, flops_per_token
from kimi_jax.optimizers.matrix_views import count_matrices, matrix_views
from kimi_jax.parallel.mesh import EXPERT, PIPE
from kimi_jax.parallel.ragged_exchange import buffer_share


@dataclasses.dataclass(frozen=True)
class ExpectedFlops:
    """Operations of one step of the whole mesh, in matrix products.

    Attributes:
      forward: of the model; of attention's scores the causal half, of the experts all rows of the
        exchange's buffers, and of a pipeline what it computes while it fills and empties.
      backward: twice that.
      recomputed: what the remat policy, the chunks of the logits and the attention kernel's own
        backward pass compute again.
      newton_schulz: Muon's orthogonalisation.
    """

    forward: float
    backward: float
    recomputed: float
    newton_schulz: float


def expected_flops(config: ExperimentConfig, plan: Any, sizes: Mapping[str, int]) -> ExpectedFlops:
    """Counts the operations of a step.

    Args:
      config: the run.
      plan: specs of the parameters.
      sizes: of the mesh axes.
    """
    idle = sizes[PIPE] - 1  # layers that a pipeline computes for nobody, beside the model's own
    forward = _forward_per_token(config, idle, expert_rows_share(config, sizes[EXPERT]))
    return ExpectedFlops(
        forward=config.batch_tokens * forward.total,
        backward=2 * config.batch_tokens * forward.total,
        recomputed=config.batch_tokens * _recomputed_per_token(config, idle, forward),
        newton_schulz=newton_schulz_flops(config.optimizer, plan),
    )


def expert_rows_share(config: ExperimentConfig, devices: int) -> float:
    """Returns the rows that a device's experts compute, as a multiple of an even load.

    On one device there is no exchange, and so no buffer with room for more.

    Args:
      config: the run.
      devices: size of the mesh's expert axis.
    """
    if devices == 1:
        return 1.0
    model = config.model
    return buffer_share(
        devices=devices,
        per_token=model.experts_per_token,
        held=model.num_routed_experts // devices,
        capacity=config.compute.exchange_capacity,
    )


def _forward_per_token(config: ExperimentConfig, idle: int, rows_share: float) -> FlopsPerToken:
    """The model's operations, and those of buffers' rows and pipelines' ticks without work."""
    model = config.model
    forward = flops_per_token(model, config.data.sequence_length)
    of_all, of_mixtures = 1 + idle / model.num_layers, 1.0
    if model.num_moe_layers:
        of_mixtures += idle / model.num_moe_layers
    return dataclasses.replace(
        forward,
        attention_projections=of_all * forward.attention_projections,
        attention_core=of_all * forward.attention_core,
        shared_experts=of_mixtures * forward.shared_experts,
        routed_experts=rows_share * of_mixtures * forward.routed_experts,
        router=of_mixtures * forward.router,
    )


def newton_schulz_flops(config: OptimizerConfig, plan: Any) -> float:
    """Counts Newton-Schulz of every matrix once: steps * (4 n^2 m + 2 n^3) for n x m, n <= m.

    A step takes A = X X^T (2 n^2 m), A A (2 n^3) and (b A + c A A) X (2 n^2 m).

    Args:
      config: newton_schulz_steps, matrix_granularity, and whether there is Muon at all.
      plan: specs of the parameters.
    """
    if config.name is not OptimizerName.MUON_CLIP:
        return 0.0
    total = 0.0
    for view in matrix_views(plan, config.matrix_granularity):
        n, m = sorted(view.matrix_shape)
        total += count_matrices(view) * (4.0 * n * n * m + 2.0 * n**3)
    return config.newton_schulz_steps * total


def _recomputed_per_token(config: ExperimentConfig, idle: int, forward: FlopsPerToken) -> float:
    """Counts what is computed a second time, per token.

    FULL repeats a layer up to the last product whose result a gradient needs: the down projections
    of the feed-forward parts (one matrix in three) are not among them. K2, with the kernels for
    accelerators, repeats the router and the projections of latents to heads. An attention kernel
    keeps no scores: its backward pass makes them again, policy or not. Chunks of logits are made
    twice.
    """
    model, compute = config.model, config.compute
    widths = model.head_qk_dim, model.head_value_dim
    total = forward.attention_core * widths[0] / sum(widths)
    if compute.logits_chunk_tokens is not None:
        total += forward.head
    match compute.remat:
        case Remat.NONE:
            return total
        case Remat.K2:
            layers = model.num_layers + idle
            return total + forward.router + 2.0 * layers * _head_matrices(model)
        case Remat.FULL:
            up = (SWIGLU_MATRICES - 1) / SWIGLU_MATRICES
            total += forward.attention_projections + forward.attention_core + forward.router
            return total + up * (
                forward.dense_ffn + forward.shared_experts + forward.routed_experts
            )


def _head_matrices(model: ModelConfig) -> int:
    """Parameters of one layer's projections to the heads' queries, keys and values."""
    queries = (model.q_latent_dim or model.embed_dim) * model.head_qk_dim
    keys_values = model.kv_latent_dim * (model.head_nope_dim + model.head_value_dim)
    return model.num_heads * (queries + keys_values)
