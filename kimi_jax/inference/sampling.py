"""Sampling text from a trained model by running the whole context for every token."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.configs.quantization import QuantizationConfig
from kimi_jax.model import transformer
from kimi_jax.parallel.mesh import position_shards
from kimi_jax.parallel.rules import BATCH


def sample(
    params: transformer.TransformerParams,
    prompts: Int[Array, "B P"],
    key: jax.Array,
    *,
    num_tokens: int,
    temperature: float,
    config: ModelConfig,
    choices: ComputeConfig,
    quantization: QuantizationConfig,
) -> Int[Array, "B T"]:
    """Continues prompts of equal length.

    Token t + 1 is drawn from softmax(logits_t / temperature). There is no cache: the work is that
    of num_tokens forward passes over P + num_tokens tokens, right for a sample at the end of a run.

    Args:
      params: stored parameters.
      prompts: token ids; B must split evenly over `mesh.sequence_shards`.
      key: random key.
      num_tokens: how many tokens to add.
      temperature: above 0.
      config: the architecture; P + num_tokens must not exceed max_position.
      choices: how to compute it.
      quantization: which weights are rounded first.

    Returns:
      Prompts and continuations, T = P + num_tokens.
    """
    options = {"config": config, "choices": choices, "quantization": quantization}
    return _sample(params, prompts, key, temperature, num_tokens=num_tokens, **options)


@functools.partial(jax.jit, static_argnames=("num_tokens", "config", "choices", "quantization"))
def _sample(params, prompts, key, temperature, *, num_tokens, config, choices, quantization):
    length = prompts.shape[1]
    # The mesh may split positions: there have to be enough, and more, which come last, do no harm.
    padding = -(length + num_tokens) % position_shards(jax.sharding.get_abstract_mesh())
    tokens = jax.reshard(jnp.pad(prompts, ((0, 0), (0, num_tokens + padding))), BATCH)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = jnp.ones_like(tokens)
    params = transformer.prepare(params, config=config, choices=choices, quantization=quantization)

    def add_token(index: Array, tokens: Array) -> Array:
        hidden, _ = transformer.forward(
            params, tokens, positions, segments, config=config, choices=choices
        )
        last = jax.lax.dynamic_slice_in_dim(jax.reshard(hidden, BATCH), index - 1, 1, axis=1)
        logits = transformer.logits(params, last, config=config, choices=choices)
        logits = jax.reshard(logits, BATCH)  # a draw needs the whole vocabulary
        drawn = jax.random.categorical(jax.random.fold_in(key, index), logits / temperature)
        return jax.lax.dynamic_update_slice_in_dim(
            tokens, drawn.astype(tokens.dtype), index, axis=1
        )

    tokens = jax.lax.fori_loop(length, length + num_tokens, add_token, tokens)
    return jax.lax.slice_in_dim(tokens, 0, length + num_tokens, axis=1)
