import jax
from absl.testing import absltest, parameterized
from jax.sharding import AbstractDevice, AbstractMesh

from kimi_jax.core.platform import target_chip, target_platform


class PlatformTest(parameterized.TestCase):
    def test_a_cpu_is_no_chip_with_tuned_kernels(self):
        self.assertEqual(target_platform(), "cpu")
        self.assertIsNone(target_chip())

    @parameterized.parameters(("TPU v5", "tpu", "v5p"), ("NVIDIA H100 80GB HBM3", "gpu", "h100"))
    def test_an_absent_device_is_the_one_a_program_is_for(self, kind, platform, chip):
        device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device)):
            self.assertEqual(target_platform(), platform)
            self.assertEqual(target_chip(), chip)


if __name__ == "__main__":
    absltest.main()
