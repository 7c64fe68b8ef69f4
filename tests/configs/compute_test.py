from absl.testing import absltest

from kimi_jax.configs.compute import ComputeConfig, Remat
from kimi_jax.core.errors import ConfigError


class ComputeConfigTest(absltest.TestCase):
    def test_offloading_needs_a_choice_of_what_is_kept(self):
        with self.assertRaisesRegex(ConfigError, "choose 'k2' or 'full' in compute.remat"):
            ComputeConfig(offload_activations=True)
        ComputeConfig(offload_activations=True, remat=Remat.K2)


if __name__ == "__main__":
    absltest.main()
