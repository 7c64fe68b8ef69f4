from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels import stationary, tile_table, tpu
from kimi_jax.kernels.stationary import Shape, Tiles, Weight

_TILES = Tiles(rows=16, outputs=128)


class ProductTest(parameterized.TestCase):
    @parameterized.product(rows=[16, 48], transposed=[False, True])
    def test_each_tile_of_the_weight_is_made_once_however_many_tiles_of_rows_there_are(
        self, rows, transposed
    ):
        made = []

        def make(stored, dtype):
            jax.debug.callback(lambda: made.append(stored.shape))
            return 2.0 * stored.astype(dtype)

        rng = np.random.default_rng(0)
        w = rng.standard_normal((512, 256))
        x = rng.standard_normal((rows, 256 if transposed else 512))
        stored = (jnp.asarray(w, jnp.float32),)
        weight = Weight("product", stored, zeros=(0,), inputs=512, group_size=1, make=make)
        y = stationary.multiply(
            jnp.asarray(x, jnp.float32), weight, transposed=transposed, tiles=_TILES, interpret=True
        )
        jax.effects_barrier()
        expected = 2.0 * x @ (w.T if transposed else w)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        self.assertEqual(made, 4 * [(128, 256)] if transposed else 2 * [(512, 128)])


class TilesTest(parameterized.TestCase):
    def _chosen(self, found, rows):
        shape = Shape(rows, contracted=1024, outputs=512, entry_bytes=2.0)
        with mock.patch.object(tile_table, "tiles", return_value=found) as tiles:
            chosen = stationary.choose("op", {"rows": rows, "inputs": 7}, shape)
        tiles.assert_called_once_with("op", rows=rows, inputs=7)
        return chosen, stationary.by_rule(shape, None)

    def test_tabulated_tiles_are_taken_but_not_more_rows_than_there_are(self):
        found = {"rows": 512, "outputs": 256}
        self.assertEqual(self._chosen(found, 4096)[0], Tiles(512, 256))
        self.assertEqual(self._chosen(found, 33)[0], Tiles(48, 256))

    def test_tiles_for_few_rows_are_not_taken_for_many(self):
        chosen, by_rule = self._chosen({"rows": 16, "outputs": 128}, 4096)
        self.assertEqual(chosen, by_rule)
        self.assertGreaterEqual(chosen.rows, 256)
        self.assertEqual(self._chosen({"rows": 16, "outputs": 128}, 16)[0], Tiles(16, 128))

    def test_the_rule_takes_many_rows_and_at_most_512_outputs(self):
        small = Shape(4096, contracted=256, outputs=3584, entry_bytes=2.0)
        self.assertEqual(stationary.by_rule(small, "v5p"), Tiles(1024, 512))

    @parameterized.parameters(("v5p", False), ("v6e", True), (None, False))
    def test_candidates_are_tiles_whose_blocks_fit_the_chips_memory(self, chip, fits_the_largest):
        shape = Shape(4096, contracted=7168, outputs=2048, entry_bytes=2.0)
        fitting = [Tiles(**tiles) for tiles in stationary.candidates(shape, chip)]
        self.assertNotEmpty(fitting)
        for rows, outputs in fitting:
            blocks = 2 * (rows * 7168 + rows * outputs + 7168 * outputs)  # in bfloat16
            made = 2 * 7168 * outputs
            self.assertLessEqual(2 * blocks + made, tpu.facts(chip).vmem_bytes)
        self.assertEqual(Tiles(1024, 1024) in fitting, fits_the_largest)

    def test_one_step_in_as_many_as_there_are_tiles_of_rows_makes_the_weight(self):
        self.assertEqual(stationary.branch_shares(64, _TILES), (0.25, 0.75))
        self.assertEqual(stationary.branch_shares(16, _TILES), ())


if __name__ == "__main__":
    absltest.main()
