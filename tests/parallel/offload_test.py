from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.core.errors import ConfigError
from kimi_jax.parallel import offload
from tests.support import tiny


class OffloadTest(absltest.TestCase):
    def test_arrays_go_to_the_host_and_back_in_their_layout(self):
        mesh = tiny.mesh(2, 4)
        layout = jax.NamedSharding(mesh, jax.P("data", "expert"))
        x = jax.device_put(np.arange(32.0, dtype=np.float32).reshape(4, 8), layout)
        with jax.set_mesh(mesh):
            there = jax.jit(offload.to_host)({"x": x, "count": jnp.int32(3)})
            back = jax.jit(offload.to_device)(there)
        self.assertEqual(there["x"].sharding, layout.with_memory_kind("pinned_host"))
        self.assertEqual(there["count"].sharding.memory_kind, "device")
        self.assertTrue(back["x"].sharding.is_equivalent_to(layout, 2))
        self.assertEqual(back["x"].sharding.memory_kind, "device")
        np.testing.assert_array_equal(back["x"], x)

    def test_devices_without_host_memory_are_named_with_the_option(self):
        offload.check_host_memory(tiny.mesh(1, 1), "optimizer.offload_state")
        device = mock.Mock(platform="abacus", device_kind="of wood")
        device.addressable_memories.return_value = [mock.Mock(kind="beads")]
        mesh = mock.Mock(devices=np.array([device]), spec=jax.sharding.Mesh)
        with self.assertRaisesRegex(
            ConfigError, r"optimizer.offload_state needs .* abacus \(of wood\) reach beads only"
        ):
            offload.check_host_memory(mesh, "optimizer.offload_state")


if __name__ == "__main__":
    absltest.main()
