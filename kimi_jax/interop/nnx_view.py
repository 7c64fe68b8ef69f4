"""The model as a `flax.nnx.Module`, for programs that hold modules: Tunix, Qwix, one's own.

The view is a tree of variables named like our parameters, and a `__call__` that hands them to the
functions of `model.transformer`. Nothing in the library imports it.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.configs.quantization import QuantizationConfig
from kimi_jax.core.errors import require
from kimi_jax.core.param_spec import SELECTION_BIAS, ParamSpec, map_specs
from kimi_jax.model import transformer
from kimi_jax.model.stats import ModelStats
from kimi_jax.parallel.placement import initialize
from kimi_jax.quantization.formats import QUANTIZED


class SelectionBias(nnx.Variable):
    """Bias of a router: moved by the load-balancing rule, never by a gradient."""


class QuantizedPart(nnx.Variable):
    """Codes or scales of a quantised weight; they are data, not trained."""


class ParamsView(nnx.Module):
    """One parameter dataclass: a variable or another view for each of its fields."""

    def __init__(self, variables: Any):
        """Takes over a dataclass of variables, of dataclasses of them, and of None."""
        self._kind = type(variables)
        for field in dataclasses.fields(variables):
            value = getattr(variables, field.name)
            is_part = dataclasses.is_dataclass(value)
            setattr(self, field.name, ParamsView(value) if is_part else value)

    def params(self) -> Any:
        """Returns the dataclass of what the variables hold now."""
        names = [field.name for field in dataclasses.fields(self._kind)]
        return self._kind(**{name: _value(getattr(self, name)) for name in names})


class NnxView(ParamsView):
    """The decoder with its configuration.

    Weights, embedding, head and norms are `nnx.Param`s, so that `nnx.grad` and
    `nnx.Optimizer(view, ..., wrt=nnx.Param)` find them; `SelectionBias` and `QuantizedPart` are
    not. Blocks of one kind are stacked along L: `view.moe_blocks.attention.w_out` is one variable
    of all layers.

    What computes needs the mesh that the parameters lie on, and should be compiled:

        with jax.set_mesh(mesh):
            logits = jax.jit(lambda view, tokens: view(tokens))(view, tokens)

    `nnx.jit` works, too, but copies every variable in each call, so that updates of them come out;
    with `graph_updates=False` it does not.

    Tunix: `PeftTrainer` trains the view with a loss function of one's own (`with_loss_fn`). Its
    default loss, its reinforcement learning and its samplers call a model as
    `model(tokens, positions, cache, attention_mask)`, with masks and caches that this one has not.

    Qwix: `qwix.quantize` and `dequantize` take the value of any variable. What it does by replacing
    `jnp.einsum` during a call (`quantize_model`, and LoRA by `apply_lora_to_model`) does not work:
    its products lose the layout on the mesh that ours ask for, and those of a layer see a slice of
    a variable inside `jax.lax.scan`, where no variable can be added.
    """

    def __init__(
        self,
        params: transformer.TransformerParams,
        config: ModelConfig,
        choices: ComputeConfig,
        quantization: QuantizationConfig | None = None,
    ):
        """Shows stored parameters as a module; both share their memory.

        Args:
          params: in storage layout; quantised weights may stand for some.
          config: the architecture.
          choices: how to compute it.
          quantization: what is rounded in each call, gradients passing straight through; None
            rounds nothing.
        """
        super().__init__(map_specs(_variables, transformer.specs(config), params))
        self.config = config
        self.choices = choices
        self.quantization = QuantizationConfig() if quantization is None else quantization

    @classmethod
    def initialize(
        cls,
        key: jax.Array,
        config: ModelConfig,
        choices: ComputeConfig,
        quantization: QuantizationConfig | None = None,
    ) -> "NnxView":
        """Returns a view of new parameters on the current mesh; `key` is `jax.random.key(seed)`."""
        params = jax.jit(lambda key: initialize(key, transformer.specs(config)))(key)
        return cls(params, config, choices, quantization)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits of the token after each one; see `with_stats`."""
        return self.with_stats(tokens, positions, segments)[0]

    def with_stats(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], ModelStats]:
        """Runs the model on whole sequences, without a cache.

        Args:
          tokens: ids in [0, V); B a multiple of the parts into which the mesh splits sequences.
          positions: index of each token within its document; None counts from a row's start.
          segments: document number of each token; None makes each row one document.

        Returns:
          Logits, the vocabulary split over the tensor axis, and the statistics that QK-clip and
          load balancing need.

        Raises:
          ConfigError: segments come without positions.
        """
        require(
            segments is None or positions is not None,
            "segments are given without positions; give the index of each token in its document",
        )
        return transformer.run(
            self.params(),
            tokens,
            positions,
            segments,
            config=self.config,
            choices=self.choices,
            quantization=self.quantization,
        )


def _variables(spec: ParamSpec, weight: Any) -> Any:
    """Puts each array of a weight into a variable."""
    kind = SelectionBias if spec.kind == SELECTION_BIAS else nnx.Param
    return jax.tree.map(QuantizedPart if isinstance(weight, QUANTIZED) else kind, weight)


def _value(node: ParamsView | nnx.Variable | None) -> Any:
    if isinstance(node, ParamsView):
        return node.params()
    return None if node is None else node.get_value()
