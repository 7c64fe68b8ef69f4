from unittest import mock

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kimi_jax.data.batches import Batch
from kimi_jax.data.device_feed import DeviceFeed, local_rows, put_batch
from kimi_jax.data.pipeline import BatchIterator


class CountingBatches(BatchIterator):
    """Batch k is full of k."""

    def __init__(self):
        self._step = 0

    def __next__(self):
        array = np.full((8, 3), self._step, np.int32)
        self._step += 1
        return Batch(array, array, array, array, array.astype(np.float32))

    def get_state(self):
        return {"step": self._step}

    def set_state(self, state):
        self._step = state["step"]


def first_value(batch):
    return int(np.asarray(batch.inputs)[0, 0])


def make_sharding(data, expert):
    devices = jax.devices()[: data * expert]
    mesh = jax.make_mesh(
        (data, expert), ("data", "expert"), (AxisType.Explicit,) * 2, devices=devices
    )
    return NamedSharding(mesh, P(("data", "expert"), None))


class DeviceFeedTest(parameterized.TestCase):
    @parameterized.parameters((1, 1), (2, 4), (8, 1))
    def test_batches_arrive_split_over_the_mesh_and_unchanged(self, data, expert):
        sharding = make_sharding(data, expert)
        batch = next(CountingBatches())
        with jax.set_mesh(sharding.mesh):
            placed = put_batch(batch, sharding)
        chex.assert_trees_all_equal(jax.device_get(placed), batch)
        for array in jax.tree.leaves(placed):
            self.assertEqual(array.sharding, sharding)
            self.assertEqual(jax.typeof(array).sharding.spec, sharding.spec)
            shard = array.addressable_shards[0].data
            self.assertEqual(shard.shape, (8 // (data * expert), 3))

    @parameterized.parameters(
        (range(8), range(8)), ((4, 5, 6, 7), (4, 5, 6, 7)), ((7, 2), (2, 7)), ((0,), (0,))
    )
    def test_local_rows_are_those_of_the_own_devices(self, devices, rows):
        sharding = make_sharding(2, 4)
        own = {device for device in jax.devices() if device.id in devices}
        every = sharding.devices_indices_map((8, 3))
        addressable = {device: every[device] for device in own}
        with mock.patch.object(
            NamedSharding, "addressable_devices_indices_map", return_value=addressable
        ):
            self.assertSequenceEqual(local_rows(sharding, (8, 3)), rows)

    def test_state_is_that_of_the_batches_handed_out(self):
        host = CountingBatches()
        feed = DeviceFeed(host, make_sharding(2, 4), 8)
        self.assertEqual(feed.get_state(), {"step": 0})
        for step in range(3):
            self.assertEqual(first_value(next(feed)), step)
            self.assertEqual(feed.get_state(), {"step": step + 1})
            self.assertEqual(host.get_state(), {"step": step + 2})  # one is on its way

    def test_restored_state_continues_with_the_next_batch(self):
        feed = DeviceFeed(CountingBatches(), make_sharding(2, 4), 8)
        next(feed)
        feed.set_state({"step": 7})
        self.assertEqual(feed.get_state(), {"step": 7})
        self.assertEqual([first_value(next(feed)) for _ in range(2)], [7, 8])


if __name__ == "__main__":
    absltest.main()
