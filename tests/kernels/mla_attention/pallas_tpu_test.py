import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.mla_attention import cases, mla_attention, pallas_tpu
from kimi_jax.kernels.mla_attention.pallas_tpu_cells import Folded
from kimi_jax.parallel.per_shard import per_shard
from tests.support.attention_oracle import (
    SCALE,
    attention_inputs,
    attention_oracle,
    inputs_with_larger_hidden_logits,
    inputs_with_negative_logits,
    run_attention,
    visible_pairs,
)
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)


def _tiles(forward_queries, forward_keys, backward_queries, backward_keys, panel, vmem_mib=1):
    return {
        "forward_queries": forward_queries,
        "forward_keys": forward_keys,
        "backward_queries": backward_queries,
        "backward_keys": backward_keys,
        "panel": panel,
        "vmem_mib": vmem_mib,
    }


# Each with wide and tall cells, panels of several cells, an even or an odd number of panels.
_FUSED = _tiles(32, 16, 16, 32, panel=64)
_NO_ROOM = _tiles(16, 32, 32, 16, panel=32, vmem_mib=0)  # for the gradient of all queries


def _run(operands, segments, d_out, dtype, tiles):
    def attend(*operands):
        return pallas_tpu.attend(operands, scale=SCALE, tiles=tiles, interpret=True)

    return run_attention(attend, operands, segments, d_out, dtype)


class MlaAttentionPallasTpuTest(parameterized.TestCase):
    @parameterized.parameters(
        *(("one_token", _FUSED), ("one_block", _NO_ROOM)),
        *(("odd_strips", _NO_ROOM), ("ragged_blocks", _FUSED)),
    )
    def test_output_maximum_and_gradients_equal_float64(self, name, tiles):
        operands, segments, d_out = attention_inputs(cases.TOY[name])
        actual = _run(operands, segments, d_out, jnp.float32, tiles)
        expected = attention_oracle(*operands, segments, d_out)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    def test_bfloat16_output_maximum_and_gradients_are_near_float64(self):
        operands, segments, d_out = attention_inputs(cases.TOY["odd_strips"])
        actual = _run(operands, segments, d_out, jnp.bfloat16, _FUSED)
        self.assertEqual(actual[1].dtype, jnp.float32)
        self.assertEqual(actual[0].dtype, jnp.bfloat16)
        expected = attention_oracle(*operands, segments, d_out)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, BFLOAT16_TOLERANCE)

    def test_a_head_whose_logits_are_all_negative_has_a_negative_maximum(self):
        operands, segments = inputs_with_negative_logits(cases.TOY["odd_strips"])
        d_out = operands[-1]
        _, expected, _ = attention_oracle(*operands, segments, d_out)
        self.assertLess(expected.max(), -1.0)
        _, actual, _ = _run(operands, segments, d_out, jnp.float32, _FUSED)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_larger_logits_behind_the_mask_do_not_reach_the_maximum(self):
        operands, segments, largest = inputs_with_larger_hidden_logits(cases.TOY["one_block"])
        d_out = operands[-1]
        _, expected, _ = attention_oracle(*operands, segments, d_out)
        self.assertTrue(np.all(largest > expected + 10.0))
        _, actual, _ = _run(operands, segments, d_out, jnp.float32, _FUSED)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_the_maximum_is_exactly_one_of_the_logits(self):
        # Small integers and a scale of a power of two: every sum and product is exact.
        (*operands, value), segments, _ = attention_inputs(cases.TOY["odd_strips"])
        q_nope, q_rope, k_nope, k_rope = (np.round(2 * a) for a in operands)
        logits = 0.25 * (
            np.einsum("btnh,bsnh->bnts", q_nope, k_nope)
            + np.einsum("btnr,bsr->bnts", q_rope, k_rope)
        )
        expected = np.max(logits, axis=(2, 3), where=visible_pairs(segments), initial=-np.inf)
        arrays = [jnp.asarray(a, jnp.float32) for a in (q_nope, q_rope, k_nope, k_rope, value)]
        segments = jnp.asarray(segments, jnp.int32)
        _, actual = pallas_tpu.attend((*arrays, segments), scale=0.25, tiles=_FUSED, interpret=True)
        np.testing.assert_array_equal(actual, expected)

    def test_what_other_documents_hold_is_not_read(self):
        operands, segments, _ = attention_inputs(cases.TOY["ragged_blocks"])
        segments = np.broadcast_to(np.arange(segments.shape[1]) // 100, segments.shape)
        # An infinity in a cell that is computed makes NaN of all its queries, masked or not.
        value = np.where(segments[..., None, None] == 1, np.inf, operands[4])
        arrays = [jnp.asarray(a, jnp.float32) for a in (*operands[:4], value)]
        out, _ = pallas_tpu.attend(
            (*arrays, jnp.asarray(segments, jnp.int32)), scale=SCALE, tiles=_FUSED, interpret=True
        )
        # Positions 100 to 199 hold it; their last block of keys meets queries of 200 to 319, since
        # blocks of 32 queries hold the end of a document and the beginning of the next.
        self.assertTrue(np.all(np.isfinite(np.asarray(out)[:, 320:])))

    def test_gradients_in_per_shard_with_replicated_operands_equal_the_unsharded_ones(self):
        case = cases.Case(batch=4, positions=20, heads=2, nope=4, rope=2, value=3, documents=2)
        operands, segments, d_out = attention_inputs(case)
        q_nope, q_rope, k_nope, k_rope, value = (jnp.asarray(a, jnp.float32) for a in operands)
        operands = (q_nope, q_rope, k_nope[:1], k_rope[:1], value)
        segments, d_out = jnp.asarray(segments, jnp.int32), jnp.asarray(d_out, jnp.float32)

        def run(q_nope, q_rope, k_nope, k_rope, value, segments):
            batch = q_rope.shape[0]
            k_nope, k_rope = (jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in (k_nope, k_rope))
            all_operands = (q_nope, q_rope, k_nope, k_rope, value, segments)
            tiles = _tiles(16, 16, 16, 16, panel=16)
            return pallas_tpu.attend(all_operands, scale=SCALE, tiles=tiles, interpret=True)[0]

        expected = value_and_gradients(lambda *a: run(*a, segments), operands, d_out)
        split = (P("data"), P("data"), P(), P(), P("data"))
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            sharded = per_shard(run, in_specs=(*split, P("data")), out_specs=P("data"))
            actual = value_and_gradients(
                lambda *a: sharded(*a, jax.reshard(segments, P("data"))),
                tuple(map(jax.reshard, operands, split)),
                jax.reshard(d_out, P("data")),
            )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    @parameterized.product(panels=[1, 2, 3, 6, 7], is_by_keys=[False, True])
    def test_the_folded_triangle_meets_each_pair_once_and_rows_in_order(self, panels, is_by_keys):
        folded = Folded(panels, is_by_keys)
        rows, columns = folded.grid
        places = [(r, c) for r in range(rows) for c in range(columns) if folded.exists(r, c)]
        met = [tuple(map(int, folded.at(*place))) for place in places]
        self.assertCountEqual(met, [(i, j) for i in range(panels) for j in range(i + 1)])
        for panel in range(panels):
            mine = [pair for pair in met if pair[is_by_keys] == panel]
            self.assertEqual(mine, sorted(mine))
        self.assertLessEqual(rows * columns - len(met), panels)

    @parameterized.parameters((1, 128), (128, 128), (300, 512), (4096, 2048), (4097, 512))
    def test_default_panels_add_no_more_padding_than_blocks(self, positions, panel):
        tiles = pallas_tpu.default_tiles(positions, 128, 64, 128)
        self.assertEqual(tiles["panel"], panel)

    def test_a_scale_that_is_not_positive_raises(self):
        operands, segments, _ = attention_inputs(cases.TOY["one_token"])
        arrays = [jnp.asarray(a, jnp.float32) for a in operands]
        with self.assertRaisesRegex(ValueError, "scale must be positive, got -1.0"):
            pallas_tpu.mla_attention(*arrays, jnp.asarray(segments, jnp.int32), scale=-1.0)

    def test_it_raises_where_there_is_no_tpu(self):
        operands, segments, _ = attention_inputs(cases.TOY["one_token"])
        arrays = [jnp.asarray(a, jnp.float32) for a in operands]
        attend = functools.partial(mla_attention, implementation=Implementation.PALLAS_TPU)
        with self.assertRaisesRegex(NotImplementedError, "runs on a TPU"):
            attend(*arrays, jnp.asarray(segments, jnp.int32), scale=SCALE)


if __name__ == "__main__":
    absltest.main()
