import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels.grouped_matmul import pallas_gpu
from kimi_jax.kernels.grouped_matmul.gradients import differentiable
from kimi_jax.quantization import int4
from tests.support.gradients import BFLOAT16_TOLERANCE, assert_close, value_and_gradients
from tests.support.hopper import interpreted

_SIZES, _SPARE = (0, 70, 1, 130, 0), 20
_PRODUCT = differentiable(
    *(
        functools.partial(piece, interpret=True)
        for piece in (pallas_gpu.forward, pallas_gpu.input_gradient, pallas_gpu.weight_gradient)
    )
)


def _operands(inputs, outputs):
    rng = np.random.default_rng(0)
    rows = sum(_SIZES) + _SPARE
    arrays = (
        rng.standard_normal(shape)
        for shape in ((rows, inputs), (len(_SIZES), inputs, outputs), (rows, outputs))
    )
    x, w, d_y = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    # Whatever stands in rows of no group reaches nothing.
    return x.at[-_SPARE:].set(jnp.nan), w, d_y.at[-_SPARE:].set(jnp.nan)


def _oracle(x, w, d_y):
    """Group by group in float64; rows of no group give zeros."""
    x, w, d_y = (np.asarray(a, np.float64) for a in (x, w, d_y))
    y, d_x, d_w = np.zeros(d_y.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(_SIZES):
        rows = slice(start, start + size)
        y[rows], d_x[rows] = x[rows] @ w[group], d_y[rows] @ w[group].T
        d_w[group] = x[rows].T @ d_y[rows]
        start += size
    return y, d_x, d_w


@interpreted
class GroupedMatmulPallasGpuTest(parameterized.TestCase):
    def test_product_and_gradients_of_odd_widths_are_near_float64(self):
        x, w, d_y = _operands(72, 130)
        sizes = jnp.asarray(_SIZES, jnp.int32)
        y, gradients = value_and_gradients(lambda x, w: _PRODUCT(x, w, sizes), (x, w), d_y)
        for actual, expected in zip((y, *gradients), _oracle(x, w, d_y), strict=True):
            assert_close(actual, expected, BFLOAT16_TOLERANCE)

    def test_packed_weights_give_the_product_of_their_values(self):
        x, w, d_y = _operands(96, 130)
        packed = int4.quantize(w)
        sizes = jnp.asarray(_SIZES, jnp.int32)
        y, pullback = jax.vjp(lambda x: _PRODUCT(x, packed, sizes), x)
        expected = _oracle(x, int4.dequantize(packed, jnp.bfloat16), d_y)
        for actual, wanted in zip((y, *pullback(d_y)), expected, strict=False):
            assert_close(actual, wanted, BFLOAT16_TOLERANCE)


class OtherDevicesTest(absltest.TestCase):
    def test_another_device_than_a_hopper_gpu_raises(self):
        x, w, _ = _operands(128, 128)
        with self.assertRaisesRegex(NotImplementedError, "compute capability 9.0"):
            pallas_gpu.forward(x, w, jnp.asarray(_SIZES, jnp.int32))


if __name__ == "__main__":
    absltest.main()
