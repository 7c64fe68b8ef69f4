import dataclasses

import numpy as np
from absl.testing import absltest

from kimi_jax.interop.dequantized_tensors import DequantizedTensors
from tests.support import published, tiny


class DequantizedTensorsTest(absltest.TestCase):
    def test_int4_experts_are_their_values_under_the_published_names(self):
        config = dataclasses.replace(tiny.MODEL, expert_ffn_dim=32)
        source = published.RandomSource(config, int4=True)
        values = DequantizedTensors(source)
        self.assertEqual(
            {name: info.shape for name, info in values.tensors.items()}, published.shapes(config)
        )
        for name in ("model.layers.1.mlp.experts.5.up_proj.weight", "model.norm.weight"):
            expected = source.tensors[name].astype(np.float32)
            np.testing.assert_array_equal(values.read(name), expected, strict=True)
            np.testing.assert_array_equal(values.read(name, slice(1, 5)), expected[1:5])


if __name__ == "__main__":
    absltest.main()
