"""A short run whose feed-forward layers keep FP8 codes, against the run that keeps the values."""

import functools

import jax
import numpy as np
from absl.testing import absltest

from kimi_jax.configs.compute import Remat, ResidualFormat
from kimi_jax.model import transformer
from kimi_jax.training.state import initial_state
from kimi_jax.training.step import make_optimizer, train_step
from tests.support import tiny

_STEPS = 4
_QUICK = {"xla_backend_optimization_level": 0}  # compiling takes the time
# A code is off by at most 2**-4 of its value, evenly: by 2**-4 / sqrt(3) in the mean. A weight's
# gradient g is a product of at most three (x, the derivative of silu(gate), up) whose errors are
# independent, so d = g' - g is 2**-4 of g. To first order a step of Muon, whose orthogonalisation
# is O, lowers the loss by lr <g, O(g)> = lr |g|_*, and with g' by lr <g, O(g')>, which is at least
# lr (|g|_* - 2 |d|_*): a decrease differs by 2 * 2**-4 of itself. Measured: 0.0044.
_DECREASE_TOLERANCE = 2 * 2.0**-4


def _losses(residuals):
    """Losses before each step, of steps on one batch, so that they fall."""
    config = tiny.experiment(
        compute={"remat": Remat.K2, "feed_forward_residuals": residuals},
        training={"num_steps": _STEPS},
    )
    plan, mesh = transformer.specs(config.model), tiny.mesh(1, 1)
    with jax.set_mesh(mesh):
        transformation = make_optimizer(config, plan)
        take = functools.partial(
            train_step, config=config, plan=plan, transformation=transformation
        )
        step = jax.jit(take, compiler_options=_QUICK)
        state = initial_state(config, plan, transformation)
        batch, losses = tiny.batch(mesh), []
        for _ in range(_STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss/train"]))
    return np.array(losses)


class Fp8ResidualsTest(absltest.TestCase):
    def test_the_loss_falls_as_without(self):
        kept, coded = map(_losses, ResidualFormat)
        self.assertEqual(coded[0], kept[0])
        self.assertNotEqual(coded[1], kept[1])
        decrease = kept[0] - kept
        self.assertGreater(decrease[-1], 0.1)
        np.testing.assert_array_less(np.abs(coded - kept)[1:], _DECREASE_TOLERANCE * decrease[1:])


if __name__ == "__main__":
    absltest.main()
