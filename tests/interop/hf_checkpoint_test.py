"""Reading a published folder: its values by pieces, and what is wrong with a bad one."""

import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.errors import CheckpointFileError, ConfigError
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_names import hf_tensors
from tests.support import families

_EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
_KV_DOWN = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
_FAMILIES = families.FAMILIES


class CheckpointTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "model"

    def write(self, family, changes=None, **config):
        tensors = families.random_tensors(_FAMILIES[family]) | (changes or {})
        families.write(self.folder, tensors, families.fields(_FAMILIES[family]) | config)
        return tensors

    def open(self):
        return self.enterContext(HfCheckpoint(self.folder))


class ReadTest(CheckpointTestCase):
    @parameterized.parameters(*_FAMILIES)
    def test_config_forms_and_values_of_a_family_are_read(self, name):
        family = _FAMILIES[name]
        tensors = self.write(name)
        bare = {n.removeprefix(family.prefix): array for n, array in tensors.items()}
        checkpoint = self.open()
        self.assertEqual(checkpoint.config, family.config)
        self.assertEqual(checkpoint.contents.prefix, family.prefix)
        self.assertEqual(checkpoint.group_size, 32 if family.form is FileFormat.INT4 else None)
        for tensor in hf_tensors(family.config).values():
            rows = slice(tensor.shape[0] // 3, tensor.shape[0] - 1)
            found = checkpoint.rows(tensor.name, rows)
            expected = families.values(bare, tensor.name)[rows]
            np.testing.assert_array_equal(found.astype(np.float32), expected, tensor.name)

    def test_a_piece_that_begins_anywhere_has_its_blocks_or_groups_scales(self):
        for family, name, shape in (
            ("kimi_k2", _KV_DOWN, (144, 256)),
            ("kimi_k2_thinking", _EXPERT, (64, 256)),
        ):
            self.folder = self.folder.with_name(family)
            expected = families.values(self.write(family), name)
            checkpoint = self.open()
            random = np.random.default_rng(0)
            for _ in range(20):
                rows, columns = (
                    slice(*sorted(random.choice(size + 1, 2, replace=False).tolist()))
                    for size in shape
                )
                found = checkpoint.piece(name, rows, columns).astype(np.float32)
                np.testing.assert_array_equal(found, expected[rows, columns])

    def test_no_more_than_the_piece_is_read(self):
        self.write("kimi_k2")
        checkpoint = self.open()
        checkpoint.piece(_KV_DOWN, slice(120, 130), slice(5, 9))
        self.assertEqual(checkpoint.files.bytes_read, 10 * 4 + 2 * 4)  # codes, two scales

    def test_int4_rows_are_the_files_bits_and_other_tensors_have_none(self):
        tensors = self.write("kimi_k2_5")
        checkpoint = self.open()
        packed, scales = checkpoint.int4_rows(_EXPERT, slice(3, 40))
        for found, suffix in ((packed, "_packed"), (scales, "_scale")):
            expected = tensors["language_model." + _EXPERT + suffix][3:40]
            self.assertEqual(found.dtype, expected.dtype)
            self.assertEqual(found.tobytes(), expected.tobytes())
        self.assertIsNone(checkpoint.int4_rows(_KV_DOWN, slice(0, 1)))


class BadInputTest(CheckpointTestCase):
    def _changed(self, family, name, place, value):
        """Writes a folder in which one value of a tensor is another."""
        array = families.random_tensors(_FAMILIES[family])[name].copy()
        array.reshape(-1)[place] = value
        self.write(family, {name: array})

    def _file_of(self, name):
        index = json.loads((self.folder / "model.safetensors.index.json").read_text())
        return self.folder / index["weight_map"][name]

    @parameterized.product(
        where=[
            ("kimi_k2", _KV_DOWN, "_scale_inv"),
            ("kimi_k2_thinking", _EXPERT, "_scale"),
        ],
        value=[np.nan, np.inf, -np.inf],
    )
    def test_a_scale_that_is_not_finite_names_file_and_tensor(self, where, value):
        family, name, suffix = where
        self._changed(family, name + suffix, 1, value)
        checkpoint = self.open()
        message = f"{self._file_of(name + suffix)}: {name}{suffix} holds a scale that is not finite"
        with self.assertRaisesRegex(CheckpointFileError, message):
            checkpoint.rows(name, slice(0, 64))
        if family == "kimi_k2_thinking":
            with self.assertRaisesRegex(CheckpointFileError, message):
                checkpoint.int4_rows(name, slice(0, 64))

    def test_a_code_that_stands_for_no_number_names_file_and_tensor(self):
        self._changed("kimi_k2", _KV_DOWN, 130 * 256, np.nan)
        checkpoint = self.open()
        checkpoint.rows(_KV_DOWN, slice(0, 130))
        message = f"{self._file_of(_KV_DOWN)}: {_KV_DOWN} holds a code that stands for no number"
        with self.assertRaisesRegex(CheckpointFileError, message):
            checkpoint.rows(_KV_DOWN, slice(130, 131))

    def test_a_stated_shape_that_is_not_the_weights_names_file_and_tensor(self):
        name = "language_model." + _EXPERT + "_shape"
        self.write("kimi_k2_5", {name: np.array([256, 64])})
        checkpoint = self.open()
        message = rf"{self._file_of(name)}: {name} must say \[64, 256\], but says \[256, 64\]"
        for read in (checkpoint.rows, checkpoint.int4_rows):
            with self.assertRaisesRegex(CheckpointFileError, message):
                read(_EXPERT, slice(0, 2))

    @parameterized.named_parameters(
        ("missing", {_KV_DOWN: None}, f"{_KV_DOWN} is missing"),
        (
            "of_another_shape",
            {_KV_DOWN: np.zeros((144, 255), ml_dtypes.bfloat16)},
            rf"{_KV_DOWN} must be \[144, 256\], but is \[144, 255\]",
        ),
        ("of_another_dtype", {_KV_DOWN: np.zeros((144, 256), np.int32)}, "but is I32"),
        ("too_many", {"model.other": np.zeros(3, np.float32)}, "model.other belongs to nothing"),
    )
    def test_a_tensor_is_refused_when_the_folder_is_opened(self, changes, message):
        tensors = families.random_tensors(_FAMILIES["kimi_k2_bf16"]) | changes
        tensors = {name: array for name, array in tensors.items() if array is not None}
        families.write(self.folder, tensors, families.fields(_FAMILIES["kimi_k2_bf16"]))
        with self.assertRaisesRegex(CheckpointFileError, f"{self.folder}: .*{message}"):
            HfCheckpoint(self.folder)

    def test_a_config_without_its_tensors_is_refused(self):
        self.write("moonlight", num_hidden_layers=3)
        with self.assertRaisesRegex(CheckpointFileError, r"model.layers.2.*missing"):
            HfCheckpoint(self.folder)

    def test_a_config_that_is_missing_broken_or_of_another_kind_is_refused(self):
        self.write("moonlight")
        path = self.folder / "config.json"
        for text, message in (
            ("{", f"{path} is not JSON"),
            ("[]", f"{path} must hold a JSON object"),
            ('{"model_type": "llama"}', "model_type must be one of"),
            ('{"model_type": "kimi_k2"}', "is missing"),
        ):
            path.write_text(text)
            with self.assertRaisesRegex(ConfigError, message):
                HfCheckpoint(self.folder)
        path.unlink()
        with self.assertRaisesRegex(ConfigError, f"cannot read {path}"):
            HfCheckpoint(self.folder)

    def test_a_missing_file_is_named(self):
        self.write("moonlight")
        (self.folder / "model-00002-of-00002.safetensors").unlink()
        with self.assertRaisesRegex(CheckpointFileError, "model-00002-of-00002.safetensors"):
            HfCheckpoint(self.folder)


if __name__ == "__main__":
    absltest.main()
