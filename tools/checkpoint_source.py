"""Opens whatever a checkpoint can be converted from."""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.hugging_face import model_config_from_hugging_face
from kimi_jax.configs.hugging_face_export import TEXT_SECTION, int4_group_size, to_hugging_face
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.data.corpus import open_tokenizer, tokenizer_files
from kimi_jax.interop.hf_checkpoint import CONFIG_FILE, HfCheckpoint
from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.stored_parameters import stored_parameters
from kimi_jax.interop.tensor_source import TensorSource
from kimi_jax.model.router import routed_scaling_factor
from kimi_jax.quantization.int4 import GROUP_SIZE
from kimi_jax.training import workdir
from kimi_jax.training.checkpoint import CHECKPOINT_FOLDER, newest_state
from kimi_jax.training.packed import WEIGHTS_FOLDER

_MASTER_BYTES = 4  # of a value of a run's parameters
# What is not carried from one published folder to another: it is written anew, or holds weights.
_NOT_CARRIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """A model that is about to be converted.

    Attributes:
      what: says what it is, for people.
      identity: differs where the model differs.
      source: its tensors.
      group_size: of INT4, what it has or was trained for.
      fields: of a config.json.
      carried: files of the tokenizer and the like.
    """

    what: str
    identity: str
    source: TensorSource
    group_size: int
    fields: dict[str, Any]
    carried: list[pathlib.Path]


@contextlib.contextmanager
def open_input(path: str) -> Iterator[Input]:
    """Opens a published folder, the folder of a run, or a packed model.

    Raises:
      CheckpointFileError: it is none of these, or not complete.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise CheckpointFileError(f"{folder} is no folder")
    if _is_ours(folder):
        yield _run(folder)
        return
    with HfCheckpoint(folder) as source:
        kept = [f for f in sorted(folder.iterdir()) if is_carried(f)]
        fields = json.loads((folder / CONFIG_FILE).read_text())
        fields = fields.get(TEXT_SECTION, fields)  # nothing else is read, nor written
        what = f"published checkpoint, {len(source.files.tensors):,} tensors"
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir())]
        identity = json.dumps([str(folder.resolve()), facts])
        yield Input(
            what=what,
            identity=identity,
            source=source,
            group_size=source.group_size or GROUP_SIZE,
            fields=fields,
            carried=kept,
        )


class Description(NamedTuple):
    """What is known of an input without its weights.

    Attributes:
      config: the architecture.
      group_size: of INT4.
      held_bytes: what reading it holds in memory beside blocks of rows.
    """

    config: ModelConfig
    group_size: int
    held_bytes: int


def describe(path: str) -> Description:
    """Describes an input by its configuration alone."""
    folder = pathlib.Path(path)
    if _is_ours(folder):
        run = workdir.read_config(folder)
        largest = max(math.prod(tensor.shape) for tensor in hf_tensors(run.model).values())
        held = 2 * _MASTER_BYTES * largest  # its pieces, too, while it is put together
        return Description(run.model, run.quantization.group_size, held)
    config = model_config_from_hugging_face(folder / CONFIG_FILE)
    fields = json.loads((folder / CONFIG_FILE).read_text())
    return Description(config, int4_group_size(fields) or GROUP_SIZE, 0)


def _is_ours(folder: pathlib.Path) -> bool:
    """Whether this project has written a folder: a run or a packed model."""
    return (folder / CHECKPOINT_FOLDER).is_dir() or (folder / WEIGHTS_FOLDER).is_dir()


def is_carried(file: pathlib.Path) -> bool:
    """Whether a file goes along as it is: the tokenizer's, a licence, a chat template."""
    return file.is_file() and file.name != CONFIG_FILE and not file.name.endswith(_NOT_CARRIED)


def _run(folder: pathlib.Path) -> Input:
    config = workdir.read_config(folder)
    if (folder / WEIGHTS_FOLDER).is_dir():
        what, weights, prefix = "packed model", folder / WEIGHTS_FOLDER, ""
    else:
        weights, prefix = newest_state(folder), "params."
        if weights is None:
            raise CheckpointFileError(f"{folder}: this run has no checkpoint yet")
        what = f"run, step {weights.parent.name}"
    return Input(
        what=what,
        identity=json.dumps([str(weights.resolve()), weights.stat().st_mtime_ns]),
        source=stored_parameters(weights, config.model, prefix=prefix),
        group_size=config.quantization.group_size,
        fields=_fields(config),
        carried=tokenizer_files(config.data),
    )


def _fields(config: ExperimentConfig) -> dict[str, Any]:
    tokenizer = open_tokenizer(config.data)
    model = config.model
    model = dataclasses.replace(model, routed_scaling_factor=routed_scaling_factor(model))
    return to_hugging_face(model, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
