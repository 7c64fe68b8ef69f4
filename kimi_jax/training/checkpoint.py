"""Checkpoints of the whole run: parameters, optimizer, clip history, random key, data cursor."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from kimi_jax.configs import convert
from kimi_jax.core.errors import CheckpointMismatchError
from kimi_jax.core.trees import leaf_names
from kimi_jax.training.state import TrainState

CHECKPOINT_FOLDER = "checkpoints"
STATE_FOLDER = "state"  # in the folder of a step
_DATA = "data"
_CHUNK_BYTES = 16 << 20
_MOST_DIFFERENCES = 10  # named in an error


class Checkpointer:
    """A context manager that saves in the background and keeps the newest checkpoints.

    A checkpoint appears under its final name only when it is complete, so that a process killed
    while saving leaves the one before.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int) -> None:
        """Opens the checkpoints of a run.

        Args:
          workdir: folder of the run.
          keep: how many of the newest checkpoints stay on disk.
        """
        folder = pathlib.Path(workdir).absolute() / CHECKPOINT_FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {
            STATE_FOLDER: ocp.StandardCheckpointHandler(),
            _DATA: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Optimizer steps done in the newest complete checkpoint; None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_cursor: dict[str, Any]) -> None:
        """Starts to save; returns once the arrays are copied, so that they may be overwritten."""
        step = int(state.step)
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state, save_args=chunks(state)),
                data=ocp.args.JsonSave(data_cursor),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint.

        Args:
          like: from `abstract_state`; says where on the mesh each leaf goes.

        Returns:
          The state and the data cursor.

        Raises:
          CheckpointMismatchError: the checkpoint holds other leaves or shapes.
        """
        step = self.latest_step
        saved = _shapes(self._manager.item_metadata(step)[STATE_FOLDER].tree)
        wrong = convert.differences(saved, _shapes(like))
        if wrong:
            raise CheckpointMismatchError(
                f"checkpoint {step} in {self._manager.directory} holds other arrays than this "
                "configuration needs:\n  " + "\n  ".join(wrong[:_MOST_DIFFERENCES])
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
            ),
        )
        return restored[STATE_FOLDER], restored[_DATA]


def newest_state(workdir: str | os.PathLike) -> pathlib.Path | None:
    """Returns the folder of the newest complete state of a run, its parent named by the step."""
    found = pathlib.Path(workdir).glob(f"{CHECKPOINT_FOLDER}/*/{STATE_FOLDER}")
    # A checkpoint that is being written has a longer name.
    complete = [state for state in found if state.parent.name.isdecimal()]
    return max(complete, key=lambda state: int(state.parent.name), default=None)


def chunks(tree: Any) -> Any:
    """Has arrays stored in small pieces, layers and experts apart, so that one is read alone."""

    def of_leaf(leaf: jax.Array) -> ocp.SaveArgs:
        stacked = tuple(range(leaf.ndim - 2))
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=stacked)

    return jax.tree.map(of_leaf, tree)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted names, of arrays or of what describes them."""
    names = jax.tree.leaves(leaf_names(tree))
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(tree)]
    return dict(zip(names, shapes, strict=True))
