from absl.testing import absltest, parameterized

from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat
from kimi_jax.core.errors import ConfigError
from tests.support import tiny


class QuantizationConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"group_size": 12}, "a multiple of 8, .* got 12"),
        ({"start_step": -1}, "start_step must not be negative"),
        ({"pattern": "a.*"}, "by quantization.tag or by quantization.pattern"),
        ({"tag": None}, "by quantization.tag or by quantization.pattern"),
        ({"tag": None, "pattern": "("}, "is no regular expression"),
    )
    def test_options_that_do_not_fit_are_refused(self, options, message):
        with self.assertRaisesRegex(ConfigError, message):
            QuantizationConfig(format=WeightFormat.INT4, **options)

    def test_options_of_a_run_that_quantises_nothing_are_refused(self):
        with self.assertRaisesRegex(ConfigError, "quantization.start_step would do nothing"):
            QuantizationConfig(start_step=3)
        self.assertFalse(QuantizationConfig().enabled)

    def test_weights_are_rounded_from_the_first_step_that_is_named(self):
        options = {"format": WeightFormat.INT4, "group_size": 8, "start_step": 2}
        config = tiny.experiment(quantization=options)
        self.assertFalse(config.at_step(1).quantization.enabled)
        self.assertIs(config.at_step(2), config)

    def test_a_start_after_the_end_is_refused(self):
        options = {"format": WeightFormat.INT4, "start_step": 4}
        with self.assertRaisesRegex(ConfigError, r"\(4\) must be less than training.num_steps"):
            tiny.experiment(quantization=options, training={"num_steps": 4})


if __name__ == "__main__":
    absltest.main()
