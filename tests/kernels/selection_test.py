import jax
from absl.testing import absltest
from jax.sharding import AbstractDevice, AbstractMesh

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.selection import select

_FASTEST = {"tpu": Implementation.XLA_ACCELERATOR}


class SelectTest(absltest.TestCase):
    def test_auto_takes_the_program_for_the_meshs_devices(self):
        available = {Implementation.XLA: len, Implementation.XLA_ACCELERATOR: sum}
        self.assertIs(select("op", Implementation.AUTO, available, _FASTEST), len)
        chip = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=chip)):
            self.assertIs(select("op", Implementation.AUTO, available, _FASTEST), sum)
            self.assertIs(select("op", Implementation.AUTO, available, {}), len)

    def test_a_named_implementation_is_the_one_that_runs(self):
        available = {Implementation.XLA: len, Implementation.REFERENCE: sum}
        self.assertIs(select("op", Implementation.REFERENCE, available, _FASTEST), sum)

    def test_a_named_implementation_that_does_not_exist_raises(self):
        with self.assertRaisesRegex(NotImplementedError, "op has no implementation 'reference'"):
            select("op", Implementation.REFERENCE, {Implementation.XLA: len}, {})

    def test_kernels_for_another_platform_raise_with_the_reason(self):
        available = {Implementation.XLA: len, Implementation.PALLAS_TPU: sum}
        with self.assertRaisesRegex(NotImplementedError, "runs on a TPU, and this .* for a CPU"):
            select("op", Implementation.PALLAS_TPU, available, {})


if __name__ == "__main__":
    absltest.main()
