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


if __name__ == "__main__":
    absltest.main()
