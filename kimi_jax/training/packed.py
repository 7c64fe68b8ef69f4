"""A trained model in the format it was trained for: INT4 codes and scales, bfloat16 for the rest.

What comes out computes, bit for bit, what training's forward pass computed (with the XLA kernels):
codes are those of the last step's masters, and every other matrix is rounded to the compute dtype
as it is before each product.
"""

import dataclasses
import functools
import json
import os
import pathlib

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from kimi_jax.configs import convert
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.quantization import QuantizationConfig, Quantize
from kimi_jax.core.errors import require
from kimi_jax.model import transformer
from kimi_jax.parallel import offload, quantized
from kimi_jax.parallel.mesh import sequence_shards
from kimi_jax.parallel.multihost import is_first
from kimi_jax.parallel.placement import abstract_parameters, cast
from kimi_jax.quantization import qat
from kimi_jax.training.checkpoint import chunks
from kimi_jax.training.workdir import CONFIG_FILE, read_config

WEIGHTS_FOLDER = "weights"


def pack(
    params: transformer.TransformerParams, config: ExperimentConfig
) -> transformer.TransformerParams:
    """Returns stored parameters with quantised weights in place of those that training rounds.

    Args:
      params: float32 masters in storage layout.
      config: the run; `config.quantization` says what is rounded.
    """
    plan, dtype = transformer.specs(config.model), config.compute.dtype.value
    options = config.quantization
    require(
        options.enabled,
        f"quantization.format is {options.format.value!r}: there is nothing to pack; a run trains "
        "for it with quantization.format=int4",
    )
    options = dataclasses.replace(options, quantize=Quantize.STEP)
    rounded = quantized.quantize(params, plan, dtype, options)
    return qat.substitute(cast(params, plan, dtype), rounded)


def save_packed(
    folder: str | os.PathLike, params: transformer.TransformerParams, config: ExperimentConfig
) -> None:
    """Packs parameters and writes them with the run's configuration into a new folder.

    The configuration is written last: a folder that has one is complete.

    Raises:
      ConfigError: nothing is quantised, or the folder exists.
    """
    folder = pathlib.Path(folder).absolute()
    require(not folder.exists(), f"{folder} exists; name a folder that does not")
    packed = jax.jit(functools.partial(pack, config=config))(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / WEIGHTS_FOLDER, packed, save_args=chunks(packed))
    if is_first():
        text = json.dumps(convert.to_json_dict(config), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n")


def load_packed(
    folder: str | os.PathLike, mesh: Mesh
) -> tuple[ExperimentConfig, transformer.TransformerParams]:
    """Reads what `save_packed` wrote onto a mesh, which may be another one.

    Returns:
      The configuration to compute with, in which nothing is left to quantise, and the parameters.

    Raises:
      CheckpointMismatchError: the folder is not complete.
    """
    folder = pathlib.Path(folder).absolute()
    config = read_config(folder)
    like = abstract_packed(config, mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / WEIGHTS_FOLDER, like)
    return dataclasses.replace(config, quantization=QuantizationConfig()), params


def abstract_packed(config: ExperimentConfig, mesh: Mesh) -> transformer.TransformerParams:
    """Returns shapes, dtypes and shardings of `pack`, without computing it."""
    masters = abstract_parameters(transformer.specs(config.model), mesh)
    with jax.set_mesh(mesh):
        trace = jax.make_jaxpr(functools.partial(pack, config=config), return_shape=True)
        program, shapes = trace(masters)
    leaves = [offload.placed(aval, mesh) for aval in program.out_avals]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def random_logits(
    params: transformer.TransformerParams, config: ExperimentConfig, *, length: int, seed: int = 0
) -> jax.Array:
    """Returns the logits [B, T, V] of random tokens, to compare two forms of a model by.

    Args:
      params: stored parameters, packed or not.
      config: the run; B is the number of devices that the mesh splits sequences over.
      length: T.
      seed: of the tokens.
    """
    rows = sequence_shards(jax.sharding.get_abstract_mesh())
    tokens = jax.random.randint(jax.random.key(seed), (rows, length), 0, config.model.vocab_size)
    run = functools.partial(
        transformer.run,
        config=config.model,
        choices=config.compute,
        quantization=config.quantization,
    )
    return jax.jit(run)(params, tokens)[0]
