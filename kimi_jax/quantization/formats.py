"""The formats that weights can be rounded to; a further one, such as MXFP4, joins here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kimi_jax.configs.quantization import WeightFormat
from kimi_jax.quantization import int4
from kimi_jax.quantization.int4 import Int4Weight


class Quantizer(NamedTuple):
    """What a format has to bring.

    Attributes:
      weight: class of a quantised weight, a pytree with `shape`, `ndim` and `group_size` whose
        leaves are [..., a part of K, N], so that they are split over devices as the weight is.
      quantize: (weight [..., K, N], group_size) -> quantised weight.
      dequantize: (quantised weight, dtype) -> the values it stands for.
    """

    weight: type
    quantize: Callable[..., Any]
    dequantize: Callable[[Any, Any], Array]


QUANTIZERS: Mapping[WeightFormat, Quantizer] = {
    WeightFormat.INT4: Quantizer(Int4Weight, int4.quantize, int4.dequantize),
}
QUANTIZED = tuple(quantizer.weight for quantizer in QUANTIZERS.values())  # for isinstance()


def dequantize(weight: Any, dtype: DTypeLike) -> Float[Array, "*weight"]:
    """Returns the values that a quantised weight of any format stands for."""
    (quantizer,) = (q for q in QUANTIZERS.values() if isinstance(weight, q.weight))
    return quantizer.dequantize(weight, dtype)
