import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels.int4_matmul import pallas_gpu
from kimi_jax.quantization import int4
from tests.support.gradients import BFLOAT16_TOLERANCE, assert_close
from tests.support.hopper import interpreted


def _operands(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    arrays = (
        rng.standard_normal(shape) for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
    )
    return tuple(jnp.asarray(a, jnp.bfloat16) for a in arrays)


def _float64(*arrays):
    return tuple(np.asarray(a, np.float64) for a in arrays)


@interpreted
class Int4MatmulPallasGpuTest(parameterized.TestCase):
    @parameterized.parameters((3, 1056, 130, 32), (70, 128, 40, 64))
    def test_few_and_many_rows_are_near_float64(self, rows, inputs, outputs, group_size):
        x, w, d_y = _operands(rows, inputs, outputs)
        packed = int4.quantize(w, group_size)
        y, pullback = jax.vjp(lambda x: pallas_gpu.int4_matmul(x, packed, interpret=True), x)
        x, values, d_y_exact = _float64(x, int4.dequantize(packed, jnp.bfloat16), d_y)
        assert_close(y, x @ values, BFLOAT16_TOLERANCE)
        assert_close(pullback(d_y)[0], d_y_exact @ values.T, BFLOAT16_TOLERANCE)

    def test_scales_of_fewer_than_32_weights_raise(self):
        x, w, _ = _operands(5, 64, 40)
        with self.assertRaisesRegex(NotImplementedError, "scales of 32 weights"):
            pallas_gpu.int4_matmul(x, int4.quantize(w, 8), interpret=True)


if __name__ == "__main__":
    absltest.main()
