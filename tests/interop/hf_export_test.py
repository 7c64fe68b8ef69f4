"""Published checkpoints there and back, and exports that are stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.errors import CheckpointFileError, ConfigError
from kimi_jax.interop import hf_export
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_export import export_hugging_face, plan_export
from kimi_jax.interop.hf_import import Int4Import, import_parameters
from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.tensor_source import ParameterSource
from tests.support import families, tiny

_ROOT = pathlib.Path(__file__).parents[2]
_SHARD_BYTES = 150_000  # several files
_EXPERT_MESH = {"data": 2, "expert": 4}
_TENSOR_MESH = {"data": 4, "expert": 1, "tensor": 2}
_FIELDS = {"model_type": "deepseek_v3"}  # what config.json says is the caller's
INDEX = "model.safetensors.index.json"


def _of_the_model(found, prefix=""):
    """Tensors of the language model by their names without prefix."""
    skipped = ("vision_tower.", "mm_projector.", "model.layers.3.")
    return {n.removeprefix(prefix): t for n, t in found.items() if not n.startswith(skipped)}


def _with_values(found):
    """Puts values in place of the two tensors that hold an FP8 weight."""
    dtypes = {"F8_E4M3": "float8_e4m3fn", "F32": "float32"}
    result = dict(found)
    for name in found:
        if name + "_scale_inv" in found:
            pair = {}
            for part in (name, name + "_scale_inv"):
                dtype, shape, data = result.pop(part)
                pair[part] = np.frombuffer(data, dtypes[dtype]).reshape(shape)
            result[name] = families.values(pair, name).tobytes()
    return result


class ExportTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.output = self.folder / "output"
        self.partial = self.folder / "output.partial"

    def write(self, family, **options):
        families.write_family(self.folder / family, family, **options)
        return self.enterContext(HfCheckpoint(self.folder / family))

    def export(self, source, form, *, output=None, **options):
        options = {"fields": _FIELDS, "identity": "x", "shard_bytes": _SHARD_BYTES} | options
        encoder = Encoder(source, form, source.group_size or 32)
        export_hugging_face(output or self.output, encoder, **options)


class RoundTripTest(ExportTestCase):
    def _there_and_back(self, family, mesh, **options):
        """Returns the tensors of a family's files, and those written from its parameters."""
        any_codes = options.get("int4") is Int4Import.KEEP
        checkpoint = self.write(family, any_codes=any_codes)
        params = import_parameters(checkpoint, tiny.mesh(**mesh), **options)
        published_as = families.FAMILIES[family]
        self.export(ParameterSource.of(params, published_as.config), published_as.form)
        expected = families.load(self.folder / family)
        return _of_the_model(expected, published_as.prefix), families.load(self.output)

    @parameterized.parameters(("moonlight", _TENSOR_MESH), ("kimi_k2_bf16", _EXPERT_MESH))
    def test_bfloat16_comes_back_byte_for_byte(self, family, mesh):
        expected, found = self._there_and_back(family, mesh)
        self.assertEqual(found, expected)

    @parameterized.parameters(("kimi_k2_thinking", _TENSOR_MESH), ("kimi_k2_5", _EXPERT_MESH))
    def test_kept_int4_comes_back_byte_for_byte_whatever_its_codes_are(self, family, mesh):
        expected, found = self._there_and_back(family, mesh, int4=Int4Import.KEEP)
        self.assertEqual(found, expected)

    def test_dequantised_int4_comes_back_byte_for_byte_if_rounding_gave_it(self):
        expected, found = self._there_and_back("kimi_k2_5", _EXPERT_MESH)
        self.assertEqual(found, expected)

    @parameterized.parameters(("kimi_k2", _EXPERT_MESH), ("deepseek_v3", _TENSOR_MESH))
    def test_fp8_comes_back_with_the_same_values(self, family, mesh):
        expected, found = self._there_and_back(family, mesh)
        for tensors in (expected, found):  # the buffers of the family that has them
            for name in [name for name in tensors if name.endswith("inv_freq")]:
                if family != "kimi_k2":
                    del tensors[name]
        self.assertEqual(
            {n: t[:2] for n, t in found.items()}, {n: t[:2] for n, t in expected.items()}
        )
        self.assertEqual(_with_values(found), _with_values(expected))

    def test_without_parameters_between_int4_is_copied_byte_for_byte(self):
        checkpoint = self.write("kimi_k2_5")
        self.export(checkpoint, FileFormat.INT4)
        expected = families.load(self.folder / "kimi_k2_5")
        self.assertEqual(families.load(self.output), _of_the_model(expected, "language_model."))

    @parameterized.parameters("kimi_k2", "kimi_k2_thinking")
    def test_another_format_holds_what_bfloat16_has_of_the_values(self, family):
        checkpoint = self.write(family)
        self.export(checkpoint, FileFormat.BF16)
        tensors = families.random_tensors(families.FAMILIES[family])
        with HfCheckpoint(self._with_config()) as written:
            for name, tensor in hf_tensors(checkpoint.config).items():
                found = written.rows(name, slice(0, tensor.shape[0]))
                expected = families.values(tensors, name).astype(found.dtype)
                np.testing.assert_array_equal(found, expected, name)

    def _with_config(self):
        fields = families.fields(families.FAMILIES["kimi_k2_bf16"])
        (self.output / "config.json").write_text(json.dumps(fields))
        return self.output


class FolderTest(ExportTestCase):
    def test_the_folder_has_files_of_the_wanted_size_index_config_and_tokenizer(self):
        checkpoint = self.write("kimi_k2_bf16")
        tokenizer = self.folder / "tokenizer.model"
        tokenizer.write_text("words")
        seen = []
        self.export(checkpoint, FileFormat.BF16, carried=[tokenizer], progress=seen.append)
        plan = plan_export(checkpoint.config, FileFormat.BF16, shard_bytes=_SHARD_BYTES)
        self.assertGreater(len(plan), 3)
        names = {file.name for file in plan}
        self.assertIn(f"model-00001-of-{len(plan):05}.safetensors", names)
        present = {path.name for path in self.output.iterdir()}
        self.assertEqual(present, names | {INDEX, "config.json", "tokenizer.model"})
        self.assertEqual((self.output / "tokenizer.model").read_text(), "words")
        self.assertEqual(json.loads((self.output / "config.json").read_text()), _FIELDS)
        for file in plan:
            self.assertTrue(file.num_bytes <= _SHARD_BYTES or len(file.tensors) == 1, file.name)
        index = json.loads((self.output / INDEX).read_text())
        total = sum(len(data) for _, _, data in families.load(self.output).values())
        self.assertEqual(index["metadata"]["total_size"], total)
        self.assertEqual(
            index["weight_map"], {info.name: file.name for file in plan for info in file.infos}
        )
        self.assertEqual(seen, sorted(seen))
        self.assertEqual(seen[-1], total)

    def test_a_folder_that_exists_is_kept(self):
        checkpoint = self.write("moonlight")
        self.output.mkdir()
        with self.assertRaisesRegex(ConfigError, "output exists; name a folder that does not"):
            self.export(checkpoint, FileFormat.BF16)
        self.assertEmpty(list(self.output.iterdir()))

    def test_foreign_files_in_the_partial_folder_are_kept(self):
        checkpoint = self.write("moonlight")
        self.partial.mkdir()
        (self.partial / "mine").touch()
        with self.assertRaisesRegex(ConfigError, "output.partial holds files that no export left"):
            self.export(checkpoint, FileFormat.BF16)
        self.assertEqual([path.name for path in self.partial.iterdir()], ["mine"])

    def test_too_little_room_is_said_before_anything_is_written(self):
        checkpoint = self.write("moonlight")
        usage = mock.Mock(free=1000)
        with (
            mock.patch.object(hf_export.shutil, "disk_usage", return_value=usage),
            self.assertRaisesRegex(CheckpointFileError, "are still to be written, and 0.0 GB are"),
        ):
            self.export(checkpoint, FileFormat.BF16)
        self.assertFalse(self.output.exists())
        self.assertEmpty(list(self.partial.glob("*.safetensors")))

    def test_a_tensor_that_no_format_can_hold_is_named(self):
        checkpoint = self.write("moonlight")
        with self.assertRaisesRegex(ConfigError, "gate_proj.weight cannot be stored in INT4"):
            encoder = Encoder(checkpoint, FileFormat.INT4, 48)
            export_hugging_face(self.output, encoder, fields=_FIELDS, identity="x")
        self.assertEmpty(list(self.folder.glob("output*")))


class _StoppedError(Exception):
    pass


class StoppedExportTest(ExportTestCase):
    def _stop(self, checkpoint, form, at_byte, **options):
        def progress(num_bytes):
            if num_bytes > at_byte:
                raise _StoppedError

        with self.assertRaises(_StoppedError):
            self.export(checkpoint, form, progress=progress, **options)

    def test_a_stopped_export_goes_on_file_by_file(self):
        checkpoint = self.write("kimi_k2")
        self.export(checkpoint, FileFormat.FP8, output=self.folder / "uninterrupted")
        self._stop(checkpoint, FileFormat.FP8, at_byte=4 * _SHARD_BYTES)
        self.assertFalse(self.output.exists())
        written = {p.name: p.stat().st_mtime_ns for p in self.partial.glob("*.safetensors")}
        self.assertGreater(len(written), 2)
        seen = []
        self.export(checkpoint, FileFormat.FP8, progress=seen.append)
        for name, time in written.items():
            self.assertEqual((self.output / name).stat().st_mtime_ns, time)
        self.assertFalse(self.partial.exists())
        self.assertGreater(seen[0], 0)
        self._check_like_the_uninterrupted()

    def _check_like_the_uninterrupted(self):
        expected, found = (
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (self.folder / "uninterrupted", self.output)
        )
        self.assertEqual(found.keys(), expected.keys())
        self.assertEqual(found, expected)

    @parameterized.named_parameters(
        ("another_source", {"identity": "y"}, FileFormat.BF16),
        ("other_sizes", {"shard_bytes": 200_000}, FileFormat.BF16),
        ("another_format", {}, FileFormat.FP8),
    )
    def test_a_stopped_export_does_not_go_on_with(self, change, form):
        checkpoint = self.write("moonlight")
        self._stop(checkpoint, FileFormat.BF16, at_byte=2 * _SHARD_BYTES)
        before = sorted(path.name for path in self.partial.iterdir())
        with self.assertRaisesRegex(ConfigError, "output.partial holds another, unfinished export"):
            self.export(checkpoint, form, **change)
        self.assertEqual(sorted(path.name for path in self.partial.iterdir()), before)

    def test_a_record_that_was_cut_short_is_no_export_to_go_on_with(self):
        checkpoint = self.write("moonlight")
        self.partial.mkdir()
        (self.partial / "conversion.json").write_text('{"finger')
        with self.assertRaisesRegex(ConfigError, "holds another, unfinished export; remove it"):
            self.export(checkpoint, FileFormat.BF16)

    def test_an_export_that_is_stopped_at_its_end_goes_on(self):
        checkpoint = self.write("moonlight")
        self.export(checkpoint, FileFormat.BF16, output=self.folder / "uninterrupted")
        for owner, act in ((hf_export, "write_index"), (pathlib.Path, "rename")):
            with (
                mock.patch.object(owner, act, side_effect=_StoppedError),
                self.assertRaises(_StoppedError),
            ):
                self.export(checkpoint, FileFormat.BF16)
            self.assertFalse(self.output.exists())
        self.export(checkpoint, FileFormat.BF16)
        self._check_like_the_uninterrupted()


_EXPORT = """
import os, pathlib, resource, signal, sys
from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_export import export_hugging_face
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
if how == "full":  # the kernel refuses to let a file grow beyond this
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def progress(num_bytes):
    if how == "killed" and num_bytes > 400_000:
        os.kill(os.getpid(), signal.SIGKILL)
with HfCheckpoint(folder / "kimi_k2_bf16") as source:
    try:
        export_hugging_face(
            folder / "output",
            Encoder(source, FileFormat.BF16, 32),
            fields={"model_type": "deepseek_v3"},
            identity="x",
            shard_bytes=150_000,
            progress=progress,
        )
    except CheckpointFileError as error:
        print(error)
"""


class LostProcessTest(ExportTestCase):
    def _export_in_a_process(self, how):
        return subprocess.run(
            [sys.executable, "-c", _EXPORT, self.folder, how],
            cwd=_ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_a_killed_export_looks_unfinished_and_the_same_call_completes_it(self):
        checkpoint = self.write("kimi_k2_bf16")
        result = self._export_in_a_process("killed")
        self.assertEqual(result.returncode, -signal.SIGKILL, result.stderr)
        self.assertFalse(self.output.exists())
        self.assertFalse((self.partial / INDEX).exists())
        self.assertLen(list(self.partial.glob("*.safetensors.partial")), 1)
        written = {p.name: p.stat().st_mtime_ns for p in self.partial.glob("*.safetensors")}
        self.assertNotEmpty(written)
        self.export(checkpoint, FileFormat.BF16)
        for name, time in written.items():
            self.assertEqual((self.output / name).stat().st_mtime_ns, time)
        expected = families.load(self.folder / "kimi_k2_bf16")
        self.assertEqual(families.load(self.output), expected)
        self.assertEmpty(list(self.output.glob("*.partial")))

    def test_a_disk_that_is_full_in_the_middle_names_file_and_tensor(self):
        self.write("kimi_k2_bf16")
        result = self._export_in_a_process("full")
        self.assertRegex(
            result.stdout,
            r"output.partial/model-0000\d-of-\d+.safetensors: tensor model\.\S+ cannot be written: "
            "File too large",
        )
        self.assertFalse(self.output.exists())
        self.assertEmpty(list(self.partial.glob("*.safetensors.partial")))
        self.assertFalse((self.partial / INDEX).exists())


if __name__ == "__main__":
    absltest.main()
