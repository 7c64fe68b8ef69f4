import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.rules import BATCH


def _scale_per_shard(gain, x):
    return gain * x * x.shape[0]


class PerShardTest(absltest.TestCase):
    def test_shapes_are_local_and_the_gradient_of_a_replicated_operand_is_summed(self):
        mesh = make_mesh(ParallelConfig(data=2, expert=4), 8)
        x = np.arange(16, dtype=np.float32)

        def loss(gain, x):
            return jnp.sum(
                per_shard(_scale_per_shard, in_specs=(P(), BATCH), out_specs=BATCH)(gain, x)
            )

        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, jax.NamedSharding(mesh, BATCH))
            value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(3), sharded)
        self.assertEqual(value, 3 * 2 * x.sum())
        self.assertEqual(gradient, 2 * x.sum())

    def test_an_argument_in_another_layout_is_refused(self):
        run = per_shard(_scale_per_shard, in_specs=(P(), BATCH), out_specs=BATCH)
        with (
            jax.set_mesh(make_mesh(ParallelConfig(data=2, expert=4), 8)),
            self.assertRaisesRegex(ValueError, "does not match the specs of the input"),
        ):
            run(jnp.float32(3), jnp.ones(16))

    def test_axes_of_size_1_cost_no_exchange(self):
        mesh = make_mesh(ParallelConfig(data=1, expert=1), 8)

        def loss(gain, x):
            return jnp.sum(
                per_shard(_scale_per_shard, in_specs=(P(), BATCH), out_specs=BATCH)(gain, x)
            )

        with jax.set_mesh(mesh):
            x = jax.device_put(np.ones(16, np.float32), jax.NamedSharding(mesh, BATCH))
            program = jax.jit(jax.grad(loss, argnums=(0, 1)))
            text = program.lower(jnp.ones((1,)), x).compile().as_text()
        self.assertNotIn("all-reduce", text)


if __name__ == "__main__":
    absltest.main()
