import dataclasses

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

    def test_data_takes_what_the_other_axes_leave(self):
        mesh = meshes.make_mesh(ParallelConfig(replica=2, expert=2), 16)
        self.assertEqual(tuple(mesh.shape.values()), (1, 2, 2, 2, 1, 1))
        mesh = meshes.make_mesh(ParallelConfig(pipe=4, expert=1), 16)
        self.assertEqual(tuple(mesh.shape.values()), (4, 1, 2, 1, 1, 1))
        mesh = meshes.make_mesh(ParallelConfig(context=2, tensor=2), 16)
        self.assertEqual(tuple(mesh.shape.values()), (1, 1, 1, 2, 2, 2))
        self.assertEqual(tuple(mesh.shape), meshes.MESH_AXES)

    def test_axes_are_explicit(self):
        mesh = meshes.make_mesh(ParallelConfig(data=2, expert=2), 4)
        self.assertEqual(set(mesh.axis_types), {AxisType.Explicit})

    @parameterized.parameters(
        (dict(data=4, expert=4), "needs 16 devices and there are 8.*parallel.simulated_devices"),
        (dict(expert=16), "needs 16 devices"),
        (dict(expert=3), r"parallel.expert \(3\) must divide model.num_routed_experts"),
        (dict(data=16), "needs 16 devices"),
        (dict(tensor=16), "data 1 x expert 1 x tensor 16 needs 16 devices"),
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

    def test_positions_and_heads_do_not_split_the_batch(self):
        mesh = meshes.make_mesh(
            ParallelConfig(replica=2, data=1, expert=1, context=2, tensor=2), 16
        )
        self.assertEqual((meshes.sequence_shards(mesh), meshes.position_shards(mesh)), (2, 2))
        with self.assertRaisesRegex(ConfigError, "over 2 shards .replica 2 x data 1 x expert 1"):
            meshes.check_batch(mesh, 3, 1)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX says of a TPU chip in a slice that is a ring."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


def slices(count, size=4):
    """Chips of `count` slices in an order that mixes the slices."""
    return [Chip(s * size + n, s, (n, 0, 0)) for n in range(size) for s in range(count)]


def mesh_of(devices, **config):
    return meshes.make_mesh(ParallelConfig(**config), 16, devices).devices


class ArrangeDevicesTest(parameterized.TestCase):
    @parameterized.parameters((2, 1, 2), (2, 1, 4), (4, 1, 4), (2, 2, 1), (4, 2, 2))
    def test_each_stage_and_replica_lies_within_a_slice(self, num_slices, stages, replicas):
        arranged = mesh_of(slices(num_slices), pipe=stages, replica=replicas)
        self.assertEqual(arranged.size, 4 * num_slices)
        for part in arranged.reshape(stages * replicas, -1):
            self.assertLen({chip.slice_index for chip in part}, 1)

    @parameterized.parameters(1, 3)
    def test_slices_that_replicas_do_not_cover_are_refused(self, replicas):
        message = rf"parallel.replica .{replicas}. must be a multiple of the 2 .*cross_slices"
        with self.assertRaisesRegex(ConfigError, message):
            mesh_of(slices(2, size=6), replica=replicas, data=12 // replicas, expert=1)

    def test_data_crosses_slices_where_asked_and_is_their_slowest_part(self):
        arranged = mesh_of(slices(2), data=4, expert=2, cross_slices=True)
        halves = arranged[0, 0, :2], arranged[0, 0, 2:]
        within = [{chip.slice_index for chip in half.flat} for half in halves]
        self.assertEqual(within, [{0}, {1}])

    def test_tensor_never_crosses_slices(self):
        message = "2 slices cannot be laid along data 1 x expert 1 x tensor 8"
        with self.assertRaisesRegex(ConfigError, message):
            mesh_of(slices(2), tensor=8, cross_slices=True)

    def test_other_platforms_keep_the_order_of_their_devices(self):
        arranged = meshes.make_mesh(ParallelConfig(replica=2, expert=2), 16).devices
        self.assertEqual([*arranged.flat], jax.devices()[:8])


if __name__ == "__main__":
    absltest.main()
