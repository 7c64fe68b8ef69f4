"""K2 at 2,097,152 positions: plans, without devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from experiments.configs import kimi_k2_recipe
from kimi_jax.analysis import memory
from kimi_jax.analysis.expected_flops import expected_flops
from kimi_jax.configs.optimizer import ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.core.errors import ConfigError
from kimi_jax.data.batches import abstract_batch
from kimi_jax.model import rope, transformer

_LONGEST = 2**21
_CONTEXT = 64
_EXPERT = 16
_SIZES = memory.mesh_sizes(1, _EXPERT, context=_CONTEXT)


def _run(sequence_length, max_position=_LONGEST):
    """K2's batch of 67 M tokens in two micro-batches."""
    stage = kimi_k2_recipe.context_stage(
        sequence_length=4096,
        schedule=ScheduleConfig(peak=7e-6),
        num_steps=1,
        parallel=ParallelConfig(data=1, expert=_EXPERT, context=_CONTEXT),
        accumulation_steps=2,
    )
    yarn = dataclasses.replace(stage.model.yarn, factor=max_position / 4096)
    sequences = kimi_k2_recipe.BATCH_TOKENS // sequence_length
    return dataclasses.replace(
        stage,
        model=dataclasses.replace(stage.model, yarn=yarn, max_position=max_position),
        data=dataclasses.replace(stage.data, sequence_length=sequence_length),
        training=dataclasses.replace(stage.training, batch_sequences=sequences),
    )


def _terms(config):
    return {term.name: term.bytes for term in memory.estimate(config, _SIZES)}


class LongContextTest(absltest.TestCase):
    def test_memory_follows_the_tokens_of_a_device_not_the_length_of_a_sequence(self):
        longest = _terms(_run(_LONGEST))
        tokens = _LONGEST // _CONTEXT
        self.assertEqual(longest["activations kept for the backward pass"], 2 * tokens * 7168 * 61)
        self.assertGreater(min(longest.values()), 0)
        self.assertEqual(longest, _terms(_run(_LONGEST // 16)))

    def test_the_latents_of_all_positions_are_counted(self):
        whole = 2 * 2 * _LONGEST * (1536 + 512)  # in bfloat16, and their gradients
        self.assertGreater(_terms(_run(_LONGEST))["activations of the layer at work"], whole)

    def test_a_mesh_is_suggested_that_keeps_the_context_axis(self):
        devices, sizes, peak = memory.smallest_mesh(_run(_LONGEST), 128 * 2**30)
        self.assertEqual(sizes["context"], _CONTEXT)
        self.assertEqual(devices, _CONTEXT * sizes["data"] * sizes["expert"])
        self.assertBetween(peak, 64 * 2**30, 128 * 2**30)

    def test_operations_of_attention_grow_with_the_length_and_the_others_do_not(self):
        def forward(length):
            config = _run(length)
            return expected_flops(config, transformer.specs(config.model), _SIZES).forward

        # N (H + R + U) products for each of 67 M tokens and T / 2 keys, in 61 layers.
        core = 2 * 61 * kimi_k2_recipe.BATCH_TOKENS * 64 * (128 + 64 + 128) * (_LONGEST // 4)
        more = forward(_LONGEST) - forward(_LONGEST // 2)
        self.assertAlmostEqual(more / core, 1.0, places=6)

    def test_positions_and_rotations_are_32_bits_wide(self):
        config = _run(_LONGEST)
        mesh = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        batch = abstract_batch(config.training.batch_sequences, _LONGEST, mesh)
        self.assertEqual(batch.positions.dtype, np.int32)
        cos, _ = jax.eval_shape(lambda p: rope.cos_sin(config.model, p), batch.positions)
        self.assertEqual((cos.shape, cos.dtype), ((32, _LONGEST, 32), jnp.float32))

    def test_a_sequence_beyond_the_positions_is_refused(self):
        with self.assertRaisesRegex(ConfigError, "max_position"):
            _run(_LONGEST, max_position=131_072)


if __name__ == "__main__":
    absltest.main()
