import dataclasses
import importlib
import pkgutil
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

import kimi_jax.kernels
from kimi_jax.kernels import tile_table
from kimi_jax.kernels.grouped_matmul import cases as grouped_cases
from kimi_jax.kernels.grouped_matmul import pallas_tpu as grouped
from kimi_jax.kernels.grouped_matmul import pallas_tpu_tuning as grouped_tuning
from kimi_jax.kernels.int4_fake_quant import cases as fake_quant_cases
from kimi_jax.kernels.int4_fake_quant import pallas_tpu as fake_quant
from kimi_jax.kernels.int4_matmul import cases as matmul_cases
from kimi_jax.kernels.int4_matmul import pallas_tpu as matmul
from kimi_jax.kernels.mla_attention import cases as attention_cases
from kimi_jax.kernels.mla_attention import pallas_tpu as attention
from kimi_jax.kernels.mla_attention import pallas_tpu_tuning as attention_tuning
from kimi_jax.kernels.mla_decode import cases as decode_cases
from kimi_jax.kernels.mla_decode import pallas_tpu as decode

_PACKED = attention_cases.Case(
    batch=1, positions=4096, heads=2, nope=128, rope=64, value=128, documents=3
)
_RAGGED = grouped_cases.Case(
    group_sizes=(3, 130, 1, 0, 129), spare_rows=41, inputs=512, outputs=1024
)
_ROWS, _PART = 64, 16


def _tunables():
    """Yields package, name and tunable of every kernel that can be tuned for TPUs."""
    path = kimi_jax.kernels.__path__
    for package in pkgutil.iter_modules(path):
        modules = importlib.import_module(f"kimi_jax.kernels.{package.name}")
        for module in pkgutil.iter_modules(getattr(modules, "__path__", [])):
            if module.name in ("pallas_tpu", "pallas_tpu_tuning"):
                name = f"kimi_jax.kernels.{package.name}.{module.name}"
                for kernel, tunable in getattr(
                    importlib.import_module(name), "TUNABLE", {}
                ).items():
                    yield package.name, kernel, tunable


def _parts_of_visits(sizes):
    """Returns for each visit of a tile by a group how many parts have rows of the group."""
    ends = np.cumsum(sizes)
    visits = []
    for end, size in zip(ends, sizes, strict=True):
        rows = np.arange(end - size, end)
        for tile in np.unique(rows // _ROWS):
            visits.append(len(np.unique(rows[rows // _ROWS == tile] // _PART)))
    return visits


class TunableTest(parameterized.TestCase):
    def _looked_up(self, call):
        """Returns what a call asks the tables for."""
        asked = []

        def record(kernel, **shape):
            asked.append((kernel, shape))

        with mock.patch.object(tile_table, "tiles", side_effect=record):
            call()
        return asked

    def test_attention_looks_its_tiles_up_by_the_shape_they_are_tabulated_by(self):
        expected = [
            (kernel, tunable.shape(_PACKED)) for kernel, tunable in attention_tuning.TUNABLE.items()
        ]
        asked = self._looked_up(lambda: attention.default_tiles(4096, 128, 64, 128))
        self.assertEqual(asked, expected)

    def test_decoding_looks_its_tiles_up_by_the_shape_they_are_tabulated_by(self):
        case = decode_cases.TOY["ragged"]
        given = jax.eval_shape(lambda: decode_cases.operands(case, jax.random.key(0)))
        asked = self._looked_up(
            lambda: jax.eval_shape(lambda given: decode.mla_decode(**given, scale=1.0), given)
        )
        self.assertEqual(asked, [("mla_decode", decode.TUNABLE["mla_decode"].shape(case))])

    @parameterized.product(
        kernels=[(matmul, matmul_cases), (fake_quant, fake_quant_cases)], transposed=[False, True]
    )
    def test_int4_products_look_their_tiles_up_by_the_shape_they_are_tabulated_by(
        self, kernels, transposed
    ):
        module, cases = kernels
        name = cases.__package__.rpartition(".")[2] + transposed * "_transposed"
        tunable, case = module.TUNABLE[name], cases.TOY["two_tiles_each_way"]
        given = jax.eval_shape(lambda: tunable.operands(case, jax.random.key(0)))

        def run(tiles):
            return self._looked_up(lambda: jax.eval_shape(lambda a: tunable.run(a, tiles), given))

        self.assertEqual(run(None), [(name, tunable.shape(case))])
        self.assertEqual(run({"rows": 16, "outputs": 128}), [])

    @parameterized.product(kernel=list(grouped_tuning.TUNABLE), int4=[False, True])
    def test_grouped_products_look_their_tiles_up_by_the_shape_they_are_tabulated_by(
        self, kernel, int4
    ):
        case = dataclasses.replace(_RAGGED, int4=int4)
        tunable = grouped_tuning.TUNABLE[kernel]
        given = jax.eval_shape(lambda: tunable.operands(case, jax.random.key(0)))
        x, w, sizes, d_y = (given[name] for name in ("x", "w", "group_sizes", "d_y"))
        piece = kernel.removeprefix("grouped_matmul_")
        operands = {
            "forward": (x, w, sizes),
            "input_gradient": (d_y, w, sizes),
            "weight_gradient": (x, d_y, sizes),
        }[piece]
        asked = self._looked_up(
            lambda: jax.eval_shape(lambda *arrays: getattr(grouped, piece)(*arrays), *operands)
        )
        self.assertEqual(asked, [(kernel, tunable.shape(case))])

    def test_candidates_are_tiles_that_differ_and_each_has_frequencies(self):
        names = []
        for package, kernel, tunable in _tunables():
            names.append(kernel)
            cases = importlib.import_module(f"kimi_jax.kernels.{package}.cases").KIMI_K2
            case = next(iter(cases.values()))
            candidates = tunable.candidates(case, "v5p")
            self.assertNotEmpty(candidates)
            self.assertLen({tuple(tiles.items()) for tiles in candidates}, len(candidates))
            known = tunable.frequencies(case, "v5p", candidates[0])
            self.assertTrue(all(f >= 0 for of_kernel in known.values() for f in of_kernel))
        self.assertContainsSubset(
            {"int4_matmul", "mla_attention_backward", "mla_decode", "grouped_matmul_forward"}, names
        )

    @parameterized.parameters((512, 512), (1024, 256))
    def test_attentions_cells_are_those_of_the_mask(self, queries, keys):
        document = np.arange(4096) * 3 // 4096
        causal = np.tril(np.ones((4096, 4096), bool))
        visible = causal & (document[:, None] == document)

        def cells(mask):
            return mask.reshape(4096 // queries, queries, 4096 // keys, keys)

        met, some, all_ = (
            cells(causal).any((1, 3)).sum(),
            cells(visible).any((1, 3)).sum(),
            cells(visible).all((1, 3)).sum(),
        )
        tunable = attention_tuning.TUNABLE["mla_attention_forward"]
        tiles = {"queries": queries, "keys": keys}
        (found,) = tunable.frequencies(_PACKED, "v5p", tiles).values()
        # Two panels of 2048 positions, hence three steps a head.
        outer = 3 * 2048 // queries
        expected = (2 / 3, met / outer, all_ / met, (some - all_) / met, 2 / 3)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        self.assertEqual(
            tunable.cost(_PACKED, tiles).flops, 2 * 2 * some * queries * keys * (128 + 64 + 128)
        )

    def test_attention_runs_two_kernels_backward_where_the_queries_gradient_does_not_fit(self):
        backward = attention_tuning.TUNABLE["mla_attention_backward"]
        tiles = {"queries": 512, "keys": 512}
        for positions, kernels in (
            (4096, ["mla_attention_backward"]),
            (131072, ["mla_attention_dkv", "mla_attention_dq"]),
        ):
            case = dataclasses.replace(_PACKED, positions=positions)
            self.assertEqual(list(backward.frequencies(case, "v6e", tiles)), kernels)

    @parameterized.parameters(False, True)
    def test_grouped_products_multiply_the_parts_in_which_groups_have_rows(self, int4):
        case = dataclasses.replace(_RAGGED, int4=int4)
        parts = _parts_of_visits(case.group_sizes)
        tiles = {"rows": _ROWS, "part": _PART, "columns": 512}
        forward = grouped_tuning.TUNABLE["grouped_matmul_forward"]
        (found,) = forward.frequencies(case, "v5p", tiles).values()
        num_tiles = -(-case.rows // _ROWS)
        visits = num_tiles + len(case.group_sizes)  # as many as there can be
        groups = np.count_nonzero(case.group_sizes)
        own = (groups, sum(parts) - groups) if int4 else (sum(parts),)
        np.testing.assert_allclose(np.array(found) * visits, (num_tiles, *own), rtol=1e-12)

    def test_weight_gradients_multiply_the_same_parts_and_write_every_group(self):
        tiles = {"rows": _ROWS, "part": _PART, "inputs": 512, "outputs": 512}
        gradient = grouped_tuning.TUNABLE["grouped_matmul_weight_gradient"]
        (found,) = gradient.frequencies(_RAGGED, "v5p", tiles).values()
        visits = -(-_RAGGED.rows // _ROWS) + 5
        parts = sum(_parts_of_visits(_RAGGED.group_sizes))
        np.testing.assert_allclose(np.array(found) * visits, (1, parts, 5), rtol=1e-12)
        flops = gradient.cost(_RAGGED, tiles).flops
        self.assertEqual(flops, 2 * parts * _PART * 512 * 1024)

    def test_decoding_takes_whole_blocks_and_one_that_is_cut(self):
        case = dataclasses.replace(
            decode_cases.KIMI_K2["16_of_4096"], lengths=(4096, 1000, 0), positions=4096
        )
        tunable = decode.TUNABLE["mla_decode"]
        (found,) = tunable.frequencies(case, "v5p", {"block": 512}).values()
        np.testing.assert_allclose(found, (1 / 8, 9 / 24, 1 / 24, 1 / 8))
        whole = dataclasses.replace(case, lengths=(4096, 1024, 0))
        cost = tunable.cost(case, {"block": 512})
        self.assertEqual(cost, decode_cases.cost(whole))


if __name__ == "__main__":
    absltest.main()
