import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels.hopper import products, program


class CutTest(parameterized.TestCase):
    @parameterized.parameters(
        ((1,),), ((0, 70, 0, 200, 0),), ((3, 130, 1, 0, 129, 40),), ((8, 120, 128, 256),), ((0, 0),)
    )
    def test_each_row_is_in_one_tile_of_its_group(self, sizes):
        tiles = products.cut(jnp.asarray(sizes, jnp.int32), sum(sizes))
        tiles = products.Tiles(*(np.asarray(part) for part in tiles))
        count = int(tiles.count[0])
        self.assertLessEqual(count, tiles.group.size)
        found = [
            (tiles.start[i] + tiles.first[i] + row, tiles.group[i])
            for i in range(count)
            for row in range(tiles.size[i])
        ]
        self.assertEqual(
            [(int(row), int(group)) for row, group in found],
            list(enumerate(np.repeat(np.arange(len(sizes)), sizes))),
        )
        np.testing.assert_array_equal(tiles.start[:count] % products.ALIGNMENT, 0)
        np.testing.assert_array_less((tiles.first + tiles.size)[:count], program.TILE + 1)


if __name__ == "__main__":
    absltest.main()
