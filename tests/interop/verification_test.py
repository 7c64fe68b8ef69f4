import dataclasses
import json
import pathlib
import tempfile

import jax
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.hugging_face_export import FileFormat, to_hugging_face
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop import verification
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_export import export_hugging_face
from kimi_jax.interop.tensor_source import ParameterSource
from tests.support import families, tiny

_FAMILY = families.FAMILIES["kimi_k2_bf16"]
_CONFIG = dataclasses.replace(tiny.MODEL, routed_scaling_factor=1.5)


class VerifyBytesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        tensors = families.random_tensors(_FAMILY)
        source = ParameterSource.of(families.parameters(tensors, _FAMILY), _FAMILY.config)
        self.output = folder / "output"
        self.encoder = Encoder(source, FileFormat.FP8, 32)
        export_hugging_face(self.output, self.encoder, fields={}, identity="x", shard_bytes=300_000)

    def test_what_was_written_is_found_unchanged_to_the_last_byte(self):
        seen = []
        verification.verify_bytes(self.output, self.encoder, seen.append)
        written = families.load(self.output)
        buffers = sum(len(t[2]) for name, t in written.items() if name.endswith("inv_freq"))
        self.assertEqual(seen[-1], sum(len(t[2]) for t in written.values()) - buffers)

    @parameterized.parameters(0, 1, 2)
    def test_a_flipped_bit_names_file_and_tensor(self, place):
        path = sorted(self.output.glob("*.safetensors"))[place]
        content = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        at = begin + (len(content) - begin) // 2
        content[at] ^= 1
        path.write_bytes(content)
        header = json.loads(content[8:begin])
        header.pop("__metadata__")
        (name,) = (
            name
            for name, entry in header.items()
            if entry["data_offsets"][0] <= at - begin < entry["data_offsets"][1]
        )
        with self.assertRaisesRegex(
            CheckpointFileError, f"{path}: {name} differs from what it was"
        ):
            verification.verify_bytes(self.output, self.encoder)


class LogitsTest(absltest.TestCase):
    def test_the_same_model_is_not_apart_and_another_one_is(self):
        params = tiny.host_parameters()
        source = ParameterSource.of(params, _CONFIG)
        found = verification.compare_logits(source, source)
        self.assertEqual((found.largest, found.same_choice), (0.0, 1.0))
        self.assertGreater(found.scale, 0.1)
        head = params.head.copy()
        head[:, 3] += 0.01
        changed = ParameterSource.of(params.replace(head=head), _CONFIG)
        found = verification.compare_logits(source, changed)
        self.assertBetween(found.largest, 1e-4, 1.0)

    def test_logits_are_those_of_the_parameters_themselves(self):
        mesh = tiny.mesh(1, 1)
        source = ParameterSource.of(tiny.host_parameters(), tiny.MODEL)
        read = verification.parameters(source, mesh)
        jax.tree.map(np.testing.assert_array_equal, read, tiny.host_parameters())

    def test_only_small_models_are_compared(self):
        self.assertTrue(verification.is_small(ParameterSource({}, tiny.MODEL)))
        self.assertFalse(verification.is_small(ParameterSource({}, presets.moonlight_16b())))


class PublishedLogitsTest(absltest.TestCase):
    def test_a_published_folder_and_its_parameters_compute_the_same(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "model"
        params = jax.tree.map(_to_bfloat16_grid, tiny.host_parameters())
        source = ParameterSource.of(params, _CONFIG)
        export_hugging_face(
            folder,
            Encoder(source, FileFormat.BF16, 32),
            fields=to_hugging_face(_CONFIG),
            identity="x",
        )
        with HfCheckpoint(folder) as written:
            found = verification.compare_logits(source, written)
        self.assertEqual((found.largest, found.same_choice), (0.0, 1.0))


def _to_bfloat16_grid(leaf):
    return leaf.astype(ml_dtypes.bfloat16).astype(np.float32)


if __name__ == "__main__":
    absltest.main()
