"""The folder of a run: who may write into it."""

import json
import os
import pathlib

import jax

from kimi_jax.configs import convert
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.errors import CheckpointMismatchError, ConfigError, require
from kimi_jax.parallel.multihost import first_before_others, is_first

CONFIG_FILE = "config.json"

# A run may go on with other values of these: they change where and how it is computed and recorded,
# not what.
_FREE_ON_RESUME = (
    "parallel.",
    "training.accumulation_steps",
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

    In a run of several processes the first does that, and the others check that they see it.

    Args:
      workdir: folder of the run.
      config: what is about to run.
      resume: whether to go on with a run that is already there.

    Returns:
      The folder. Its `config.json` says what was run.

    Raises:
      CheckpointMismatchError: the folder holds a run and `resume` is False, or that run had another
        configuration; nothing is changed then.
      ConfigError: nothing can be written there, or the processes differ in what they see or run.
    """
    folder = pathlib.Path(workdir)
    new = convert.to_json_dict(config)
    with first_before_others("claim the work directory"):
        if is_first():
            _claim(folder, new, resume=resume)
        else:
            _check_shared(folder, new)
    return folder


def read_config(workdir: str | os.PathLike) -> ExperimentConfig:
    """Returns the configuration of the run in a folder.

    Raises:
      CheckpointMismatchError: the folder holds no run, or one that this version cannot read.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise CheckpointMismatchError(f"{workdir} holds no run: it has no {CONFIG_FILE}")
    return convert.from_mapping(ExperimentConfig, _read(path))


def _claim(folder: pathlib.Path, new: dict, *, resume: bool) -> None:
    path = folder / CONFIG_FILE
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


def _check_shared(folder: pathlib.Path, own: dict) -> None:
    """Checks what process 0 wrote."""
    path = folder / CONFIG_FILE
    require(
        path.exists(),
        f"process {jax.process_index()} does not see {path}, which process 0 has written; "
        "--workdir must be the same folder on every host, such as one on a network file system",
    )
    changed = convert.differences(_read(path), own)
    require(
        not changed,
        f"process {jax.process_index()} was started with other options than process 0; start all "
        "with the same --config and overrides:" + "".join(f"\n  {line}" for line in changed),
    )


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
