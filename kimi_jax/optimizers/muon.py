"""Muon: momentum, made orthogonal, with the root mean square of AdamW's updates."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from kimi_jax.configs.optimizer import OptimizerConfig
from kimi_jax.core.param_spec import Leaf, is_spec
from kimi_jax.optimizers.matrix_views import MatrixView, matrix_views
from kimi_jax.optimizers.newton_schulz import newton_schulz
from kimi_jax.parallel import offload
from kimi_jax.parallel.collectives import CHUNK_VALUES, map_matrices


@struct.dataclass
class MuonState:
    """What Muon remembers between steps."""

    momentum: Leaf  # M, like the parameters, in `momentum_dtype`


def scale_by_muon(config: OptimizerConfig, plan: Any) -> optax.GradientTransformation:
    """Turns gradients into Muon's updates, before learning rate and weight decay.

    M <- mu M + G;  U = G + mu M (Nesterov) or M;
    O = newton_schulz(U) * update_rms * sqrt(max(n, m)) for each matrix n x m.

    An orthogonal n x m matrix has the root mean square 1 / sqrt(max(n, m)), so that O has about
    `update_rms`, and AdamW's learning rate and weight decay can be used. Each matrix is computed
    once in the whole mesh; matrices travel in the format of the products.

    mu M + G is computed in float32 and rounded once, when it is stored; U is made of the sum before
    rounding. O comes in the format of the products, which is all that it has of digits: updates are
    the largest temporaries of a step, and half as large in bfloat16.

    Args:
      config: momentum*, nesterov, newton_schulz_*, matrix_granularity, update_rms and offload_state
        act here.
      plan: tree of `ParamSpec`s; leaves that are no matrices must be masked out of the gradients.
        To be offloaded, each has the layers as its first dimension.

    Returns:
      The transformation; its state is a `MuonState`.

    Source: arXiv 2502.16982, section 2.2; arXiv 2507.20534, algorithm 1.
    """
    views = matrix_views(plan, config.matrix_granularity)

    def init(params: Any) -> MuonState:
        dtype = config.momentum_dtype.value
        momentum = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
        return MuonState(momentum=offload.to_host(momentum) if config.offload_state else momentum)

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        structure = jax.tree.structure(gradients)
        pairs = [
            _advance(momentum, gradient, config)
            for momentum, gradient in zip(
                jax.tree.leaves(state.momentum), jax.tree.leaves(gradients), strict=True
            )
        ]
        ahead, momentum = (structure.unflatten(leaves) for leaves in zip(*pairs, strict=True))
        return _orthogonalize(ahead, plan, views, config), MuonState(momentum=momentum)

    return optax.GradientTransformation(init, update)


def _advance(
    momentum: jax.Array, gradient: jax.Array, config: OptimizerConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns U, in the format of the products, and the momentum to be stored."""
    mu = config.momentum

    def rule(momentum: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        momentum = mu * momentum.astype(jnp.float32) + gradient
        ahead = gradient + mu * momentum if config.nesterov else momentum
        stored = momentum.astype(config.momentum_dtype.value)
        return ahead.astype(config.newton_schulz_dtype.value), stored

    if not config.offload_state:
        return rule(momentum, gradient)

    def stream(_, parts: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        ahead, stored = rule(offload.to_device(parts[0]), parts[1])
        return None, (ahead, offload.to_host(stored))

    # Layer by layer: copies outside of a loop start at the beginning of the step, where there is no
    # room for them.
    return jax.lax.scan(stream, None, (momentum, gradient))[1]


def _orthogonalize(
    tree: Any, plan: Any, views: tuple[MatrixView, ...], config: OptimizerConfig
) -> Any:
    """Replaces every matrix of `tree` by its scaled orthogonal one; masked leaves stay."""
    structure = jax.tree.structure(plan, is_leaf=is_spec)
    leaves = structure.flatten_up_to(tree)
    dtype = config.newton_schulz_dtype.value
    stacks = {view: [s.astype(dtype) for s in view.to_stacks(leaves)] for view in views}
    for number, alike in enumerate(_group_alike(stacks)):
        first = alike[0]
        with jax.named_scope("newton_schulz"):
            joined = map_matrices(
                functools.partial(_orthogonalize_item, view=first, config=config),
                [jnp.concatenate(parts) for parts in zip(*map(stacks.get, alike), strict=True)],
                stack_dims=len(first.stack_shape),
                rotation=number,
            )
        start = 0
        for view in alike:
            end = start + view.stack_shape[0]
            own = [jax.lax.slice_in_dim(stack, start, end) for stack in joined]
            for index, update in view.from_stacks(own).items():
                leaves[index] = update
            start = end
    return structure.unflatten(leaves)


def _group_alike(stacks: dict[MatrixView, list[jax.Array]]) -> list[list[MatrixView]]:
    """Groups views that differ in their number of layers only, so that they run as one stack.

    Fewer loops compile faster, and fewer exchanges wait for each other. What fills a device alone
    stays alone: joining stacks copies them.
    """
    groups: dict[Any, list[MatrixView]] = {}
    for view, arrays in stacks.items():
        layouts = tuple((a.shape[1:], jax.typeof(a).sharding.spec) for a in arrays)
        row_dims = tuple(len(member.rows) for member in view.members)
        local = sum(math.prod(jax.typeof(a).sharding.shard_shape(a.shape)) for a in arrays)
        alone = view.names if local > CHUNK_VALUES else None
        groups.setdefault((view.stack_shape[1:], row_dims, layouts, alone), []).append(view)
    return list(groups.values())


def _orthogonalize_item(
    items: list[jax.Array], *, view: MatrixView, config: OptimizerConfig
) -> list[jax.Array]:
    orthogonal = newton_schulz(
        view.join(items),
        steps=config.newton_schulz_steps,
        preset=config.newton_schulz_preset,
        dtype=config.newton_schulz_dtype,
    )
    return view.split(orthogonal * config.update_rms * max(view.matrix_shape) ** 0.5)
