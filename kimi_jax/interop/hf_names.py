"""The tensors of a published checkpoint, and where each parameter of ours lies in them.

Both follow from the tree of specs; only the names stand here. A published Linear is [out, in];
ours is [inputs, outputs]. What we keep apart and they store as one matrix (`ParamSpec.fused_with`)
stands there row below row, head by head: rows of head h of q_b_proj are [H without rotation | R
with].

Source: the released checkpoints of Kimi K2, Moonlight and DeepSeek-V3, and their modeling code.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import (
    EMBEDDING,
    HEAD,
    MATRIX,
    ROUTED_EXPERT,
    ROUTER,
    SELECTION_BIAS,
    ParamSpec,
    named_specs,
)
from kimi_jax.model import transformer

_STACKS = (ax.LAYERS, ax.EXPERTS)
_LAYER = "model.layers.{layer}."
_EXPERT = "mlp.experts.{expert}."

_OUTSIDE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_ATTENTION = {
    "attention_norm": "input_layernorm.weight",
    "attention.w_q_down": "self_attn.q_a_proj.weight",
    "attention.q_norm": "self_attn.q_a_layernorm.weight",
    "attention.w_q_up": "self_attn.q_b_proj.weight",
    "attention.w_kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.w_kv_up": "self_attn.kv_b_proj.weight",
    "attention.w_out": "self_attn.o_proj.weight",
    "feed_forward_norm": "post_attention_layernorm.weight",
}
_FEED_FORWARD = {
    "w_gate": "gate_proj.weight",
    "w_up": "up_proj.weight",
    "w_down": "down_proj.weight",
}
_MIXTURE = {
    "feed_forward.router.w_router": "mlp.gate.weight",
    "feed_forward.router.selection_bias": "mlp.gate.e_score_correction_bias",
}
_WITHOUT_QUERY_LATENT = {"attention.w_q_up": "self_attn.q_proj.weight"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One parameter, of one layer and expert, in a published tensor.

    Attributes:
      path: dotted name of the parameter, such as `moe_blocks.attention.w_q_nope`.
      index: its layer and expert, as far as it is stacked over them.
      spec: its spec, without those axes.
      first_row: where its rows begin in each head's rows of the tensor; 0 where it stands alone.
    """

    path: str
    index: tuple[int, ...]
    spec: ParamSpec
    first_row: int

    @property
    def heads(self) -> int:
        """Groups of rows that the tensor consists of."""
        return self.out_shape[0] if len(self.out_shape) > 1 else 1

    @property
    def width(self) -> int:
        """Rows of each head that are this parameter's."""
        return self.out_shape[-1]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions that are rows of the tensor."""
        return tuple(self.spec.shape[dim] for dim in self.out_dims)

    @property
    def out_dims(self) -> tuple[int, ...]:
        """Our dimensions that are rows of the tensor."""
        return tuple(d for d in range(len(self.spec.shape)) if d not in self.in_dims)

    @property
    def in_dims(self) -> tuple[int, ...]:
        """Our dimensions that are columns of the tensor; none for a vector."""
        spec = self.spec
        columns = {EMBEDDING: (ax.EMBED,), HEAD: (ax.EMBED,)}.get(spec.kind, spec.inputs)
        return tuple(d for d, name in enumerate(spec.axes) if name in columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfTensor:
    """A tensor of a published checkpoint, in the form it has before any quantisation.

    Attributes:
      name: such as `model.layers.3.self_attn.q_b_proj.weight`.
      shape: [out, in], or [size].
      parts: the parameters it holds; more than one where they are fused.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def tags(self) -> frozenset[str]:
        """What the parameters are."""
        return self.parts[0].spec.tags

    @property
    def is_linear(self) -> bool:
        """Whether FP8 checkpoints quantise it: every matrix but the router's."""
        return MATRIX in self.tags and ROUTER not in self.tags

    @property
    def is_expert(self) -> bool:
        """Whether INT4 checkpoints quantise it."""
        return ROUTED_EXPERT in self.tags

    @property
    def is_selection_bias(self) -> bool:
        """Whether it is stored in float32 beside bfloat16 weights."""
        return SELECTION_BIAS in self.tags

    @property
    def head_rows(self) -> int:
        """Rows that stand together for one head."""
        return self.shape[0] // self.parts[0].heads


@functools.lru_cache(maxsize=4)
def hf_tensors(config: ModelConfig) -> dict[str, HfTensor]:
    """Returns every tensor of a model's published form by name: embedding, layers, norm, head."""
    plan = transformer.specs(config)
    tensors = [
        *_outside(plan, ("embedding",)),
        *_layers(plan.dense_blocks, "dense_blocks", 0, config),
        *_layers(plan.moe_blocks, "moe_blocks", config.num_dense_layers, config),
        *_outside(plan, ("final_norm", "head")),
    ]
    return {tensor.name: tensor for tensor in tensors}


def _outside(plan: Any, paths: tuple[str, ...]) -> Iterator[HfTensor]:
    for path in paths:
        yield _tensor(_OUTSIDE[path], [(path, getattr(plan, path))])


def _layers(plan: Any, path: str, first_layer: int, config: ModelConfig) -> Iterator[HfTensor]:
    """Yields the tensors of one stack of blocks, layer by layer."""
    if plan is None:
        return
    members: dict[str, list[tuple[str, ParamSpec]]] = {}
    for name, spec in named_specs(plan):
        members.setdefault(_template(name, spec, config), []).append((f"{path}.{name}", spec))
    num_layers = next(iter(members.values()))[0][1].shape[0]
    kinds = [_tensor(template, fused) for template, fused in members.items()]
    for layer in range(num_layers):
        number = first_layer + layer
        for kind in kinds:
            if not kind.is_expert:
                yield _at(kind, kind.name.format(layer=number), (layer,))
                continue
            for expert in range(config.num_routed_experts):
                yield _at(kind, kind.name.format(layer=number, expert=expert), (layer, expert))


def _at(kind: HfTensor, name: str, index: tuple[int, ...]) -> HfTensor:
    """Returns the tensor of one layer, or of one of its experts, that is of a kind."""
    parts = [
        Part(path=part.path, index=index, spec=part.spec, first_row=part.first_row)
        for part in kind.parts
    ]
    return HfTensor(name=name, shape=kind.shape, parts=tuple(parts))


def _template(name: str, spec: ParamSpec, config: ModelConfig) -> str:
    """Returns the published name of a block's parameter, or of what it is fused to."""
    names = _ATTENTION | _MIXTURE
    if config.q_latent_dim is None:
        names |= _WITHOUT_QUERY_LATENT
    if spec.fused_with:
        name = f"{name.rpartition('.')[0]}.{spec.fused_with}"
    if name in names:
        return _LAYER + names[name]
    *parents, leaf = name.split(".")
    folder = {"experts": _EXPERT, "shared": "mlp.shared_experts.", "feed_forward": "mlp."}
    return _LAYER + folder[parents[-1]] + _FEED_FORWARD[leaf]


def _tensor(name: str, members: list[tuple[str, ParamSpec]]) -> HfTensor:
    """Puts members side by side: their rows, one head after the other."""
    parts, first_row = [], 0
    for path, spec in members:
        part = Part(path=path, index=(), spec=_unstacked(spec), first_row=first_row)
        parts.append(part)
        first_row += part.width
    rows = parts[0].heads * first_row
    columns = [math.prod(parts[0].spec.shape[d] for d in parts[0].in_dims)]
    shape = (rows, *columns) if parts[0].in_dims else (rows,)
    return HfTensor(name=name, shape=shape, parts=tuple(parts))


def _unstacked(spec: ParamSpec) -> ParamSpec:
    kept = [d for d, name in enumerate(spec.axes) if name not in _STACKS]
    return dataclasses.replace(
        spec,
        shape=tuple(spec.shape[d] for d in kept),
        axes=tuple(spec.axes[d] for d in kept),
    )


def row_ranges(tensor: HfTensor, part: Part, index: tuple[slice, ...]) -> list[slice]:
    """Returns the rows of a tensor that hold a piece of a parameter, in the piece's order.

    Args:
      tensor: the published tensor.
      part: of the parameter in it.
      index: the piece, a slice for each dimension of `part.spec`.
    """
    *head, within = (_bounds(index[d], part.spec.shape[d]) for d in part.out_dims)
    heads = range(*head[0]) if head else range(1)
    starts = [h * tensor.head_rows + part.first_row for h in heads]
    ranges = [slice(start + within[0], start + within[1]) for start in starts]
    return _joined(ranges)


def column_ranges(part: Part, index: tuple[slice, ...]) -> list[slice]:
    """Returns the columns that hold a piece of a parameter; none for a vector."""
    if not part.in_dims:
        return []
    *outer, inner = (_bounds(index[d], part.spec.shape[d]) for d in part.in_dims)
    width = part.spec.shape[part.in_dims[-1]]
    starts = range(*outer[0]) if outer else range(1)
    return _joined([slice(s * width + inner[0], s * width + inner[1]) for s in starts])


def _bounds(piece: slice, size: int) -> tuple[int, int]:
    start, stop, step = piece.indices(size)
    assert step == 1, piece
    return start, stop


def _joined(ranges: list[slice]) -> list[slice]:
    """Joins ranges of which one begins where the last ends."""
    joined = ranges[:1]
    for piece in ranges[1:]:
        if piece.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return joined


def from_published(part: Part, rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """Turns rows and columns of a tensor, [out, in], into the piece of the parameter they hold.

    Args:
      part: of the parameter.
      rows: the values at `row_ranges` and `column_ranges`.
      index: the piece.

    Returns:
      A view, in the parameter's own dimensions.
    """
    sizes = [len(range(*_bounds(i, n))) for i, n in zip(index, part.spec.shape, strict=True)]
    order = (*part.out_dims, *part.in_dims)
    values = rows.reshape([sizes[d] for d in order])
    return values.transpose(np.argsort(order))


def to_published(part: Part, values: np.ndarray) -> np.ndarray:
    """Turns a whole parameter into [heads, width, in], or [size]: the rows that it has there."""
    rows = values.transpose((*part.out_dims, *part.in_dims))
    return rows.reshape(part.heads, part.width, -1) if part.in_dims else rows


def parts_by_path(config: ModelConfig) -> dict[str, dict[tuple[int, ...], tuple[HfTensor, Part]]]:
    """Returns for each parameter, layer and expert the tensor that holds it."""
    found: dict[str, dict[tuple[int, ...], tuple[HfTensor, Part]]] = {}
    for tensor in hf_tensors(config).values():
        for part in tensor.parts:
            found.setdefault(part.path, {})[part.index] = (tensor, part)
    return found
