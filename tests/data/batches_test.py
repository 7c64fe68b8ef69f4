import jax
from absl.testing import absltest

from kimi_jax.data.batches import abstract_batch
from kimi_jax.parallel.rules import TOKENS
from tests.support import tiny


class AbstractBatchTest(absltest.TestCase):
    def test_says_what_a_batch_on_devices_is_without_its_values(self):
        mesh = tiny.mesh(data=2, expert=4)
        batch = tiny.batch(mesh)
        rows, positions = batch.inputs.shape
        abstract = abstract_batch(rows, positions, jax.NamedSharding(mesh, TOKENS))
        expected = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch)
        self.assertEqual(jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract), expected)


if __name__ == "__main__":
    absltest.main()
