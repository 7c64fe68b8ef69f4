"""Loss and bits per byte on held-out text."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.quantization import QuantizationConfig
from kimi_jax.data.batches import Batch
from kimi_jax.data.device_feed import put_batch
from kimi_jax.data.pipeline import HeldOut
from kimi_jax.model import loss, transformer
from kimi_jax.parallel.rules import TOKENS


class HeldOutEvaluation:
    """Measures parameters on all held-out text; compiles once for each format of weights."""

    def __init__(self, held_out: HeldOut, mesh: Mesh) -> None:
        """Reads nothing yet.

        Args:
          held_out: the batches to measure on and what they amount to.
          mesh: the devices.
        """
        self._held_out = held_out
        self._sharding = NamedSharding(mesh, TOKENS)
        self._programs: dict[QuantizationConfig, Any] = {}

    def __call__(
        self, params: transformer.TransformerParams, config: ExperimentConfig
    ) -> dict[str, float]:
        """Returns eval/loss, in nats per token, and eval/bits_per_byte.

        Args:
          params: stored parameters.
          config: the run; from call to call only `quantization` may differ.
        """
        if config.quantization not in self._programs:
            program = jax.jit(functools.partial(summed_loss, config=config))
            self._programs[config.quantization] = program
        batch_nats = self._programs[config.quantization]
        sums = [
            batch_nats(params, put_batch(batch, self._sharding)) for batch in self._held_out.batches
        ]
        nats, weight = (sum(map(float, part)) for part in zip(*sums, strict=True))
        return {
            "eval/loss": nats / weight,
            "eval/bits_per_byte": nats / math.log(2) / self._held_out.num_bytes,
        }


def summed_loss(
    params: transformer.TransformerParams, batch: Batch, *, config: ExperimentConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of weight * -log p over a batch, in nats, and the sum of weights."""
    params = transformer.prepare(
        params,
        config=config.model,
        choices=config.compute,
        quantization=config.quantization,
    )
    losses, _ = loss.batch_losses(params, batch, config=config.model, choices=config.compute)
    return jnp.sum(losses * batch.weights), jnp.sum(batch.weights)
