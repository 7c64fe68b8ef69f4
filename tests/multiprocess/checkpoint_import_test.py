"""Two processes of four devices each read a published checkpoint onto one mesh."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl.testing import absltest

from kimi_jax.core.trees import leaf_names
from tests.support import families

_ROOT = pathlib.Path(__file__).parents[2]
# Each process writes the shards that it holds, and how much it has read for them.
_IMPORT = """
import pathlib, sys
import jax
import numpy as np
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.core.trees import leaf_names
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_import import import_parameters
from kimi_jax.parallel.mesh import make_mesh
folder, coordinator, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(coordinator, 2, index)
with HfCheckpoint(folder / "model") as checkpoint:
    mesh = make_mesh(ParallelConfig(data=1, expert=8), checkpoint.config.num_routed_experts)
    params = import_parameters(checkpoint, mesh)
    read = checkpoint.files.bytes_read
    count = 0
    def write(path, leaf):
        global count
        for shard in leaf.addressable_shards:
            bounds = [i.indices(n)[:2] for i, n in zip(shard.index, leaf.shape)]
            name = folder / f"{index}_{count}.npz"
            np.savez(name, path=path, bounds=bounds, values=shard.data)
            count += 1
    jax.tree.map(write, leaf_names(params), params)
print(read)
"""


class CheckpointImportTest(absltest.TestCase):
    def test_each_process_reads_its_own_experts_and_its_part_of_the_rest(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        tensors = families.write_family(folder / "model", "kimi_k2_bf16")
        read = self._import_in_two(folder)
        whole = {n: array.nbytes for n, array in tensors.items()}
        # The expert axis splits everything but vectors, which are on every device.
        vectors = sum(array.nbytes for array in tensors.values() if array.ndim == 1)
        for size in read:
            self.assertEqual(size, (sum(whole.values()) - vectors) // 2 + vectors)
        self._check_shards(folder, families.parameters(tensors, families.FAMILIES["kimi_k2_bf16"]))

    def _import_in_two(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _IMPORT, folder, coordinator, str(index)],
                cwd=_ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        for process in processes:
            self.enterContext(process)
            self.addCleanup(process.kill)
        read = []
        for process in processes:
            output, errors = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 0, errors)
            read.append(int(output.split()[-1]))
        return read

    def _check_shards(self, folder, params):
        """All shards of both processes together are the parameters."""
        names = jax.tree.leaves(leaf_names(params))
        expected = dict(zip(names, jax.tree.leaves(params), strict=True))
        missing = {name: np.ones(leaf.shape, bool) for name, leaf in expected.items()}
        for file in folder.glob("*.npz"):
            with np.load(file) as shard:
                name, index = str(shard["path"]), tuple(slice(*b) for b in shard["bounds"])
                np.testing.assert_array_equal(shard["values"], expected[name][index], name)
                missing[name][index] = False
        self.assertEqual([name for name, left in missing.items() if left.any()], [])


if __name__ == "__main__":
    absltest.main()
