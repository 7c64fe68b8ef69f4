import importlib.util
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from kimi_jax.core.errors import ConfigError
from kimi_jax.parallel import topologies


class _Tpu:
    platform = "tpu"

    def __init__(self, *coords, slice_index=0):
        self.coords = coords
        self.slice_index = slice_index


class _Gpu:
    platform = "gpu"

    def __init__(self, number):
        self.id = number


class TopologiesTest(parameterized.TestCase):
    @parameterized.parameters("v9:2x2x1", "v5p8x8x8", "h100", "h100:0", "h100:8x8", "")
    def test_an_unknown_name_is_refused_with_what_works(self, name):
        with self.assertRaisesRegex(ConfigError, "is unknown; TPUs are named like v5p:8x8x8"):
            topologies.absent_devices(name)

    @parameterized.parameters(("v5p:2x2x1", r"\.\[aot\]"), ("h100:8", r"\.\[aot-cuda\]"))
    def test_a_missing_compiler_is_named_with_its_extra(self, name, extra):
        with (
            mock.patch.object(importlib.util, "find_spec", return_value=None),
            self.assertRaisesRegex(ConfigError, f"not installed: pip install -e '{extra}'"),
        ):
            topologies.absent_devices(name)

    def test_dimensions_of_the_torus_are_those_along_which_a_group_is_spread(self):
        line = [_Tpu(0, y, 1) for y in range(4)]
        plane = [_Tpu(x, y, 1) for x in range(2) for y in range(4)]
        self.assertEqual(topologies.torus_dimensions(line), 1)
        self.assertEqual(topologies.torus_dimensions(plane), 2)

    def test_slices_and_nodes_are_joined_by_the_network(self):
        one_slice = [_Tpu(0, 0, 0), _Tpu(1, 0, 0)]
        two_slices = [_Tpu(0, 0, 0), _Tpu(0, 0, 0, slice_index=1)]
        self.assertFalse(topologies.spans_network(one_slice))
        self.assertTrue(topologies.spans_network(two_slices))
        self.assertFalse(topologies.spans_network([_Gpu(0), _Gpu(7)]))
        self.assertTrue(topologies.spans_network([_Gpu(0), _Gpu(8)]))

    def test_a_gpu_is_lowered_for_as_cuda(self):
        self.assertEqual(topologies.lowering_platform(_Gpu(0)), "cuda")
        self.assertEqual(topologies.lowering_platform(jax.devices()[0]), "cpu")


if __name__ == "__main__":
    absltest.main()
