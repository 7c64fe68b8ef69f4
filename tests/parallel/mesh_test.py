import jax
from absl.testing import absltest, parameterized
from jax.sharding import AxisType

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.core.errors import ConfigError
from kimi_jax.parallel import mesh as meshes


def _shape(num_devices, num_experts=16, **config):
    mesh = meshes.make_mesh(ParallelConfig(**config), num_experts, jax.devices()[:num_devices])
    return mesh.shape[meshes.DATA], mesh.shape[meshes.EXPERT]


class MeshTest(parameterized.TestCase):
    @parameterized.parameters((1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (8, (2, 4)))
    def test_free_axes_are_filled_from_the_devices(self, num_devices, expected):
        self.assertEqual(_shape(num_devices), expected)

    def test_a_free_expert_axis_divides_the_experts(self):
        self.assertEqual(_shape(8, num_experts=6), (4, 2))
        self.assertEqual(_shape(8, num_experts=5), (8, 1))

    def test_a_given_axis_is_kept_and_the_other_filled(self):
        self.assertEqual(_shape(8, expert=8), (1, 8))
        self.assertEqual(_shape(8, data=4), (4, 2))
        self.assertEqual(_shape(8, data=1, expert=2), (1, 2))

    def test_axes_are_explicit(self):
        mesh = meshes.make_mesh(ParallelConfig(data=2, expert=2), 4)
        self.assertEqual(set(mesh.axis_types), {AxisType.Explicit})

    @parameterized.parameters(
        (dict(data=4, expert=4), "needs 16 devices and there are 8.*parallel.simulated_devices"),
        (dict(expert=16), "needs 16 devices"),
        (dict(expert=3), r"parallel.expert \(3\) must divide model.num_routed_experts"),
        (dict(data=16), "needs 16 devices"),
    )
    def test_an_impossible_mesh_names_its_option(self, config, message):
        with self.assertRaisesRegex(ConfigError, message):
            _shape(8, **config)

    def test_a_batch_that_does_not_split_says_what_would(self):
        mesh = meshes.make_mesh(ParallelConfig(data=2, expert=4), 16)
        meshes.check_batch(mesh, 16, 2)
        message = r"batch of 100 .*data 2 x expert 4.* multiple of 8 in training.batch_sequences"
        with self.assertRaisesRegex(ConfigError, message):
            meshes.check_batch(mesh, 100, 1)
        with self.assertRaisesRegex(ConfigError, "multiple of 16"):
            meshes.check_batch(mesh, 24, 2)


if __name__ == "__main__":
    absltest.main()
