"""Compiles a small train step for eight absent v5p chips: what moves to the memory of the hosts."""

import json
import subprocess
import sys

import pytest
from absl.testing import absltest

# Run by a process of its own, since it compiles for TPUs only from its start.
_PROGRAM = """
import json, sys
from kimi_jax.parallel import topologies
topologies.prepare_environment()

from kimi_jax.configs.compute import Remat
from kimi_jax.model import transformer
from kimi_jax.parallel import mesh as meshes
from kimi_jax.training.step import lower_train_step
from tests.support import tiny

activations, state = json.loads(sys.argv[1])
config = tiny.experiment(
    model=dict(num_layers=5, embed_dim=128, max_position=512),
    data=dict(sequence_length=512),
    compute=dict(remat=Remat.FULL, offload_activations=activations),
    optimizer=dict(offload_state=state),
    parallel=dict(data=2, expert=4),
)
devices = topologies.absent_devices("v5p:2x2x2")
mesh = meshes.make_mesh(config.parallel, config.model.num_routed_experts, devices)
lowered = lower_train_step(config, transformer.specs(config.model), mesh)
memory = lowered.compile().memory_analysis()
names = [name for name in dir(memory) if name.endswith("in_bytes")]
print(json.dumps({name: getattr(memory, name) for name in names}))
"""


def compiled_memory(*, activations: bool, state: bool) -> dict[str, int]:
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps([activations, state])],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
class OffloadSlowTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        pytest.importorskip("libtpu", reason="compiling for TPUs needs pip install -e '.[aot]'")
        cls.kept = compiled_memory(activations=False, state=False)

    def test_a_tpu_keeps_layer_inputs_in_host_memory(self):
        moved = compiled_memory(activations=True, state=False)
        # Four mixture layers' inputs, 4 sequences of 512 tokens a device, in float32; a single
        # dense layer is no loop and keeps its input where it is.
        inputs = 4 * 4 * 512 * 128 * 4
        self.assertEqual(self.kept["host_temp_size_in_bytes"], 0)
        self.assertGreaterEqual(moved["host_temp_size_in_bytes"], inputs)
        peaks = [memory["peak_memory_in_bytes"] for memory in (self.kept, moved)]
        self.assertLess(peaks[1], peaks[0] - inputs / 2)

    def test_a_tpu_keeps_momentum_in_host_memory(self):
        moved = compiled_memory(activations=False, state=True)
        arguments = self.kept["argument_size_in_bytes"]
        self.assertGreater(moved["host_argument_size_in_bytes"], 0.25 * arguments)
        self.assertLess(moved["argument_size_in_bytes"], 0.75 * arguments)


if __name__ == "__main__":
    absltest.main()
