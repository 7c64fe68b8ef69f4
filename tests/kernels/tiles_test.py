import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.kernels import tiles


class CutTest(absltest.TestCase):
    def test_tiles_cover_each_group_once_and_none_is_empty(self):
        cut = tiles.cut(jnp.array([5, 0, 8, 1], jnp.int32), num_rows=20, tile_rows=4, multiple=3)
        self.assertEqual(int(cut.count), 5)
        np.testing.assert_array_equal(cut.group[:5], [0, 0, 2, 2, 3])
        np.testing.assert_array_equal(cut.start[:5], [0, 4, 5, 9, 13])
        np.testing.assert_array_equal(cut.size[:5], [4, 1, 4, 4, 1])
        np.testing.assert_array_equal(cut.continues[:5], [False, True, False, True, False])

    def test_tiles_that_do_not_exist_lie_behind_all_rows(self):
        cut = tiles.cut(jnp.array([5, 0, 8, 1], jnp.int32), num_rows=20, tile_rows=4, multiple=3)
        self.assertLen(cut.group, 9)
        np.testing.assert_array_equal(cut.start[5:], 20)
        np.testing.assert_array_equal(cut.size[5:], 0)

    def test_there_is_room_for_the_most_tiles_that_group_sizes_can_make(self):
        sizes = jnp.array([1, 1, 1, 5], jnp.int32)
        cut = tiles.cut(sizes, num_rows=8, tile_rows=4, multiple=1)
        self.assertEqual(int(cut.count), 5)
        self.assertGreaterEqual(cut.group.shape[0], 5)
        self.assertEqual(int(jnp.sum(cut.size)), 8)


if __name__ == "__main__":
    absltest.main()
