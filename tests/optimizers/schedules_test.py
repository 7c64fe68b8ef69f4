import jax
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.optimizer import Decay, ScheduleConfig
from kimi_jax.core.errors import ConfigError
from kimi_jax.optimizers.schedules import learning_rate_schedule

# float32 holds 7 digits; the closed forms are float64.
RTOL = 1e-6


CONFIG = {
    "peak": 2e-4,
    "warmup_steps": 5,
    "stable_steps": 7,
    "decay_steps": 10,
    "final": 2e-5,
    "anneal_steps": 4,
    "anneal_final": 7e-6,
}


def closed_form(step, decay):
    """Learning rate of one step of `CONFIG`, phase by phase, in float64."""
    done = step + 1
    if done <= 5:
        return 2e-4 * done / 5
    if done <= 12:
        return 2e-4
    if done <= 22:
        fraction = (done - 12) / 10
        if decay is Decay.COSINE:
            return 2e-5 + 1.8e-4 * (1 + np.cos(np.pi * fraction)) / 2
        return 2e-4 - 1.8e-4 * fraction
    return 2e-5 - 1.3e-5 * min(done - 22, 4) / 4


class ScheduleTest(parameterized.TestCase):
    @parameterized.parameters(Decay.COSINE, Decay.LINEAR)
    def test_every_step_follows_the_closed_form(self, decay):
        steps = np.arange(35)
        expected = [closed_form(step, decay) for step in steps]
        rates = learning_rate_schedule(ScheduleConfig(**CONFIG, decay=decay), num_steps=30)(steps)
        np.testing.assert_allclose(rates, expected, rtol=RTOL)

    @parameterized.parameters(
        (0, 2e-4 / 5), (4, 2e-4), (11, 2e-4), (21, 2e-5), (25, 7e-6), (1000, 7e-6)
    )
    def test_last_step_of_each_phase_has_its_final_value(self, step, expected):
        config = ScheduleConfig(**CONFIG)
        rate = jax.jit(learning_rate_schedule(config, num_steps=26))(step)
        np.testing.assert_allclose(rate, expected, rtol=RTOL)

    def test_stable_phase_fills_the_run_where_it_is_not_given(self):
        config = ScheduleConfig(peak=1.0, warmup_steps=10, decay_steps=20)
        rates = learning_rate_schedule(config, num_steps=100)(np.arange(100))
        self.assertEqual(float(rates[79]), 1.0)
        self.assertLess(float(rates[80]), 1.0)
        self.assertEqual(float(rates[99]), 0.0)

    def test_nothing_but_a_peak_is_constant(self):
        rates = learning_rate_schedule(ScheduleConfig(peak=0.5), num_steps=3)(np.arange(5))
        np.testing.assert_array_equal(rates, np.full(5, 0.5, np.float32))

    def test_constant_decay_stays_at_the_peak_until_the_anneal(self):
        config = ScheduleConfig(
            peak=1.0, decay_steps=4, decay=Decay.CONSTANT, anneal_steps=2, anneal_final=0.5
        )
        rates = learning_rate_schedule(config, num_steps=6)(np.arange(7))
        np.testing.assert_allclose(rates, [1, 1, 1, 1, 0.75, 0.5, 0.5], rtol=RTOL)

    def test_an_anneal_may_start_from_a_rate_of_its_own(self):
        config = ScheduleConfig(
            peak=1.0, decay_steps=2, decay=Decay.LINEAR, anneal_steps=4, anneal_start=0.4
        )
        rates = learning_rate_schedule(config, num_steps=6)(np.arange(7))
        np.testing.assert_allclose(rates, [0.5, 0.0, 0.3, 0.2, 0.1, 0.0, 0.0], rtol=RTOL)

    def test_phases_longer_than_the_run_are_refused(self):
        config = ScheduleConfig(peak=1.0, warmup_steps=10, stable_steps=50, decay_steps=41)
        with self.assertRaisesRegex(ConfigError, "needs 101 steps.*training.num_steps is 100"):
            learning_rate_schedule(config, num_steps=100)

    @parameterized.parameters(
        ({"final": 0.1}, "final is 0.1 but nothing decays"),
        ({"final": 0.1, "decay_steps": 5, "decay": Decay.CONSTANT}, "nothing decays"),
        ({"anneal_final": 0.1}, "anneal_final is 0.1 but"),
        ({"anneal_start": 0.1}, "anneal_start is 0.1 but"),
    )
    def test_final_values_that_no_phase_reaches_are_refused(self, options, message):
        with self.assertRaisesRegex(ConfigError, message):
            learning_rate_schedule(ScheduleConfig(peak=1.0, **options), num_steps=100)


if __name__ == "__main__":
    absltest.main()
