"""Compiles a small train step for eight absent v5p chips: what moves to the memory of the hosts."""

import json
import os
import subprocess
import sys

import pytest
from absl.testing import absltest

pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed: kimi_jax[tpu]")

_PROGRAM = """
import dataclasses, functools, json, sys
import jax
from jax.experimental import topologies
from kimi_jax.configs.compute import Remat
from kimi_jax.data.batches import abstract_batch
from kimi_jax.model import transformer
from kimi_jax.parallel import mesh as meshes
from kimi_jax.parallel.rules import BATCH
from kimi_jax.training.state import abstract_state
from kimi_jax.training.step import make_optimizer, train_step
from tests.support import tiny

offload = json.loads(sys.argv[1])
config = tiny.experiment(
    model=dict(num_layers=5, embed_dim=128),
    compute=dict(remat=Remat.FULL, offload_activations=offload),
    optimizer=dict(offload_state=offload),
    parallel=dict(data=2, expert=4),
)
devices = topologies.get_topology_desc(topology_name="v5p:2x2x2", platform="tpu").devices
mesh = meshes.make_mesh(config.parallel, config.model.num_routed_experts, devices)
plan = transformer.specs(config.model)
with jax.set_mesh(mesh):
    transformation = make_optimizer(config, plan)
    step = functools.partial(train_step, config=config, plan=plan, transformation=transformation)
    state = abstract_state(config, plan, transformation, mesh)
    batch = abstract_batch(32, 512, jax.NamedSharding(mesh, BATCH))
    traced = jax.jit(step, donate_argnums=0).trace(state, batch)
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
names = [name for name in dir(memory) if name.endswith("size_in_bytes")]
print(json.dumps({name: getattr(memory, name) for name in names}))
"""


def compiled_memory(offload: bool) -> dict[str, int]:
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(offload)],
        env=os.environ | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
class OffloadSlowTest(absltest.TestCase):
    def test_a_tpu_keeps_moments_and_layer_inputs_in_host_memory(self):
        kept, moved = compiled_memory(offload=False), compiled_memory(offload=True)
        # Four mixture layers' inputs, 4 sequences of 512 tokens a device, in float32; a single
        # dense layer is no loop and keeps its input where it is.
        self.assertEqual(kept["host_temp_size_in_bytes"], 0)
        self.assertGreaterEqual(moved["host_temp_size_in_bytes"], 4 * 4 * 512 * 128 * 4)
        self.assertLess(
            moved["argument_size_in_bytes"] + moved["temp_size_in_bytes"],
            kept["argument_size_in_bytes"] + kept["temp_size_in_bytes"],
        )
        self.assertGreater(
            moved["host_argument_size_in_bytes"], 0.3 * kept["argument_size_in_bytes"]
        )


if __name__ == "__main__":
    absltest.main()
