"""What quantisation-aware training changes of a step, and what it leaves alone."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from kimi_jax.configs.quantization import Quantize, WeightFormat
from kimi_jax.model import transformer
from kimi_jax.quantization import int4
from kimi_jax.training import step as steps
from kimi_jax.training.state import abstract_state
from tests.support import tiny

_GROUP = 8
_PLAN = transformer.specs(tiny.MODEL)
_QUICK = {"xla_backend_optimization_level": 0}
_INT4 = {"format": WeightFormat.INT4, "group_size": _GROUP}
_PLAIN = tiny.experiment()
_ROUNDED = tiny.experiment(quantization=_INT4)
_ON_USE = tiny.experiment(quantization=_INT4 | {"quantize": Quantize.USE})


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
        cls.params = tiny.parameters(cls.mesh)
        cls.on_grid = jax.jit(functools.partial(tiny.round_experts, group_size=_GROUP))(cls.params)

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

    def test_the_optimizers_step_rounds_experts_once_for_all_micro_batches(self):
        config = tiny.experiment(quantization=_INT4, training={"accumulation_steps": 4})
        transformation = steps.make_optimizer(config, _PLAN)
        state = abstract_state(config, _PLAN, transformation, self.mesh)
        step = functools.partial(
            steps.train_step, config=config, plan=_PLAN, transformation=transformation
        )
        with mock.patch.object(steps, "accumulate", wraps=steps.accumulate) as accumulate:
            jax.eval_shape(step, state, tiny.batch(self.mesh))
        (_, _, _, (_, rounded)), _ = accumulate.call_args
        chosen = jax.tree.leaves(rounded, is_leaf=lambda node: isinstance(node, int4.Int4Weight))
        self.assertEqual([type(weight) for weight in chosen], 3 * [int4.Int4Weight])

    def test_rounding_on_use_is_rounding_once_a_step(self):
        chex.assert_trees_all_equal(
            self._gradients(_ON_USE, self.params), self._gradients(_ROUNDED, self.params)
        )


if __name__ == "__main__":
    absltest.main()
