import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels import hopper_int4, hopper_products
from kimi_jax.quantization import int4


class CutTest(parameterized.TestCase):
    @parameterized.parameters(
        ((1,),), ((0, 70, 0, 200, 0),), ((3, 130, 1, 0, 129, 40),), ((8, 120, 128, 256),), ((0, 0),)
    )
    def test_each_row_is_in_one_tile_of_its_group(self, sizes):
        tiles = hopper_products.cut(jnp.asarray(sizes, jnp.int32), sum(sizes))
        tiles = hopper_products.Tiles(*(np.asarray(part) for part in tiles))
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
        np.testing.assert_array_equal(tiles.start[:count] % hopper_products.ALIGNMENT, 0)
        np.testing.assert_array_less(
            (tiles.first + tiles.size)[:count], hopper_products.TILE_ROWS + 1
        )


class PlaneTest(absltest.TestCase):
    def test_planes_of_shuffled_words_are_the_shuffled_weights_to_the_bit(self):
        rng = np.random.default_rng(0)
        w = int4.quantize(jnp.asarray(rng.standard_normal((1024, 8)), jnp.float32))
        words = w.codes.reshape(2, 16, 4, 8).transpose(0, 2, 1, 3).reshape(2, 64, 8)
        scales = jnp.tile(w.scales.reshape(2, 1, 16, 8), (1, 4, 1, 1)).reshape(2, 64, 8)
        planes = [
            hopper_int4.plane(words[block], scales[block].astype(jnp.float32), nibble)
            for block in range(2)
            for nibble in range(8)
        ]
        expected = hopper_int4.shuffle(int4.dequantize(w, jnp.bfloat16).T).T
        np.testing.assert_array_equal(jnp.concatenate(planes), expected)

    def test_unshuffle_undoes_shuffle(self):
        x = jnp.arange(2 * 1024).reshape(2, 1024).astype(jnp.float32)
        np.testing.assert_array_equal(hopper_int4.unshuffle(hopper_int4.shuffle(x)), x)


if __name__ == "__main__":
    absltest.main()
