"""Everything a run needs to go on from where it was."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.param_spec import Leaf
from kimi_jax.parallel import offload
from kimi_jax.parallel.placement import initialize


@struct.dataclass
class TrainState:
    """The state of a run between two optimizer steps; together with the data cursor, all of it."""

    step: Leaf  # int32 scalar: optimizer steps done
    params: Leaf  # TransformerParams, float32, in storage layout
    optimizer: Leaf  # state of the optax transformation, laid out like the parameters
    clipped_ever: Leaf  # bool [L, N]: heads that QK-clip has ever scaled
    rng: Leaf  # uint32 key data of the run's root key


def initial_state(
    config: ExperimentConfig,
    plan: Any,
    transformation: optax.GradientTransformation,
    params: Any = None,
) -> TrainState:
    """Creates the state of step 0, each leaf directly in its layout. One compiled program.

    Args:
      config: the run.
      plan: specs of the parameters.
      transformation: the optimizer.
      params: what to start from, in storage layout, which are used up; None draws them.
    """
    create = functools.partial(_create, config=config, plan=plan, transformation=transformation)
    # The program runs once, and on a CPU it takes longer to optimise than to run.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    program = jax.jit(create, compiler_options=options, donate_argnames="params")
    return program(_root_key(config), params=params)


def _root_key(config: ExperimentConfig) -> jax.Array:
    return jax.random.key_data(jax.random.key(config.training.seed))


def _create(
    rng: jax.Array,
    params: Any = None,
    *,
    config: ExperimentConfig,
    plan: Any,
    transformation: optax.GradientTransformation,
) -> TrainState:
    if params is None:
        params = initialize(jax.random.wrap_key_data(rng), plan)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=transformation.init(params),
        clipped_ever=jnp.zeros((config.model.num_layers, config.model.num_heads), bool),
        rng=rng,
    )


def abstract_state(
    config: ExperimentConfig,
    plan: Any,
    transformation: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Returns shapes, dtypes and shardings of `initial_state`, without computing it.

    What a checkpoint is restored into: a state saved on one mesh lands on another by its names.

    Raises:
      ConfigError: an option keeps arrays in host memory, which these devices cannot reach.
    """
    for section, option in (("optimizer", "offload_state"), ("compute", "offload_activations")):
        if getattr(getattr(config, section), option):
            offload.check_host_memory(mesh, f"{section}.{option}")
    create = functools.partial(_create, config=config, plan=plan, transformation=transformation)
    trace = jax.make_jaxpr(lambda: create(_root_key(config)), return_shape=True)
    program, shapes = trace()
    leaves = [offload.placed(aval, mesh) for aval in program.out_avals]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
