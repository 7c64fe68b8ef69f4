"""Which weights are rounded to few bits while they are trained."""

import dataclasses
import enum
import re

from kimi_jax.configs.checks import check_fields, require_positive
from kimi_jax.core.errors import ConfigError, require
from kimi_jax.core.param_spec import ROUTED_EXPERT


class WeightFormat(enum.Enum):
    """Format in which the chosen weights enter matrix products."""

    COMPUTE = "compute"  # like all others: nothing is quantised
    INT4 = "int4"  # codes -7 to 7 and a bfloat16 scale for each group, as K2 Thinking is released


class Quantize(enum.Enum):
    """When weights are rounded; the values are the same."""

    STEP = "step"  # once per optimizer step: codes are kept, gathered and used wherever needed
    USE = "use"  # by each layer whenever it runs, from its gathered weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Quantisation-aware training: products use rounded weights, gradients move the masters.

    Attributes:
      format: of the chosen weights in products.
      tag: which weights, by a tag of `core.param_spec`: "routed_expert" as in released checkpoints;
        None where `pattern` says it.
      pattern: regular expression for the whole dotted name of a weight, such as
        "moe_blocks.feed_forward.(experts|shared).*"; None where `tag` says it.
      start_step: the first step with rounded weights; evaluations follow.
      group_size: weights along a matrix's inputs that share a scale.
      quantize: when they are rounded.
    """

    format: WeightFormat = WeightFormat.COMPUTE
    tag: str | None = ROUTED_EXPERT
    pattern: str | None = None
    start_step: int = 0
    group_size: int = 32
    quantize: Quantize = Quantize.STEP

    def __post_init__(self):
        check_fields(self, "quantization")
        require_positive(self, "quantization", "group_size")
        require(
            self.group_size % 8 == 0,
            f"quantization.group_size must be a multiple of 8, the codes of a word, "
            f"got {self.group_size}; released checkpoints have 32",
        )
        require(
            self.start_step >= 0,
            f"quantization.start_step must not be negative, got {self.start_step}",
        )
        require(
            (self.tag is None) != (self.pattern is None),
            "weights are chosen by quantization.tag or by quantization.pattern; set the other to "
            f"None, got {self.tag!r} and {self.pattern!r}",
        )
        idle = [
            field.name
            for field in dataclasses.fields(self)
            if not self.enabled and getattr(self, field.name) != field.default
        ]
        require(
            not idle,
            f"quantization.{', '.join(idle)} would do nothing while quantization.format is "
            f"{self.format.value!r}; set it to 'int4'",
        )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(
                f"quantization.pattern {self.pattern!r} is no regular expression: {error}"
            ) from error

    @property
    def enabled(self) -> bool:
        """Whether any weight is ever rounded."""
        return self.format is not WeightFormat.COMPUTE
