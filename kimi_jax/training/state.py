"""Everything a run needs to go on from where it was."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.param_spec import Leaf
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
    config: ExperimentConfig, plan: Any, transformation: optax.GradientTransformation
) -> TrainState:
    """Creates the state of step 0, each leaf directly in its layout. One compiled program."""
    create = functools.partial(_create, config=config, plan=plan, transformation=transformation)
    # The program runs once, and on a CPU it takes longer to optimise than to run.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(create, compiler_options=options)(_root_key(config))


def _root_key(config: ExperimentConfig) -> jax.Array:
    return jax.random.key_data(jax.random.key(config.training.seed))


def _create(
    rng: jax.Array,
    *,
    config: ExperimentConfig,
    plan: Any,
    transformation: optax.GradientTransformation,
) -> TrainState:
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
    """
    create = functools.partial(_create, config=config, plan=plan, transformation=transformation)
    shapes = jax.eval_shape(lambda: create(_root_key(config)))

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Scalars and the key come out of eval_shape without a sharding, or with a shorter one than
        # the step's results have.
        known = leaf.sharding.spec if leaf.sharding is not None else ()
        spec = PartitionSpec(*known, *(None,) * (leaf.ndim - len(known)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)
