"""What quantisation-aware training changes of a step, and what it leaves alone."""

import functools

import chex
import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from kimi_jax.configs.quantization import Quantize, WeightFormat
from kimi_jax.core.param_spec import ROUTED_EXPERT, map_specs
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import initialize
from kimi_jax.quantization import int4
from kimi_jax.training import step as steps
from tests.support import tiny

_GROUP = 8
_PLAN = transformer.specs(tiny.MODEL)
_QUICK = {"xla_backend_optimization_level": 0}
_INT4 = {"format": WeightFormat.INT4, "group_size": _GROUP}
_PLAIN = tiny.experiment()
_ROUNDED = tiny.experiment(quantization=_INT4)
_ON_USE = tiny.experiment(quantization=_INT4 | {"quantize": Quantize.USE})


def _round_experts(params):
    def convert(spec, leaf):
        if ROUTED_EXPERT not in spec.tags:
            return leaf
        return int4.dequantize(int4.quantize(leaf, _GROUP), leaf.dtype)

    return map_specs(convert, _PLAN, params)


@functools.cache
def _loss_and_gradients(config):
    """One program for all tests of a configuration: compiling takes nearly all of the time."""

    def share(params, batch):
        options = {"config": config.model, "choices": config.compute}
        rounded = transformer.quantize(params, quantization=config.quantization, **options)
        constants = (jnp.sum(batch.weights), rounded)
        return steps.batch_share_of_loss(params, batch, config=config, constants=constants)

    return jax.jit(jax.value_and_grad(share, has_aux=True), compiler_options=_QUICK)


class QuantizedStepTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.mesh = tiny.mesh(1, 1)
        cls.enterClassContext(jax.set_mesh(cls.mesh))
        cls.params = jax.jit(functools.partial(initialize, plan=_PLAN))(jax.random.key(1))
        cls.on_grid = jax.jit(_round_experts)(cls.params)

    def _gradients(self, config, params):
        batch = tiny.batch(self.mesh)
        (loss, (_, stats)), gradients = _loss_and_gradients(config)(params, batch)
        return jax.device_get((loss, stats, gradients))

    def test_experts_on_the_grid_train_as_if_nothing_were_rounded(self):
        """Every tensor takes the same path, then: loss, statistics, all gradients, bit for bit."""
        plain = self._gradients(_PLAIN, self.on_grid)
        chex.assert_trees_all_equal(self._gradients(_ROUNDED, self.on_grid), plain)
        self.assertNotEqual(self._gradients(_PLAIN, self.params)[0], plain[0])

    def test_masters_off_the_grid_get_the_gradients_of_those_on_it(self):
        chex.assert_trees_all_equal(
            self._gradients(_ROUNDED, self.params), self._gradients(_PLAIN, self.on_grid)
        )

    def test_rounding_on_use_is_rounding_once_a_step(self):
        chex.assert_trees_all_equal(
            self._gradients(_ON_USE, self.params), self._gradients(_ROUNDED, self.params)
        )


if __name__ == "__main__":
    absltest.main()
