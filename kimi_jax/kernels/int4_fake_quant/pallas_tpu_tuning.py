"""What the tuning tool needs to know of products with rounded weights on TPUs."""

import functools

from kimi_jax.core.param_spec import Leaf
from kimi_jax.kernels.int4_fake_quant import cases
from kimi_jax.kernels.int4_fake_quant.pallas_tpu import weight
from kimi_jax.kernels.stationary import Weight
from kimi_jax.kernels.stationary_tuning import tunables
from kimi_jax.quantization.int4 import GROUP_SIZE

_BASELINE = "bfloat16_matmul"


def _as_it_is(w: Leaf) -> Weight:
    """Returns a weight that is not rounded."""
    return Weight(
        name=_BASELINE,
        stored=(w,),
        zeros=(0,),
        inputs=w.shape[0],
        group_size=1,
        make=lambda tile, dtype: tile.astype(dtype),
    )


TUNABLE = {
    **tunables("int4_fake_quant", cases.operands, functools.partial(weight, group_size=GROUP_SIZE)),
    # The same program without the rounding: what that costs.
    _BASELINE: tunables(_BASELINE, cases.operands, _as_it_is)[_BASELINE]._replace(
        is_tabulated=False
    ),
}
