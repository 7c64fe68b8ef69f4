import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat
from kimi_jax.core.errors import ConfigError
from kimi_jax.core.trees import leaf_names
from kimi_jax.model import transformer
from kimi_jax.quantization import int4, qat
from tests.support import tiny

_PLAN = transformer.specs(tiny.MODEL)
_EXPERTS = {f"moe_blocks.feed_forward.experts.{name}" for name in ("w_gate", "w_up", "w_down")}


_INT4 = {"format": WeightFormat.INT4, "group_size": 8}


def _chosen(**options):
    flags = qat.choose(_PLAN, QuantizationConfig(**options))
    names = jax.tree.leaves(leaf_names(flags))
    return {name for name, flag in zip(names, jax.tree.leaves(flags), strict=True) if flag}


class ChooseTest(parameterized.TestCase):
    def test_routed_experts_alone_unless_something_else_is_said(self):
        self.assertEqual(_chosen(**_INT4), _EXPERTS)
        self.assertEqual(_chosen(), set())

    def test_a_pattern_is_of_whole_names(self):
        shared = r"moe_blocks\.feed_forward\.(experts|shared)\.w_(gate|up)"
        names = {
            f"moe_blocks.feed_forward.{part}.w_{side}"
            for part in ("experts", "shared")
            for side in ("gate", "up")
        }
        self.assertEqual(_chosen(tag=None, pattern=shared, **_INT4), names)

    @parameterized.parameters(
        ({"tag": None, "pattern": r"moe_blocks\..*experts"}, "no weight of this model is chosen"),
        ({"tag": "nothing"}, "no weight of this model is chosen by 'nothing'"),
        ({"tag": None, "pattern": "final_norm"}, "final_norm is no matrix, but norm"),
        ({"tag": "matrix"}, "the inputs of .*w_q_nope"),
        ({"group_size": 24}, r"group_size \(24\) must divide the 32 inputs of"),
    )
    def test_what_cannot_be_quantised_raises_with_its_name(self, options, message):
        with self.assertRaisesRegex(ConfigError, message):
            _chosen(**_INT4 | options)


class DescribeTest(absltest.TestCase):
    def test_it_counts_what_is_rounded_and_says_since_when(self):
        config = QuantizationConfig(format=WeightFormat.INT4, group_size=8, start_step=70)
        line = qat.describe(_PLAN, config)
        self.assertStartsWith(line, f"{2 * 3 * 8 * 32 * 16:,} of ")
        self.assertEndsWith(line, "in int4, groups of 8, from step 70")


class AttachTest(absltest.TestCase):
    def test_weights_without_codes_stay_the_same_arrays(self):
        params = {"expert": jnp.ones((8, 2)), "norm": jnp.ones(3), "absent": None}
        codes = {"expert": int4.quantize(params["expert"], 8), "norm": None, "absent": None}
        joined = qat.attach(params, codes)
        self.assertIs(joined["norm"], params["norm"])
        self.assertIs(joined["expert"].carrier, params["expert"])
        np.testing.assert_array_equal(joined["expert"].quantized.codes, codes["expert"].codes)
        self.assertIs(qat.attach(params, None), params)


if __name__ == "__main__":
    absltest.main()
