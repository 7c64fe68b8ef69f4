"""Next-token cross-entropy, without ever holding all logits where a chunk size is given."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.data.batches import Batch
from kimi_jax.model import transformer
from kimi_jax.model.linear import project
from kimi_jax.model.stats import ModelStats
from kimi_jax.parallel.collectives import (
    first_of_tensor_share_per_shard,
    logsumexp_over_tensor_per_shard,
    sum_over_tensor_per_shard,
)
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.placement import to_compute
from kimi_jax.parallel.rules import COMPUTE, TOKENS, partition_specs, reshard


def batch_losses(
    params: transformer.TransformerParams,
    batch: Batch,
    *,
    config: ModelConfig,
    choices: ComputeConfig,
) -> tuple[Float[Array, "B T"], ModelStats]:
    """Returns the loss of every position of packed rows, unweighted, and the statistics."""
    hidden, stats = transformer.forward(
        params, batch.inputs, batch.positions, batch.segments, config=config, choices=choices
    )
    losses = token_losses(params, hidden, batch.targets, config=config, choices=choices)
    return losses, stats


@jax.named_scope("loss")
def token_losses(
    params: transformer.TransformerParams,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    config: ModelConfig,
    choices: ComputeConfig,
) -> Float[Array, "B T"]:
    """Returns -log p(target) of every position, in nats, in float32.

    Args:
      params: stored parameters; gathers the head.
      hidden: normalised hidden states of `transformer.forward`.
      targets: the tokens to predict.
      config: the architecture.
      choices: `logits_chunk_tokens` bounds how many of a device's tokens have logits at a time.
    """
    plan = transformer.specs(config).head
    head = to_compute(params.head, plan, choices.dtype.value)
    losses = per_shard(
        functools.partial(_losses_per_shard, chunk=choices.logits_chunk_tokens),
        in_specs=(partition_specs(plan, COMPUTE), TOKENS, TOKENS),
        out_specs=TOKENS,
    )
    return losses(head, hidden, reshard(targets, TOKENS))


def _losses_per_shard(
    head: Float[Array, "D V"],
    hidden: Float[Array, "b T D"],
    targets: Int[Array, "b T"],
    *,
    chunk: int | None,
) -> Float[Array, "b T"]:
    """Computes this device's losses by chunks, whose logits the backward pass recomputes."""
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if chunk is None or chunk >= rows.shape[0]:
        return _cross_entropy(head, rows, labels).reshape(targets.shape)
    padding = -rows.shape[0] % chunk
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, chunk, rows.shape[-1])
    labels = jnp.pad(labels, (0, padding)).reshape(-1, chunk)
    one_chunk = jax.checkpoint(functools.partial(_cross_entropy, head))
    losses = jax.lax.map(lambda pair: one_chunk(*pair), (rows, labels)).reshape(-1)
    return losses[: targets.size].reshape(targets.shape)


def _cross_entropy(
    head: Float[Array, "D V"], rows: Float[Array, "W D"], labels: Int[Array, "W"]
) -> Float[Array, "W"]:
    """Returns logsumexp(z) - z_label with z = rows head, in float32.

    The vocabulary may be split over the tensor axis, which all-reduces two values a token.
    """
    z = project("wd,dv->wv", rows, head, jnp.float32)
    first = first_of_tensor_share_per_shard(z.shape[-1])
    is_label = labels[:, None] == first + jnp.arange(z.shape[-1])
    of_label = jnp.sum(jnp.where(is_label, z, 0.0), axis=-1)
    total = logsumexp_over_tensor_per_shard(jax.nn.logsumexp(z, axis=-1))
    return total - sum_over_tensor_per_shard(of_label)
