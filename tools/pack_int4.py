"""Packs a run that was trained for INT4: codes and scales for its experts, bfloat16 for the rest.

    python tools/pack_int4.py --workdir=runs/tiny_qat_cpu --output=packed/tiny_qat --verify

The newest checkpoint is read onto this machine's devices. --verify reloads what was written and
compares its logits with those of training's forward pass, bit for bit.
"""

import pathlib

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import program
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.errors import CheckpointMismatchError, require
from kimi_jax.core.trees import leaf_names
from kimi_jax.model import transformer
from kimi_jax.parallel import mesh as meshes
from kimi_jax.training import packed, workdir
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.state import abstract_state
from kimi_jax.training.step import make_optimizer

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write; must not exist", required=True)
_VERIFY = flags.DEFINE_bool("verify", False, "reload, and compare logits with training's")
_MB = 1e6
_LENGTH = 256  # positions that are compared


def main() -> None:
    """Reads, packs, writes and, if asked, verifies."""
    config = workdir.read_config(_WORKDIR.value)
    meshes.simulate_devices(config.parallel.simulated_devices)
    mesh = meshes.make_mesh(config.parallel, config.model.num_routed_experts)
    console = Console()
    with jax.set_mesh(mesh):
        step, params = _newest(config, mesh)
        packed.save_packed(_OUTPUT.value, params, config)
        console.print(f"step {step} of {_WORKDIR.value} -> {_OUTPUT.value}")
        console.print(_sizes(params, packed.abstract_packed(config, mesh)))
        if _VERIFY.value:
            _verify(config, params, mesh)
            console.print("the reloaded model's logits are those of training, bit for bit")


def _newest(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> tuple[int, object]:
    plan = transformer.specs(config.model)
    with Checkpointer(_WORKDIR.value, keep=config.training.checkpoints_to_keep) as checkpoints:
        require(checkpoints.latest_step is not None, f"{_WORKDIR.value} holds no checkpoint yet")
        like = abstract_state(config, plan, make_optimizer(config, plan), mesh)
        state, _ = checkpoints.restore(like)
        return checkpoints.latest_step, state.params


def _sizes(params: transformer.TransformerParams, packed_params: object) -> Table:
    """Bytes of each part before and after."""
    table = Table("part", "float32 masters, MB", "packed, MB", "bits a weight")
    before, after = _bytes_by_part(params), _bytes_by_part(packed_params)
    for part, size in (before | {"all": sum(before.values())}).items():
        now = after.get(part, sum(after.values()))
        table.add_row(part, f"{size / _MB:,.1f}", f"{now / _MB:,.1f}", f"{32 * now / size:.2f}")
    return table


def _bytes_by_part(tree: object) -> dict[str, int]:
    parts: dict[str, int] = {}
    names = jax.tree.leaves(leaf_names(tree))
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        part = "routed experts" if ".experts." in name else "everything else"
        parts[part] = parts.get(part, 0) + leaf.size * leaf.dtype.itemsize
    return parts


def _verify(config: ExperimentConfig, params: object, mesh: jax.sharding.Mesh) -> None:
    """Raises `CheckpointMismatchError` unless both forward passes give the same bits."""
    plain, reloaded = packed.load_packed(_OUTPUT.value, mesh)
    length = min(_LENGTH, config.model.max_position)
    expected = np.asarray(packed.random_logits(params, config, length=length))
    found = np.asarray(packed.random_logits(reloaded, plain, length=length))
    if not np.array_equal(expected, found):
        raise CheckpointMismatchError(
            f"{pathlib.Path(_OUTPUT.value)} computes other logits than the run: they differ by up "
            f"to {np.max(np.abs(expected - found))}"
        )


if __name__ == "__main__":
    program.run(main)
