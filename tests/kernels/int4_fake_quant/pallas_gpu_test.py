import functools

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.kernels.int4_fake_quant import pallas_gpu
from kimi_jax.quantization import int4
from tests.support.gradients import BFLOAT16_TOLERANCE, assert_close, value_and_gradients
from tests.support.hopper import interpreted

_ROWS, _INPUTS, _OUTPUTS = 5, 64, 40


@interpreted
class Int4FakeQuantPallasGpuTest(absltest.TestCase):
    def test_the_product_passes_the_gradient_straight_through(self):
        rng = np.random.default_rng(0)
        x, w, d_y = (
            jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
            for shape in ((_ROWS, _INPUTS), (_INPUTS, _OUTPUTS), (_ROWS, _OUTPUTS))
        )
        product = functools.partial(pallas_gpu.int4_fake_quant, group_size=32, interpret=True)
        y, (d_x, d_w) = value_and_gradients(product, (x, w), d_y)
        rounded = int4.dequantize(int4.quantize(w, 32), jnp.bfloat16)
        x, rounded, d_y = (np.asarray(a, np.float64) for a in (x, rounded, d_y))
        assert_close(y, x @ rounded, BFLOAT16_TOLERANCE)
        assert_close(d_x, d_y @ rounded.T, BFLOAT16_TOLERANCE)
        assert_close(d_w, x.T @ d_y, BFLOAT16_TOLERANCE)


if __name__ == "__main__":
    absltest.main()
