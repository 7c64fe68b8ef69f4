from unittest import mock

import jax
from absl.testing import absltest
from jax.sharding import AbstractDevice, AbstractMesh

from kimi_jax.kernels import tile_table

_ENTRIES = (
    {"kernel": "op", "shape": {"rows": 16, "inputs": 64}, "tiles": {"rows": 8}},
    {"kernel": "op", "shape": {"rows": 512, "inputs": 64}, "tiles": {"rows": 256}},
    {"kernel": "other", "shape": {"rows": 512, "inputs": 64}, "tiles": {"rows": 1}},
)


class TileTableTest(absltest.TestCase):
    def _tiles(self, **shape):
        chip = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
        mesh = AbstractMesh((1,), ("d",), abstract_device=chip)
        table = mock.patch.object(tile_table, "table", return_value=_ENTRIES)
        with table, jax.sharding.use_abstract_mesh(mesh):
            return tile_table.tiles("op", **shape)

    def test_rows_take_the_nearest_tabulated_number(self):
        self.assertEqual(self._tiles(rows=1, inputs=64), {"rows": 8})
        self.assertEqual(self._tiles(rows=400, inputs=64), {"rows": 256})

    def test_other_sizes_must_be_tabulated_themselves(self):
        self.assertIsNone(self._tiles(rows=512, inputs=128))
        self.assertIsNone(self._tiles(rows=512))

    def test_a_cpu_has_no_tiles(self):
        self.assertIsNone(tile_table.tiles("op", rows=16, inputs=64))

    def test_shipped_tables_are_well_formed(self):
        for chip in ("v5e", "v5p", "v6e", "tpu7x", "h100", "h200"):
            for entry in tile_table.table(chip):
                needed = {"kernel", "shape", "tiles", "microseconds", "how"}
                self.assertLessEqual(needed, set(entry))
                self.assertIn(entry["how"], ("schedule", "timed"))


if __name__ == "__main__":
    absltest.main()
