"""The folder of a run: who may write into it."""

import json
import os
import pathlib

from kimi_jax.configs import convert
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.errors import CheckpointMismatchError, ConfigError

CONFIG_FILE = "config.json"

# A run may go on with other values of these: they change where and how it is computed and recorded,
# not what.
_FREE_ON_RESUME = (
    "parallel.",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.checkpoints_to_keep",
    "training.sample_tokens",
    "data.cache_dir",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
)


def claim(workdir: str | os.PathLike, config: ExperimentConfig, *, resume: bool) -> pathlib.Path:
    """Makes the folder, or checks that it holds a run of the same configuration.

    Args:
      workdir: folder of the run.
      config: what is about to run.
      resume: whether to go on with a run that is already there.

    Returns:
      The folder. Its `config.json` says what was run.

    Raises:
      CheckpointMismatchError: the folder holds a run and `resume` is False, or that run had another
        configuration; nothing is changed then.
      ConfigError: nothing can be written there.
    """
    folder = pathlib.Path(workdir)
    path = folder / CONFIG_FILE
    new = convert.to_json_dict(config)
    if path.exists():
        if not resume:
            raise CheckpointMismatchError(
                f"{folder} already holds a run, and --noresume was given; choose another --workdir"
            )
        _check_same_run(path, _read(path), new)
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(new, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write to --workdir {folder}: {error}") from error
    temporary.replace(path)
    return folder


def _read(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointMismatchError(
            f"{path} is not JSON ({error}), so that its run cannot go on; choose another --workdir"
        ) from error


def _check_same_run(path: pathlib.Path, old: dict, new: dict) -> None:
    changed = [
        line for line in convert.differences(old, new) if not line.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise CheckpointMismatchError(
            f"{path} was made with another configuration; choose another --workdir, or set back:"
            + "".join(f"\n  {line}" for line in changed)
        )
