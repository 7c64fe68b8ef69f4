"""What a training step keeps in one device's memory, in closed form: no devices, no compiler.

Each function below is one line of the table. Sizes are those of a device; W is its number of tokens
in one micro-batch, D the model's width, b the bytes of the compute dtype.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.configs.compute import Remat
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core import precision
from kimi_jax.core.param_spec import NORM, ROUTED_EXPERT, SELECTION_BIAS, ParamSpec, named_specs
from kimi_jax.model import transformer
from kimi_jax.optimizers.matrix_views import matrix_views
from kimi_jax.optimizers.muon_clip import ADAMW, MUON, label_parameters
from kimi_jax.parallel import rules
from kimi_jax.parallel.mesh import EXPERT, MESH_AXES

STATE = "all the time"
PASSES = "forward and backward"
UPDATE = "optimizer"

_MASTER_BYTES = jnp.dtype(precision.MASTER).itemsize
_MOMENTS = {MUON: 1, ADAMW: 2}  # float32 values that the optimizer keeps for each parameter
# A mesh fits if it leaves this share of the memory to what the closed form does not know.
_USABLE = 0.9
_MOST_DEVICES = 2**14


@dataclasses.dataclass(frozen=True)
class Term:
    """One line of the table.

    Attributes:
      name: what is kept.
      phase: when: all the time, in the forward and backward passes, or in the optimizer.
      bytes: of one device.
    """

    name: str
    phase: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A run on a mesh of given sizes."""

    config: ExperimentConfig
    plan: Any
    sizes: Mapping[str, int]

    @property
    def tokens(self) -> int:
        """W, tokens of a device in one micro-batch."""
        shards = math.prod(self.sizes.values()) * self.config.training.accumulation_steps
        return self.config.batch_tokens // shards

    @property
    def itemsize(self) -> int:
        """Bytes of one value in the compute dtype."""
        return jnp.dtype(self.config.compute.dtype.value).itemsize

    def values(self, spec: ParamSpec, table: rules.RuleTable) -> int:
        """Values of a parameter that one device holds under a rule table."""
        layout = rules.partition_spec(spec, table, self.sizes)
        names = [
            name
            for entry in layout
            if entry is not None
            for name in (entry if isinstance(entry, tuple) else (entry,))
        ]
        return spec.size // math.prod(self.sizes[name] for name in names)


def mesh_sizes(data: int, expert: int) -> dict[str, int]:
    """Returns the sizes of all mesh axes, those not named being 1."""
    return dict.fromkeys(MESH_AXES, 1) | {"data": data, "expert": expert}


def estimate(config: ExperimentConfig, sizes: Mapping[str, int]) -> tuple[Term, ...]:
    """Lists what one device keeps.

    Args:
      config: the run.
      sizes: of the mesh axes.
    """
    setting = _Setting(config, transformer.specs(config.model), sizes)
    terms: tuple[tuple[str, str, Callable[[_Setting], int]], ...] = (
        ("parameters", STATE, _parameters),
        ("optimizer state", STATE, _optimizer_state),
        ("gradients", STATE, _gradients),
        ("activations kept for the backward pass", PASSES, _kept_activations),
        ("activations of the layer at work", PASSES, _layer_activations),
        ("gathered weights of a layer and their gradients", PASSES, _gathered_layer),
        ("exchange of tokens between experts", PASSES, _exchange),
        ("embedding and head, gathered, and a gradient", PASSES, _gathered_ends),
        ("logits of a chunk and their gradient", PASSES, _logits),
        ("updates on their way through Newton-Schulz", UPDATE, _newton_schulz),
    )
    return tuple(Term(name, phase, count(setting)) for name, phase, count in terms)


def peak(terms: tuple[Term, ...]) -> int:
    """Returns the largest sum of what is there at the same time: state and one of the phases."""
    sums = {phase: sum(t.bytes for t in terms if t.phase == phase) for phase in (PASSES, UPDATE)}
    return sum(t.bytes for t in terms if t.phase == STATE) + max(sums.values())


def smallest_mesh(
    config: ExperimentConfig, memory_bytes: int
) -> tuple[int, dict[str, int], int] | None:
    """Finds the fewest devices, in powers of two, whose memory the run fits with room.

    Of several divisions of as many devices into data x expert, the one with the lowest peak.

    Returns:
      Devices, sizes of the axes and peak bytes; None if no mesh up to 16,384 devices fits.
    """
    devices = 1
    while devices <= _MOST_DEVICES:
        found = [
            (peak(estimate(config, sizes)), number, sizes)
            for number, sizes in enumerate(_meshes(config, devices))
        ]
        fitting = [entry for entry in found if entry[0] <= _USABLE * memory_bytes]
        if fitting:
            most, _, sizes = min(fitting)
            return devices, sizes, most
        devices *= 2
    return None


def _meshes(config: ExperimentConfig, devices: int) -> Iterator[dict[str, int]]:
    parts = devices * config.training.accumulation_steps
    if config.training.batch_sequences % parts:
        return
    for expert in range(1, devices + 1):
        if devices % expert == 0 and config.model.num_routed_experts % expert == 0:
            yield mesh_sizes(devices // expert, expert)


def _parameters(setting: _Setting) -> int:
    """Float32 masters, split by the storage rules."""
    specs = (spec for _, spec in named_specs(setting.plan))
    return _MASTER_BYTES * sum(setting.values(spec, rules.STORAGE) for spec in specs)


def _optimizer_state(setting: _Setting) -> int:
    """Muon's momentum (1 value a parameter) or AdamW's moments (2), laid out like the parameters.

    Selection biases have none.
    """
    labels = dict(_named(label_parameters(setting.plan, setting.config.optimizer)))
    return _MASTER_BYTES * sum(
        _MOMENTS.get(labels[name], 0) * setting.values(spec, rules.STORAGE)
        for name, spec in named_specs(setting.plan)
    )


def _gradients(setting: _Setting) -> int:
    """Float32, laid out like the parameters; with micro-batches, the sum and the newest."""
    copies = 1 if setting.config.training.accumulation_steps == 1 else 2
    return copies * _parameters(setting)


def _kept_activations(setting: _Setting) -> int:
    """What the scan over layers stacks: W D b a layer, its input, and what the policy adds.

    K2 keeps the latents and the rotary key, too. Without remat everything of `_layer_values` is
    kept.
    """
    model, remat = setting.config.model, setting.config.compute.remat
    per_token = model.embed_dim
    if remat is Remat.K2:
        per_token += (model.q_latent_dim or 0) + model.kv_latent_dim + model.head_rope_dim
    total = model.num_layers * per_token
    if remat is Remat.NONE:
        total += model.num_dense_layers * _layer_values(setting, dense=True)
        total += model.num_moe_layers * _layer_values(setting, dense=False)
    return setting.tokens * setting.itemsize * total


def _layer_activations(setting: _Setting) -> int:
    """Everything that the backward pass of one layer has recomputed, and as much for gradients."""
    model = setting.config.model
    kinds = [True] * (model.num_dense_layers > 0) + [False] * (model.num_moe_layers > 0)
    largest = max(_layer_values(setting, dense=dense) for dense in kinds)
    return 2 * setting.tokens * setting.itemsize * largest


def _layer_values(setting: _Setting, *, dense: bool) -> int:
    """Values per token that a layer's backward pass reads.

    Two norms and the residual between (3 D), latents, queries and keys N (H + R) each, values and
    output N U each, and gate, up and their product of each feed-forward part that a token passes.
    """
    model = setting.config.model
    attention = model.num_heads * 2 * (model.head_qk_dim + model.head_value_dim)
    latents = (model.q_latent_dim or 0) + model.kv_latent_dim
    if dense:
        inner = 3 * model.dense_ffn_dim
    else:
        passed = model.num_shared_experts + model.experts_per_token
        inner = 3 * model.expert_ffn_dim * passed
    return 3 * model.embed_dim + latents + attention + inner


def _gathered_layer(setting: _Setting) -> int:
    """The largest layer in the compute layout and dtype, and its gradient before it is scattered.

    Norms and selection biases are not gathered.
    """
    layers = []
    for stack in (setting.plan.dense_blocks, setting.plan.moe_blocks):
        if stack is not None:
            specs = [s for _, s in named_specs(stack) if s.kind not in (NORM, SELECTION_BIAS)]
            layers.append(sum(setting.values(s, rules.COMPUTE) // s.shape[0] for s in specs))
    return 2 * setting.itemsize * max(layers)


def _exchange(setting: _Setting) -> int:
    """All tokens of an expert group: W e D once in the compute dtype, once summed in float32.

    The backward pass has the gradient of the sums and the sums of the gradients beside them.
    """
    model = setting.config.model
    if model.num_moe_layers == 0 or setting.sizes[EXPERT] == 1:
        return 0
    rows = setting.tokens * setting.sizes[EXPERT]
    return 2 * rows * model.embed_dim * (setting.itemsize + _MASTER_BYTES)


def _gathered_ends(setting: _Setting) -> int:
    """The head while the loss runs, D V in the compute dtype, and its gradient, summed in float32.

    The embedding is as large and is gathered when the head is not.
    """
    values = setting.values(setting.plan.head, rules.COMPUTE)
    return values * (setting.itemsize + _MASTER_BYTES)


def _logits(setting: _Setting) -> int:
    """Float32 logits of a chunk of tokens, and their gradient."""
    chunk = setting.config.compute.logits_chunk_tokens or setting.tokens
    return 2 * min(chunk, setting.tokens) * setting.config.model.vocab_size * _MASTER_BYTES


def _newton_schulz(setting: _Setting) -> int:
    """Updates of all matrices, float32, and the largest stack in the products' format, in and out.

    A stack is all leaves of one shape; its exchange needs a copy before and one after.
    """
    config = setting.config.optimizer
    labels = dict(_named(label_parameters(setting.plan, config)))
    specs = dict(named_specs(setting.plan))
    held = {
        name: setting.values(spec, rules.STORAGE)
        for name, spec in specs.items()
        if labels[name] == MUON
    }
    if not held:
        return 0
    stacks: dict[Any, int] = {}
    for view in matrix_views(setting.plan, config.matrix_granularity):
        routed = ROUTED_EXPERT in specs[view.names[0]].tags
        key = (view.matrix_shape, routed)
        stacks[key] = stacks.get(key, 0) + sum(held[name] for name in view.names)
    itemsize = jnp.dtype(config.newton_schulz_dtype.value).itemsize
    return _MASTER_BYTES * sum(held.values()) + 2 * itemsize * max(stacks.values())


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf
