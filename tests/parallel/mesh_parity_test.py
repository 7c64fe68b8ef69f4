"""Every mesh axis computes what one device computes: loss, gradients, maxima, and a whole step."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import Implementation
from kimi_jax.configs.model import YarnConfig
from kimi_jax.configs.quantization import WeightFormat
from kimi_jax.core.trees import leaf_names
from kimi_jax.data.device_feed import put_batch
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import abstract_parameters
from kimi_jax.parallel.rules import TOKENS
from kimi_jax.training import step as steps
from kimi_jax.training.state import abstract_state
from tests.support import tiny

# float32 sums in another order; relative to the largest value of each leaf.
GRADIENT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 2e-6  # relative
# Absolute; a step moves parameters by 1e-2, and Newton-Schulz enlarges differences in small
# singular values.
PARAMETER_TOLERANCE = 5e-6
THRESHOLD = 3.0  # of QK-clip: between the maxima of the heads at initialisation
# At its usual 1e-8, AdamW's first update is the sign even of a gradient that is zero but for
# rounding.
ADAM_EPS = 1e-5
ROWS, LENGTH = 8, 16
# Compiling takes nearly all of the time.
QUICK = {"xla_backend_optimization_level": 0}

MODEL = {"num_layers": 1, "num_dense_layers": 0, "num_heads": 4, "num_routed_experts": 4}
TWO_LAYERS = MODEL | {"num_layers": 2}
BOTH_KINDS = TWO_LAYERS | {"num_dense_layers": 1, "dense_ffn_dim": 16}
YARN = MODEL | {"yarn": YarnConfig(factor=4.0, original_max_position=8)}
IN_TWO_ROUNDS = YARN | {"num_layers": 4}  # of a pipeline of two stages
NO_QUERY_LATENT = MODEL | {"q_latent_dim": None}
INT4 = {"format": WeightFormat.INT4, "group_size": 8}
SHARED = {"tag": None, "pattern": r"moe_blocks\.feed_forward\.(experts|shared)\..*"}


def experiment(model, adam_eps=ADAM_EPS, **quantization):
    return tiny.experiment(
        quantization=quantization,
        model=model,
        data={"sequence_length": LENGTH},
        compute={"implementation": Implementation.REFERENCE},  # compiles faster
        training={"batch_sequences": ROWS},
        optimizer={
            "qk_clip_threshold": THRESHOLD,
            "balance_loss_weight": 0.01,
            "adam_eps": adam_eps,
        },
    )


def host_batch():
    """Rows of three documents whose ends lie within, and on, the shares of two and four devices."""
    rows = jax.tree.map(lambda leaf: leaf[:, :LENGTH], tiny.host_batch(rows=ROWS))
    lengths = np.array([[5, 7, 4], [8, 6, 2], [3, 1, 12], [4, 8, 4]])
    lengths = np.tile(lengths, (2, 1))
    segments = np.stack([np.repeat([1, 2, 3], row) for row in lengths]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    return dataclasses.replace(rows, segments=segments, positions=positions.astype(np.int32))


def gradients_on(mesh, config):
    """Loss and its parts, statistics and gradients, on the host."""

    def share(params, batch):
        total = jnp.sum(batch.weights)
        options = {"config": config.model, "choices": config.compute}
        rounded = transformer.quantize(params, quantization=config.quantization, **options)
        params = transformer.to_stages(params, **options)
        return steps.batch_share_of_loss(params, batch, config=config, constants=(total, rounded))

    compute = jax.jit(jax.value_and_grad(share, has_aux=True), compiler_options=QUICK)
    with jax.set_mesh(mesh):
        like = abstract_parameters(transformer.specs(config.model), mesh)
        params = tiny.parameters(mesh, config.model)
        (loss, (parts, stats)), gradients = compute(
            params, put_batch(host_batch(), jax.NamedSharding(mesh, TOKENS))
        )
        for leaf, at in zip(jax.tree.leaves(gradients), jax.tree.leaves(like), strict=True):
            assert leaf.sharding.is_equivalent_to(at.sharding, leaf.ndim), (leaf.sharding, at)
        return jax.device_get((loss, parts, stats, gradients))


@functools.cache
def gradients_on_one_device(config):
    return gradients_on(tiny.mesh(1, 1), config)


def first_step(mesh, config):
    """Parameters and metrics after a step of MuonClip."""
    plan = transformer.specs(config.model)
    with jax.set_mesh(mesh):
        transformation = steps.make_optimizer(config, plan)
        like = abstract_state(config, plan, transformation, mesh)
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        state = state.replace(params=tiny.host_parameters(config.model))
        state = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), state, like)
        take = functools.partial(
            steps.train_step, config=config, plan=plan, transformation=transformation
        )
        batch = put_batch(host_batch(), jax.NamedSharding(mesh, TOKENS))
        after, metrics = jax.jit(take, compiler_options=QUICK)(state, batch)
        for leaf, at in zip(jax.tree.leaves(after), jax.tree.leaves(like), strict=True):
            assert leaf.sharding.is_equivalent_to(at.sharding, leaf.ndim), (leaf.sharding, at)
        return jax.device_get((after.params, metrics))


@functools.cache
def first_step_on_one_device(config):
    return first_step(tiny.mesh(1, 1), config)


class MeshParityTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("pipe_2", {"pipe": 2}, IN_TWO_ROUNDS),
        ("pipe_2_data_2_expert_2", {"pipe": 2, "data": 2, "expert": 2}, IN_TWO_ROUNDS),
        ("replica_2", {"replica": 2}, MODEL),
        ("context_2", {"context": 2}, MODEL),
        ("context_4_with_yarn", {"context": 4}, YARN),
        ("tensor_2", {"tensor": 2}, MODEL),
        ("tensor_4", {"tensor": 4}, MODEL),
        ("data_2_expert_2_tensor_2", {"data": 2, "expert": 2, "tensor": 2}, MODEL),
        ("expert_4_context_2", {"expert": 4, "context": 2}, NO_QUERY_LATENT),
        ("int4_data_2_expert_2_tensor_2", {"data": 2, "expert": 2, "tensor": 2}, MODEL, INT4),
        ("int4_pipe_2_data_2", {"pipe": 2, "data": 2}, IN_TWO_ROUNDS, INT4),
        ("int4_shared_data_2_tensor_2", {"data": 2, "tensor": 2}, MODEL, INT4 | SHARED),
    )
    def test_loss_and_gradients_are_those_of_one_device(self, axes, model, quantization=None):
        config = experiment(model, **quantization or {})
        loss, parts, stats, gradients = gradients_on(
            tiny.mesh(**{"data": 1, "expert": 1} | axes), config
        )
        wanted_loss, wanted_parts, wanted_stats, wanted = gradients_on_one_device(config)
        np.testing.assert_allclose(loss, wanted_loss, rtol=LOSS_TOLERANCE)
        chex.assert_trees_all_close(parts, wanted_parts, rtol=LOSS_TOLERANCE)
        np.testing.assert_array_equal(stats.expert_load, wanted_stats.expert_load)
        np.testing.assert_allclose(stats.max_logit, wanted_stats.max_logit, rtol=LOSS_TOLERANCE)
        clipped = stats.max_logit > THRESHOLD
        self.assertTrue(0 < clipped.sum() < clipped.size, stats.max_logit)
        np.testing.assert_array_equal(clipped, wanted_stats.max_logit > THRESHOLD)
        names = jax.tree.leaves(leaf_names(wanted))
        for name, want, got in zip(
            names, jax.tree.leaves(wanted), jax.tree.leaves(gradients), strict=True
        ):
            with self.subTest(name):
                atol = GRADIENT_TOLERANCE * np.max(np.abs(want))
                np.testing.assert_allclose(got, want, rtol=0, atol=atol)

    @parameterized.named_parameters(
        # At 1e-5, a norm's gain is 6e-6 to 1e-5 away on jax 0.10.2: the first update divides by its
        # gradient, which is nearly zero.
        ("replica_2_pipe_2_data_2", {"replica": 2, "pipe": 2, "data": 2}, TWO_LAYERS, 1e-4),
        ("replica_2_data_2_expert_2", {"replica": 2, "data": 2, "expert": 2}, BOTH_KINDS),
        ("data_2_context_2_tensor_2", {"data": 2, "context": 2, "tensor": 2}, BOTH_KINDS),
    )
    def test_first_step_is_that_of_one_device(self, axes, model, adam_eps=ADAM_EPS):
        config = experiment(model, adam_eps)
        wanted, wanted_metrics = first_step_on_one_device(config)
        params, metrics = first_step(tiny.mesh(**{"data": 1, "expert": 1} | axes), config)
        for name in ("loss/train", "loss/balance", "optimizer/gradient_norm", "max_logit"):
            np.testing.assert_allclose(
                metrics[name], wanted_metrics[name], rtol=LOSS_TOLERANCE, err_msg=name
            )
        for name in ("expert_load", "clipped_ever", "qk_clip/heads_clipped"):
            np.testing.assert_array_equal(metrics[name], wanted_metrics[name], err_msg=name)
        chex.assert_trees_all_close(params, wanted, rtol=0, atol=PARAMETER_TOLERANCE)


if __name__ == "__main__":
    absltest.main()
