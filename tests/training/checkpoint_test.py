import pathlib
import shutil
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.core.errors import CheckpointMismatchError
from kimi_jax.model import transformer
from kimi_jax.training.checkpoint import CHECKPOINT_FOLDER, Checkpointer
from kimi_jax.training.state import abstract_state
from kimi_jax.training.step import make_optimizer
from tests.support import tiny

CURSOR = {"step": 3, "stream": "abc"}


def _filled(mesh, step, config=None):
    """A state of random values, each leaf in its layout on `mesh`."""
    random = np.random.default_rng(step)

    def fill(leaf):
        host = random.integers(0, 2**32, leaf.shape, np.uint32)
        if leaf.dtype == jnp.float32:
            host = random.standard_normal(leaf.shape).astype(np.float32)
        return jax.device_put(host.astype(leaf.dtype), leaf.sharding)

    filled = jax.tree.map(fill, _like(mesh, config))
    return filled.replace(step=jax.device_put(jnp.int32(step), filled.step.sharding))


def _like(mesh, config=None):
    config = config or tiny.experiment()
    plan = transformer.specs(config.model)
    with jax.set_mesh(mesh):
        return abstract_state(config, plan, make_optimizer(config, plan), mesh)


def _save(folder, mesh, steps, keep=2):
    states = {step: _filled(mesh, step) for step in steps}
    with Checkpointer(folder, keep=keep) as checkpoints:
        for state in states.values():
            checkpoints.save(state, CURSOR)
    return states


class CheckpointTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_a_state_moves_between_meshes_bit_for_bit(self):
        other_axes = tiny.mesh(2, 1, pipe=2, tensor=2)
        meshes = [tiny.mesh(2, 4), tiny.mesh(2, 4), other_axes, tiny.mesh(1, 1)]
        state = _save(self.folder / "0", meshes[0], [3])[3]
        expected = jax.device_get(state)
        for number, mesh in enumerate(meshes[1:]):
            like = _like(mesh)
            with Checkpointer(self.folder / str(number), keep=1) as checkpoints:
                restored, cursor = checkpoints.restore(like)
            self.assertEqual(cursor, CURSOR)
            self.assertEqual(
                jax.tree.map(lambda leaf: leaf.sharding, restored),
                jax.tree.map(lambda leaf: leaf.sharding, like),
            )
            chex.assert_trees_all_equal(jax.device_get(restored), expected, strict=True)
            with Checkpointer(self.folder / str(number + 1), keep=1) as checkpoints:
                checkpoints.save(restored, cursor)

    def test_a_state_in_host_memory_is_restored_there(self):
        config = tiny.experiment(optimizer={"offload_state": True})
        like = _like(tiny.mesh(8, 1), config)
        state = _filled(tiny.mesh(2, 4), 3, config)
        expected = jax.device_get(state)
        with Checkpointer(self.folder, keep=1) as checkpoints:
            checkpoints.save(state, CURSOR)
        with Checkpointer(self.folder, keep=1) as checkpoints:
            restored, _ = checkpoints.restore(like)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.optimizer)}
        self.assertEqual(kinds, {"device", "pinned_host"})
        self.assertEqual(
            jax.tree.map(lambda leaf: leaf.sharding, restored),
            jax.tree.map(lambda leaf: leaf.sharding, like),
        )
        chex.assert_trees_all_equal(jax.device_get(restored), expected, strict=True)

    def test_overwriting_the_arrays_after_save_does_not_reach_the_checkpoint(self):
        mesh = tiny.mesh(2, 4)
        state = _filled(mesh, 3)
        expected = jax.tree.map(np.array, jax.device_get(state))
        overwrite = jax.jit(
            lambda tree: jax.tree.map(jnp.zeros_like, tree),
            donate_argnums=0,
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, _like(mesh)),
        )
        with Checkpointer(self.folder, keep=1) as checkpoints:
            checkpoints.save(state, CURSOR)
            jax.block_until_ready(overwrite(state))
        with Checkpointer(self.folder, keep=1) as checkpoints:
            restored, _ = checkpoints.restore(_like(mesh))
        chex.assert_trees_all_equal(jax.device_get(restored), expected, strict=True)

    def test_the_newest_ones_are_kept(self):
        _save(self.folder, tiny.mesh(1, 1), [1, 2, 3, 4], keep=2)
        names = {path.name for path in (self.folder / CHECKPOINT_FOLDER).iterdir()}
        self.assertEqual(names, {"3", "4"})

    def test_an_unfinished_checkpoint_is_ignored(self):
        mesh = tiny.mesh(1, 1)
        states = _save(self.folder, mesh, [1, 2])
        folder = self.folder / CHECKPOINT_FOLDER
        # A process killed while it wrote checkpoint 2 leaves the name that is not yet final.
        (folder / "2").rename(folder / "2.orbax-checkpoint-tmp-7")
        shutil.rmtree(folder / "2.orbax-checkpoint-tmp-7" / "data")
        with Checkpointer(self.folder, keep=2) as checkpoints:
            self.assertEqual(checkpoints.latest_step, 1)
            restored, _ = checkpoints.restore(_like(mesh))
        chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(states[1]))

    def test_the_same_step_is_saved_once(self):
        mesh = tiny.mesh(1, 1)
        _save(self.folder, mesh, [2])
        with Checkpointer(self.folder, keep=2) as checkpoints:
            checkpoints.save(_filled(mesh, 2), {"step": 9, "stream": "other"})
            self.assertEqual(checkpoints.restore(_like(mesh))[1], CURSOR)

    def test_another_architecture_is_refused_with_its_step(self):
        mesh = tiny.mesh(1, 1)
        _save(self.folder, mesh, [2])
        like = _like(mesh)
        short = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=like.step.sharding)
        for wrong in (like.replace(params=like.params.replace(final_norm=short)), _without(like)):
            with (
                Checkpointer(self.folder, keep=2) as checkpoints,
                self.assertRaisesRegex(CheckpointMismatchError, "2 in .* holds other arrays"),
            ):
                checkpoints.restore(wrong)


def _without(like):
    return like.replace(params=like.params.replace(dense_blocks=None))


if __name__ == "__main__":
    absltest.main()
