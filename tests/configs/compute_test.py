from absl.testing import absltest

from kimi_jax.configs.compute import ComputeConfig, Exchange, Remat, ResidualFormat
from kimi_jax.core.errors import ConfigError


class ComputeConfigTest(absltest.TestCase):
    def test_offloading_needs_a_choice_of_what_is_kept(self):
        with self.assertRaisesRegex(ConfigError, "choose 'k2' or 'full' in compute.remat"):
            ComputeConfig(offload_activations=True)
        ComputeConfig(offload_activations=True, remat=Remat.K2)

    def test_a_format_of_what_is_kept_needs_something_kept(self):
        with self.assertRaisesRegex(ConfigError, "choose 'k2' or 'none' in compute.remat"):
            ComputeConfig(feed_forward_residuals=ResidualFormat.FP8, remat=Remat.FULL)
        ComputeConfig(feed_forward_residuals=ResidualFormat.FP8, remat=Remat.K2)
        ComputeConfig(feed_forward_residuals=ResidualFormat.FP8, remat=Remat.NONE)

    def test_a_capacity_needs_an_exchange_that_has_one(self):
        with self.assertRaisesRegex(ConfigError, "choose 'ragged' or 'padded'"):
            ComputeConfig(exchange=Exchange.GATHER, exchange_capacity=1.25)
        ComputeConfig(exchange=Exchange.RAGGED, exchange_capacity=1.25)


if __name__ == "__main__":
    absltest.main()
