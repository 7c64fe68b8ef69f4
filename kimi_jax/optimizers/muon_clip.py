"""The whole optimizer: clipping, Muon for matrices, AdamW for the rest, decay, learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from kimi_jax.configs.optimizer import OptimizerConfig, OptimizerName
from kimi_jax.core.param_spec import (
    MATRIX,
    SELECTION_BIAS,
    Leaf,
    map_specs,
    named_specs,
)
from kimi_jax.optimizers.matrix_views import count_matrices, matrix_views
from kimi_jax.optimizers.muon import scale_by_muon
from kimi_jax.optimizers.schedules import learning_rate_schedule
from kimi_jax.optimizers.update_stats import role_names, update_rms

MUON = "muon"
ADAMW = "adamw"
BALANCED = "balanced"  # selection biases: `load_balance` moves them, not a gradient


@struct.dataclass
class GradientNormState:
    """Norm of the latest gradients."""

    norm: Leaf  # [], before clipping


@struct.dataclass
class UpdateStatsState:
    """Root mean squares of the latest updates, before learning rate and weight decay."""

    by_label: Leaf  # dict from label to []
    by_role: Leaf  # dict from last part of leaf name to []


def label_parameters(plan: Any, config: OptimizerConfig) -> Any:
    """Returns a tree that says of each leaf by which rule it is updated.

    Matrices, the router's among them, are MUON's (ADAMW's under `OptimizerName.ADAMW`); selection
    biases are BALANCED; embedding, head and norm gains are ADAMW's.
    """
    for_matrices = MUON if config.name is OptimizerName.MUON_CLIP else ADAMW
    by_kind = {MATRIX: for_matrices, SELECTION_BIAS: BALANCED}
    return map_specs(lambda spec: by_kind.get(spec.kind, ADAMW), plan)


def muon_clip(config: OptimizerConfig, plan: Any, num_steps: int) -> optax.GradientTransformation:
    """Builds the optimizer; QK-clip and load balancing follow it in the training step.

    W <- W - lr (O + lambda W), where O is Muon's or AdamW's update of the clipped gradients and
    lambda acts on everything but selection biases, which do not move here. Muon's updates are in
    the format of its products until they meet the weights, from where on all is float32.

    Args:
      config: every option but qk_clip_threshold, selection_bias_rate and balance_loss_weight.
      plan: tree of `ParamSpec`s, of the structure of the parameters.
      num_steps: length of the run, in optimizer steps.

    Returns:
      The transformation. `update` needs the parameters. Its state is a dict by stage; read it with
      `optimizer_metrics`.

    Raises:
      ConfigError: the schedule does not fit into `num_steps`.

    Source: arXiv 2507.20534, section 2.1 and algorithm 1; arXiv 2502.16982, section 2.2.
    """
    labels = label_parameters(plan, config)
    is_trained = jax.tree.map(lambda label: label != BALANCED, labels)
    learning_rate = learning_rate_schedule(config.schedule, num_steps)
    return optax.named_chain(
        ("clip", clip_by_global_norm(config.max_grad_norm, is_trained)),
        ("rules", optax.partition(_rules(config, plan, labels), labels)),
        ("update_stats", _record_update_stats(plan, labels)),
        ("weight_decay", _decay_weights(config.weight_decay, is_trained)),
        ("learning_rate", optax.scale_by_learning_rate(learning_rate)),
    )


def clip_by_global_norm(max_norm: float | None, is_trained: Any) -> optax.GradientTransformation:
    """Scales all gradients by max_norm / norm where their joint norm exceeds `max_norm`.

    Args:
      max_norm: largest norm that is let through; None only measures.
      is_trained: a bool for each leaf; the others neither count nor change.

    Returns:
      The transformation; its state is a `GradientNormState`. A norm that is not finite makes every
      gradient so, for the training loop to see.
    """

    def init(params: Any) -> GradientNormState:
        del params
        return GradientNormState(norm=jnp.zeros((), jnp.float32))

    def update(gradients: Any, state: GradientNormState, params: Any = None):
        del state, params
        trained = [
            gradient
            for gradient, counts in zip(
                jax.tree.leaves(gradients), jax.tree.leaves(is_trained), strict=True
            )
            if counts
        ]
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in trained))
        if max_norm is not None:
            scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
            scale = jnp.where(jnp.isfinite(norm), scale, jnp.nan)
            gradients = jax.tree.map(
                lambda g, counts: g * scale.astype(g.dtype) if counts else g, gradients, is_trained
            )
        return gradients, GradientNormState(norm=norm)

    return optax.GradientTransformation(init, update)


def optimizer_metrics(state: Any) -> dict[str, jax.Array]:
    """Reads the latest step's measurements out of the state of `muon_clip`.

    Returns:
      Scalars by name: `optimizer/gradient_norm` (before clipping), `optimizer/update_rms_LABEL` and
      `optimizer/update_rms_of/ROLE`, such as `w_gate` (before learning rate and decay).
    """
    stats = state["update_stats"]
    return {
        "optimizer/gradient_norm": state["clip"].norm,
        **{f"optimizer/update_rms_{label}": rms for label, rms in stats.by_label.items()},
        **{f"optimizer/update_rms_of/{role}": rms for role, rms in stats.by_role.items()},
    }


def describe_labels(plan: Any, config: OptimizerConfig) -> str:
    """Writes a table of which rule updates what, so that nobody has to guess.

    Returns:
      A line per label: leaves, matrices that Muon makes orthogonal, values, names of the leaves.
    """
    labels = jax.tree.leaves(label_parameters(plan, config))
    specs = list(named_specs(plan))
    matrices = sum(map(count_matrices, matrix_views(plan, config.matrix_granularity)))
    lines = [f"{'label':<10}{'leaves':>8}{'matrices':>10}{'values':>20}  names"]
    for label in sorted(set(labels)):
        own = [(name, spec) for (name, spec), of in zip(specs, labels, strict=True) if of == label]
        roles = sorted({name.rpartition(".")[2] for name, _ in own})
        values = sum(spec.size for _, spec in own)
        count = matrices if label == MUON else 0
        lines.append(f"{label:<10}{len(own):>8}{count:>10,}{values:>20,}  {', '.join(roles)}")
    return "\n".join(lines)


def _rules(
    config: OptimizerConfig, plan: Any, labels: Any
) -> dict[str, optax.GradientTransformation]:
    """Returns the transformation of each label that occurs."""
    rules = {
        MUON: lambda: scale_by_muon(config, plan),
        ADAMW: lambda: optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        BALANCED: optax.set_to_zero,
    }
    return {label: rules[label]() for label in sorted(set(jax.tree.leaves(labels)))}


def _decay_weights(weight_decay: float, is_trained: Any) -> optax.GradientTransformation:
    """Returns O + lambda W of trained leaves, and O of the others, in the format of the weights.

    Optax's own leaves a bfloat16 update as it is where lambda is 0, and would round it again when
    the learning rate multiplies it.
    """

    def update(updates: Any, params: Any) -> Any:
        def decay(update: jax.Array, weight: jax.Array, is_trained: bool) -> jax.Array:
            update = update.astype(weight.dtype)
            return update + weight_decay * weight if is_trained else update

        return jax.tree.map(decay, updates, params, is_trained)

    return optax.stateless(update)


def _record_update_stats(plan: Any, labels: Any) -> optax.GradientTransformation:
    """Lets updates pass and keeps their root mean squares, those of trained leaves only."""

    def measure(updates: Any) -> UpdateStatsState:
        by_label = update_rms(updates, labels)
        by_role = update_rms(updates, role_names(plan))
        roles = jax.tree.leaves(role_names(plan))
        for role, label in zip(roles, jax.tree.leaves(labels), strict=True):
            if label == BALANCED:
                by_role.pop(role, None)
        by_label.pop(BALANCED, None)
        return UpdateStatsState(by_label=by_label, by_role=by_role)

    def init(params: Any) -> UpdateStatsState:
        shapes = jax.eval_shape(measure, params)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def update(updates: Any, state: UpdateStatsState, params: Any = None):
        del state, params
        return updates, measure(updates)

    return optax.GradientTransformation(init, update)
