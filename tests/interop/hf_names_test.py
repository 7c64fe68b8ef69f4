"""The plan of published tensors against the released checkpoint's, and against layouts by hand."""

import dataclasses
import functools
import gzip
import json
import math
import pathlib
import unittest

import jaxtyping
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.hugging_face import model_config_from_hugging_face
from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.param_spec import count_parameters, named_specs
from kimi_jax.interop import hf_names
from kimi_jax.interop.hf_export import plan_export
from kimi_jax.interop.hf_formats import Ignored, contents
from kimi_jax.interop.safetensors_header import TensorInfo
from kimi_jax.model import transformer
from tests.support import families, published

_RELEASED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "kimi_k2"
_NEEDS_RELEASED = unittest.skipUnless(
    (_RELEASED / "checkpoint_tensors.json.gz").is_file(),
    "the list of released tensors is not part of this repository",
)
# A layer is like the next one: two with experts are enough.
_PRESETS = {
    preset.__name__: dataclasses.replace(preset(), num_layers=preset().num_dense_layers + 2)
    for preset in (presets.kimi_k2, presets.moonlight_16b, presets.deepseek_v3)
}


@functools.cache
def _released():
    with gzip.open(_RELEASED / "checkpoint_tensors.json.gz") as file:
        entries = json.load(file)
    return {
        name: TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


@_NEEDS_RELEASED
class ReleasedKimiK2Test(absltest.TestCase):
    def setUp(self):
        super().setUp()
        # Checking the types of a million small calls takes six times as long as the calls.
        jaxtyping.config.update("jaxtyping_disable", True)
        self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)
        self.config = model_config_from_hugging_face(_RELEASED / "config.json")

    def test_the_fp8_export_plan_is_every_released_name_shape_and_dtype(self):
        plan = plan_export(self.config, FileFormat.FP8)
        infos = [info for file in plan for info in file.infos]
        self.assertLen(infos, 139_644)
        self.assertEqual({info.name: info for info in infos}, dict(_released()))

    def test_the_import_accounts_for_every_released_tensor(self):
        found = contents(self.config, _released(), "released")
        self.assertEqual(found.prefix, "")
        self.assertEqual(found.ignored.keys(), {Ignored.ROTARY_BUFFER})
        self.assertLen(found.ignored[Ignored.ROTARY_BUFFER], 61)
        scales = sum(form is FileFormat.FP8 for form in found.forms.values())
        self.assertEqual(len(found.forms) + scales + 61, 139_644)


class HfNamesTest(parameterized.TestCase):
    @parameterized.parameters(*_PRESETS)
    def test_names_and_shapes_are_those_of_the_modeling_code(self, name):
        config = _PRESETS[name]
        found = {tensor.name: tensor.shape for tensor in hf_names.hf_tensors(config).values()}
        self.assertEqual(found, published.shapes(config))

    @parameterized.parameters(*_PRESETS)
    def test_parts_tile_every_row_of_every_tensor_once(self, name):
        # Tensors of the same shape and parts are tiled alike: each kind is checked once.
        kinds = {}
        for tensor in hf_names.hf_tensors(_PRESETS[name]).values():
            parts = tuple((part.path, part.first_row) for part in tensor.parts)
            kinds.setdefault((tensor.shape, parts), tensor)
        for tensor in kinds.values():
            covered = np.zeros(tensor.shape[0], np.int32)
            for part in tensor.parts:
                whole = tuple(slice(0, size) for size in part.spec.shape)
                for rows in hf_names.row_ranges(tensor, part, whole):
                    covered[rows] += 1
                columns = hf_names.column_ranges(part, whole)
                width = [slice(0, size) for size in tensor.shape[1:]]
                self.assertEqual(columns, width, tensor.name)
            np.testing.assert_array_equal(covered, np.ones_like(covered), tensor.name)

    @parameterized.parameters(*_PRESETS)
    def test_parts_are_every_parameter_of_every_layer_and_expert_once(self, name):
        config = _PRESETS[name]
        plan = transformer.specs(config)
        sizes = sum(math.prod(t.shape) for t in hf_names.hf_tensors(config).values())
        self.assertEqual(sizes, count_parameters(plan))
        parts = hf_names.parts_by_path(config)
        self.assertEqual(parts.keys(), {path for path, _ in named_specs(plan)})
        for path, spec in named_specs(plan):
            stacked = spec.shape[: len(next(iter(parts[path])))]
            self.assertEqual(parts[path].keys(), set(np.ndindex(*stacked)), path)

    def test_layers_of_the_mixture_are_numbered_after_the_dense_ones(self):
        parts = hf_names.parts_by_path(_PRESETS["deepseek_v3"])
        tensor, part = parts["moe_blocks.feed_forward.experts.w_down"][1, 200]
        self.assertEqual(tensor.name, "model.layers.4.mlp.experts.200.down_proj.weight")
        self.assertEqual((part.index, part.first_row), ((1, 200), 0))

    @parameterized.product(
        name=["self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"],
        seed=[0, 1, 2, 3, 4],
    )
    def test_any_piece_of_a_parameter_is_at_its_rows_and_columns(self, name, seed):
        random = np.random.default_rng(seed)
        tensor = hf_names.hf_tensors(families.K2)[f"model.layers.1.{name}.weight"]
        values = random.normal(size=tensor.shape)
        for part in tensor.parts:
            whole = tuple(slice(0, size) for size in part.spec.shape)
            parameter = self._read(tensor, part, whole, values)
            self.assertEqual(parameter.shape, part.spec.shape)
            index = []
            for size in part.spec.shape:
                start, stop = sorted(random.choice(size + 1, 2, replace=False).tolist())
                index.append(slice(start, stop))
            piece = self._read(tensor, part, tuple(index), values)
            np.testing.assert_array_equal(piece, parameter[tuple(index)])
            rows = hf_names.row_ranges(tensor, part, whole)
            back = hf_names.to_published(part, parameter).reshape(-1, tensor.shape[1])
            np.testing.assert_array_equal(back, np.concatenate([values[r] for r in rows]))

    def _read(self, tensor, part, index, values):
        columns = hf_names.column_ranges(part, index)
        pieces = [
            np.concatenate([values[rows, c] for c in columns], axis=1)
            for rows in hf_names.row_ranges(tensor, part, index)
        ]
        return hf_names.from_published(part, np.concatenate(pieces), index)


if __name__ == "__main__":
    absltest.main()
