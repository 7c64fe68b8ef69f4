import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.quantization import QuantizationConfig, Quantize, WeightFormat
from kimi_jax.core.errors import ConfigError
from kimi_jax.model import block, transformer
from kimi_jax.parallel import quantized
from kimi_jax.parallel.placement import to_compute
from kimi_jax.quantization import int4
from kimi_jax.quantization.fake_quant import FakeQuantized
from kimi_jax.quantization.qat import attach
from tests.support import tiny

_PLAN = transformer.specs(tiny.MODEL)
_LAYER = block.specs(tiny.MODEL, dense=False)
_FEED_FORWARD = r"moe_blocks\.feed_forward\.(experts|shared)\..*"


def _config(**options):
    return QuantizationConfig(format=WeightFormat.INT4, group_size=8, **options)


def _layer(params, config):
    """The first mixture block, its weights as they are computed with."""
    working = attach(params, quantized.quantize(params, _PLAN, jnp.bfloat16, config))
    stored = jax.tree.map(lambda leaf: leaf[0], working.moe_blocks)
    return to_compute(stored, _LAYER, jnp.bfloat16)


class QuantizedTest(parameterized.TestCase):
    def _on(self, mesh, fn, *args):
        with jax.set_mesh(mesh):
            params = tiny.parameters(mesh)
            return params, jax.jit(functools.partial(fn, *args))(params)

    @parameterized.product(mesh=((1, 1), (4, 2), (2, 4)), when=(Quantize.STEP, Quantize.USE))
    def test_experts_get_the_codes_of_one_device_and_others_the_values(self, mesh, when):
        config = _config(tag=None, pattern=_FEED_FORWARD, quantize=when)

        def layer(params):
            return _layer(params, config)

        params, gathered = self._on(tiny.mesh(*mesh), layer)
        masters = jax.tree.map(lambda leaf: np.asarray(leaf[0]), params.moe_blocks.feed_forward)
        expected = int4.quantize(jnp.asarray(masters.experts.w_down).astype(jnp.bfloat16), 8)
        experts = gathered.feed_forward.experts
        self.assertIsInstance(experts.w_down, FakeQuantized)
        chex.assert_trees_all_equal(jax.device_get(experts.w_down.quantized), expected)
        shared = int4.quantize(jnp.asarray(masters.shared.w_up).astype(jnp.bfloat16), 8)
        np.testing.assert_array_equal(
            jax.device_get(gathered.feed_forward.shared.w_up),
            int4.dequantize(shared, jnp.bfloat16),
        )

    @parameterized.parameters(Quantize.STEP, Quantize.USE)
    def test_gradients_of_the_values_reach_the_masters(self, when):
        config = _config(tag=None, pattern=_FEED_FORWARD, quantize=when)
        factor = jnp.arange(32.0)[:, None] % 7

        def total(params):
            return jnp.sum(_layer(params, config).feed_forward.shared.w_up * factor)

        _, gradient = self._on(tiny.mesh(4, 2), jax.grad(total))
        of_layers = jax.device_get(gradient.moe_blocks.feed_forward.shared.w_up)
        np.testing.assert_array_equal(of_layers[0], np.broadcast_to(factor, of_layers[0].shape))
        np.testing.assert_array_equal(of_layers[1:], 0.0)

    def test_codes_are_stored_in_shares_and_travel_instead_of_weights(self):
        mesh = tiny.mesh(4, 2)

        def round_all(params):
            return quantized.quantize(params, _PLAN, jnp.bfloat16, _config())

        params, rounded = self._on(mesh, round_all)
        codes = rounded.moe_blocks.feed_forward.experts.w_gate.codes
        master = params.moe_blocks.feed_forward.experts.w_gate
        self.assertEqual(codes.sharding.spec, master.sharding.spec)
        self.assertEqual(codes.addressable_shards[0].data.size * 8 * 8, master.size)
        self.assertIsNone(rounded.embedding)

    def test_an_axis_that_would_split_groups_raises(self):
        with self.assertRaisesRegex(ConfigError, "16 inputs .* 1 groups of 16, .* 2 parts"):
            config = QuantizationConfig(format=WeightFormat.INT4, group_size=16)

            def layer(params):
                return _layer(params, config)

            self._on(tiny.mesh(1, 1, tensor=2), layer)


if __name__ == "__main__":
    absltest.main()
