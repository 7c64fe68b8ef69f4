import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest

from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop.orbax_tensors import OrbaxTensors
from kimi_jax.interop.safetensors_io import TensorInfo

_WEIGHTS = np.arange(24.0).reshape(4, 6)


class OrbaxTensorsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "saved"
        tree = {
            "blocks": {"w": jnp.asarray(_WEIGHTS, jnp.bfloat16), "unused": None},
            "counts": (np.array(3, np.int32), jnp.array([True, False])),
        }
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder, tree)

    def test_names_shapes_and_dtypes_are_those_of_the_tree(self):
        expected = [
            TensorInfo("blocks.w", "BF16", (4, 6)),
            TensorInfo("counts.0", "I32", ()),
            TensorInfo("counts.1", "BOOL", (2,)),
        ]
        self.assertCountEqual(OrbaxTensors(self.folder).tensors.values(), expected)

    def test_rows_are_read(self):
        source = OrbaxTensors(self.folder)
        part = source.read("blocks.w", slice(1, 3))
        np.testing.assert_array_equal(part, jnp.asarray(_WEIGHTS[1:3], jnp.bfloat16), strict=True)
        self.assertEqual(source.read("counts.0"), 3)

    def test_a_folder_that_is_no_checkpoint_is_refused(self):
        with self.assertRaisesRegex(CheckpointFileError, f"{self.folder.parent}: .*no _METADATA"):
            OrbaxTensors(self.folder.parent)

    def test_metadata_that_is_damaged_is_refused(self):
        (self.folder / "_METADATA").write_text("{")
        with self.assertRaisesRegex(CheckpointFileError, f"{self.folder}: cannot be read"):
            OrbaxTensors(self.folder)

    def test_values_that_are_missing_are_named(self):
        source = OrbaxTensors(self.folder)
        shutil.rmtree(self.folder / "d")
        shutil.rmtree(self.folder / "ocdbt.process_0")
        with self.assertRaisesRegex(CheckpointFileError, f"{self.folder}: tensor blocks.w"):
            source.read("blocks.w")


if __name__ == "__main__":
    absltest.main()
