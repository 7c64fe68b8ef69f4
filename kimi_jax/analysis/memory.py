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

from kimi_jax.analysis.expected_flops import expert_rows_share
from kimi_jax.configs.compute import Remat, ResidualFormat
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.quantization import Quantize
from kimi_jax.core import precision
from kimi_jax.core.param_spec import NORM, SELECTION_BIAS, ParamSpec, named_specs
from kimi_jax.kernels import fp8
from kimi_jax.model import transformer
from kimi_jax.optimizers.muon_clip import ADAMW, MUON, label_parameters
from kimi_jax.parallel import rules
from kimi_jax.parallel.collectives import CHUNK_VALUES
from kimi_jax.parallel.mesh import CONTEXT, EXPERT, MESH_AXES, PIPE, TENSOR
from kimi_jax.quantization import qat

STATE = "all the time"
LAYERS = "layers"  # their backward pass, when the most is kept
LOSS = "loss"
UPDATE = "optimizer"
_PHASES = (LAYERS, LOSS, UPDATE)

_MASTER_BYTES = jnp.dtype(precision.MASTER).itemsize
_SCALE_BYTES = 4  # float32, one for each tile of FP8 codes
# A mesh fits if it leaves this share of the memory to what the closed form does not know.
_USABLE = 0.9
_MOST_DEVICES = 2**14
# Mesh axes whose sizes the configuration always states.
CONFIGURED_AXES = ("pipe", "replica", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Term:
    """One line of the table.

    Attributes:
      name: what is kept.
      phases: when: all the time, or in some of the three phases.
      bytes: of one device.
    """

    name: str
    phases: tuple[str, ...]
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
        shards = math.prod(size for name, size in self.sizes.items() if name != TENSOR)
        return self.config.batch_tokens // (shards * self.config.training.accumulation_steps)

    @property
    def itemsize(self) -> int:
        """Bytes of one value in the compute dtype."""
        return jnp.dtype(self.config.compute.dtype.value).itemsize

    def values(self, spec: ParamSpec, table: rules.RuleTable) -> int:
        """Values of a parameter that one device holds under a rule table."""
        layout = rules.partition_spec(spec, table, self.sizes)
        names = [name for entry in layout for name in rules.entry_axes(entry)]
        return spec.size // math.prod(self.sizes[name] for name in names)


def mesh_sizes(data: int, expert: int, **others: int) -> dict[str, int]:
    """Returns the sizes of all mesh axes, those not named being 1."""
    return dict.fromkeys(MESH_AXES, 1) | {"data": data, "expert": expert} | others


def estimate(config: ExperimentConfig, sizes: Mapping[str, int]) -> tuple[Term, ...]:
    """Lists what one device keeps; what a run does not have is left out.

    Args:
      config: the run.
      sizes: of the mesh axes.
    """
    setting = _Setting(config, transformer.specs(config.model), sizes)
    terms: tuple[tuple[str, tuple[str, ...], Callable[[_Setting], int]], ...] = (
        ("parameters", (STATE,), _parameters),
        ("optimizer state", (STATE,), _optimizer_state),
        ("codes and scales of quantised weights", (LAYERS, LOSS), _codes),
        ("gradients", (UPDATE,), _gradients),
        ("gradients while layers run", (LAYERS,), _gradients_while_layers_run),
        ("layers' weights in the compute dtype", (LAYERS, LOSS), _cast_layers),
        ("activations kept for the backward pass", (LAYERS, LOSS), _kept_activations),
        ("activations of the layer at work", (LAYERS,), _layer_activations),
        ("gathered weights of a layer and their gradients", (LAYERS,), _gathered_layer),
        ("exchange of tokens between experts", (LAYERS,), _exchange),
        ("pipeline: gradients of stages, micro-batches in line", (LAYERS,), _pipeline),
        ("head, gathered, and its gradient", (LOSS,), _gathered_ends),
        ("logits of a chunk and their gradient", (LOSS,), _logits),
        ("updates on their way through Newton-Schulz", (UPDATE,), _newton_schulz),
    )
    counted = (Term(name, phases, count(setting)) for name, phases, count in terms)
    return tuple(term for term in counted if term.bytes)


def peak(terms: tuple[Term, ...]) -> int:
    """Returns the largest sum of what is there at the same time: state and one of the phases."""
    sums = [sum(t.bytes for t in terms if phase in t.phases) for phase in _PHASES]
    return sum(t.bytes for t in terms if STATE in t.phases) + max(sums)


def smallest_mesh(
    config: ExperimentConfig, memory_bytes: int
) -> tuple[int, dict[str, int], int] | None:
    """Finds the fewest devices whose memory the run fits with room.

    Data x expert is a power of two, of whose divisions the one with the lowest peak is taken; the
    other axes are the configuration's.

    Returns:
      Devices, sizes of the axes and peak bytes; None if no mesh up to 16,384 devices fits.
    """
    others = {name: getattr(config.parallel, name) for name in CONFIGURED_AXES}
    devices = math.prod(others.values())
    while devices <= _MOST_DEVICES:
        found = [
            (peak(estimate(config, sizes)), number, sizes)
            for number, sizes in enumerate(_meshes(config, devices, others))
        ]
        fitting = [entry for entry in found if entry[0] <= _USABLE * memory_bytes]
        if fitting:
            most, _, sizes = min(fitting)
            return devices, sizes, most
        devices *= 2
    return None


def _meshes(
    config: ExperimentConfig, devices: int, others: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    left = devices // math.prod(others.values())
    parallel = config.parallel
    parts = left * parallel.pipe * parallel.replica * config.training.accumulation_steps
    if config.training.batch_sequences % parts:
        return
    for expert in range(1, left + 1):
        if left % expert == 0 and config.model.num_routed_experts % expert == 0:
            yield mesh_sizes(left // expert, expert, **others)


def _parameters(setting: _Setting) -> int:
    """Float32 masters, split by the storage rules."""
    return _MASTER_BYTES * _stored_values(setting, setting.plan)


def _optimizer_state(setting: _Setting) -> int:
    """Muon's momentum, or AdamW's two moments in float32, laid out like the parameters.

    Selection biases have none. Offloaded momentum counts, too: on the way to its update all of it
    passes through the device, and no step was compiled that needs less.
    """
    options = setting.config.optimizer
    labels = dict(_named(label_parameters(setting.plan, options)))
    momentum = jnp.dtype(options.momentum_dtype.value).itemsize
    kept = {MUON: momentum, ADAMW: 2 * _MASTER_BYTES}
    return sum(
        kept.get(labels[name], 0) * setting.values(spec, rules.STORAGE)
        for name, spec in named_specs(setting.plan)
    )


def _gradients(setting: _Setting) -> int:
    """Float32, laid out like the parameters; with micro-batches, the sum and the newest."""
    copies = 1 if setting.config.training.accumulation_steps == 1 else 2
    return copies * _parameters(setting)


def _gradients_while_layers_run(setting: _Setting) -> int:
    """The same, but for the newest of a pipeline's layers: `_pipeline` counts those."""
    total = _gradients(setting)
    if setting.sizes[PIPE] > 1 and setting.plan.moe_blocks is not None:
        total -= _MASTER_BYTES * _stored_values(setting, setting.plan.moe_blocks)
    return total


def _stored_values(setting: _Setting, plan: Any) -> int:
    return sum(setting.values(spec, rules.STORAGE) for _, spec in named_specs(plan))


def _cast_layers(setting: _Setting) -> int:
    """A copy of the stored layers, cast.

    The program casts a layer when it runs. The TPU compiler takes the cast out of the loop over
    layers and keeps all of them.
    """
    stacks = (setting.plan.dense_blocks, setting.plan.moe_blocks)
    if setting.itemsize == _MASTER_BYTES:
        return 0
    values = _stored_values(setting, [s for s in stacks if s is not None])
    return setting.itemsize * (values - _quantised_values(setting))


def _codes(setting: _Setting) -> int:
    """Half a byte for each weight and two for each group, laid out like the masters."""
    of_scales = 2 / setting.config.quantization.group_size
    return math.ceil((0.5 + of_scales) * _quantised_values(setting))


def _quantised_values(setting: _Setting) -> int:
    """Values of the weights whose codes are made once a step; their casts are never made."""
    options = setting.config.quantization
    if not options.enabled or options.quantize is not Quantize.STEP:
        return 0
    chosen = jax.tree.leaves(qat.choose(setting.plan, options))
    specs = [spec for _, spec in named_specs(setting.plan)]
    return sum(
        setting.values(spec, rules.STORAGE)
        for spec, is_chosen in zip(specs, chosen, strict=True)
        if is_chosen
    )


def _kept_activations(setting: _Setting) -> int:
    """What the scan over layers stacks: W D b a layer, its input, and what the policy adds.

    K2 keeps the latents, the rotary key, attention's output before and after its projection, and
    gate and up products with the rows that enter the experts, these in a format of their own.
    Without remat everything of `_layer_values` is kept; in FP8, SwiGLU's inputs and the rows take
    the place of SwiGLU's inputs and results. What is offloaded takes no room.
    """
    model, compute = setting.config.model, setting.config.compute
    if compute.offload_activations:
        return 0
    layers = model.num_dense_layers + _kept_mixtures(setting)
    total = setting.itemsize * setting.tokens * layers * model.embed_dim
    if compute.remat is Remat.K2:
        of_attention = (model.q_latent_dim or 0) + model.kv_latent_dim + model.head_rope_dim
        of_attention += model.num_heads * model.head_value_dim + model.embed_dim
        total += setting.itemsize * setting.tokens * layers * of_attention
        total += _kept_feed_forward(setting)
    if compute.remat is Remat.NONE:
        in_fp8 = compute.feed_forward_residuals is ResidualFormat.FP8
        for count, dense in ((model.num_dense_layers, True), (_kept_mixtures(setting), False)):
            values = _layer_values(setting, dense=dense)
            values -= _inner_values(setting, dense=dense) if in_fp8 else 0
            total += setting.itemsize * setting.tokens * count * values
        total += _kept_feed_forward(setting) if in_fp8 else 0
    return total


def _kept_mixtures(setting: _Setting) -> int:
    """Mixtures whose activations wait; a pipeline also keeps those of its idle ticks."""
    return setting.config.model.num_moe_layers + setting.sizes[PIPE] - 1


def _kept_feed_forward(setting: _Setting) -> int:
    """Bytes of all layers' gate and up products, and of the rows that enter the experts."""
    model = setting.config.model

    def row(width: int) -> int:
        if setting.config.compute.feed_forward_residuals is ResidualFormat.FP8:
            return width + _SCALE_BYTES * math.ceil(width / fp8.TILE)
        return setting.itemsize * width

    shared = 2 * row(model.num_shared_experts * model.expert_ffn_dim)
    of_experts = _expert_rows(setting) * (row(model.embed_dim) + 2 * row(model.expert_ffn_dim))
    total = setting.tokens * model.num_dense_layers * 2 * row(model.dense_ffn_dim)
    return total + _kept_mixtures(setting) * (setting.tokens * shared + of_experts)


def _expert_rows(setting: _Setting) -> int:
    """Rows that a device's experts compute: W K, or as many as its exchange buffer holds."""
    even = setting.tokens * setting.config.model.experts_per_token
    return math.ceil(expert_rows_share(setting.config, setting.sizes[EXPERT]) * even)


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
    Along the context axis heads are split instead of positions, but latents are whole.
    """
    model = setting.config.model
    attention = model.num_heads * 2 * (model.head_qk_dim + model.head_value_dim)
    latents = (model.q_latent_dim or 0) + model.kv_latent_dim
    latents *= setting.sizes[CONTEXT]
    return 3 * model.embed_dim + latents + attention + _inner_values(setting, dense=dense)


def _inner_values(setting: _Setting, *, dense: bool) -> int:
    """Those of them that are SwiGLU's inputs and results."""
    model = setting.config.model
    if dense:
        return 3 * model.dense_ffn_dim
    return 3 * model.expert_ffn_dim * (model.num_shared_experts + model.experts_per_token)


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
    """The rows that arrive at the experts and leave them, and the gradients of both."""
    model = setting.config.model
    if model.num_moe_layers == 0 or setting.sizes[EXPERT] == 1:
        return 0
    return 4 * _expert_rows(setting) * model.embed_dim * setting.itemsize


def _pipeline(setting: _Setting) -> int:
    """Gradients of the layers of a stage, all of them at once, and the stages' queues.

    Of P micro-batches those that wait and those that are finished, and the gradients of both.
    """
    stages = setting.sizes[PIPE]
    if stages == 1 or setting.plan.moe_blocks is None:
        return 0
    of_stage = _stored_values(setting, setting.plan.moe_blocks)
    queues = 4 * stages * setting.tokens * setting.config.model.embed_dim
    return setting.itemsize * (of_stage + queues)


def _gathered_ends(setting: _Setting) -> int:
    """The head while the loss runs, D V in the compute dtype, and its gradient, summed in float32.

    The embedding is as large, and gathered when neither the head nor the layers are.
    """
    values = setting.values(setting.plan.head, rules.COMPUTE)
    return values * (setting.itemsize + _MASTER_BYTES)


def _logits(setting: _Setting) -> int:
    """Float32 logits of a chunk of tokens, and their gradient."""
    chunk = setting.config.compute.logits_chunk_tokens or setting.tokens
    return 2 * min(chunk, setting.tokens) * setting.config.model.vocab_size * _MASTER_BYTES


def _newton_schulz(setting: _Setting) -> int:
    """Updates of all matrices in the products' format, and a chunk that is exchanged.

    The iteration needs the chunk in float32, its product with the polynomial, and both factors.
    """
    options = setting.config.optimizer
    labels = dict(_named(label_parameters(setting.plan, options)))
    held = sum(
        setting.values(spec, rules.STORAGE)
        for name, spec in named_specs(setting.plan)
        if labels[name] == MUON
    )
    itemsize = jnp.dtype(options.newton_schulz_dtype.value).itemsize
    chunk = min(held, CHUNK_VALUES) * 2 * (itemsize + _MASTER_BYTES)
    return itemsize * held + chunk if held else 0


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf
