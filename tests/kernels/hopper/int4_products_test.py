import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.kernels.hopper import int4_products
from kimi_jax.quantization import int4


class PlaneTest(absltest.TestCase):
    def test_planes_of_shuffled_words_are_the_shuffled_weights_to_the_bit(self):
        rng = np.random.default_rng(0)
        w = int4.quantize(jnp.asarray(rng.standard_normal((1024, 8)), jnp.float32))
        words = w.codes.reshape(2, 16, 4, 8).transpose(0, 2, 1, 3).reshape(2, 64, 8)
        scales = jnp.tile(w.scales.reshape(2, 1, 16, 8), (1, 4, 1, 1)).reshape(2, 64, 8)
        planes = [
            int4_products.plane(words[block], scales[block].astype(jnp.float32), nibble)
            for block in range(2)
            for nibble in range(8)
        ]
        expected = int4_products.shuffle(int4.dequantize(w, jnp.bfloat16).T).T
        np.testing.assert_array_equal(jnp.concatenate(planes), expected)

    def test_unshuffle_undoes_shuffle(self):
        x = jnp.arange(2 * 1024).reshape(2, 1024).astype(jnp.float32)
        np.testing.assert_array_equal(int4_products.unshuffle(int4_products.shuffle(x)), x)


if __name__ == "__main__":
    absltest.main()
