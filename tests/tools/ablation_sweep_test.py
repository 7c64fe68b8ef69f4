import dataclasses
import pathlib
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.configs.optimizer import ScheduleConfig
from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat
from kimi_jax.optimizers.schedules import learning_rate_schedule
from tests.support import tiny
from tools import ablation_sweep

_LOSS, _ROUNDED_LOSS = 3.0, 4.0


def _evaluate(params, config):
    del params
    return {"eval/loss": _ROUNDED_LOSS if config.quantization.enabled else _LOSS}


class SweepTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        tiny.write_corpus(folder / "corpus")
        config = tiny.text_experiment(
            folder,
            training={"num_steps": 4, "batch_sequences": 4, "eval_every": 4},
            parallel={"data": 1, "expert": 1},
        )
        rounded = QuantizationConfig(format=WeightFormat.INT4, group_size=8, start_step=2)
        self.config = dataclasses.replace(config, quantization=rounded)
        self.steps = []
        self.enterContext(
            mock.patch.object(ablation_sweep.Sweep, "_compiled_step", self._compiled_step)
        )
        for name, result in (("HeldOutEvaluation", _evaluate), ("initial_state", mock.Mock())):
            fake = mock.Mock(return_value=result)
            self.enterContext(mock.patch.object(ablation_sweep, name, fake))
        self.sweep = ablation_sweep.Sweep(self.config, folder / "runs")

    def _compiled_step(self, config):
        """A step that takes note of the format of weights and of its batch."""

        def step(state, batch, rate):
            del rate
            self.steps.append((config.quantization.format.value, np.asarray(batch.inputs)))
            return state, {"loss/train": jnp.float32(1.0)}

        return step

    def _losses(self, log):
        return {name: log.series(f"eval/{name}")[1].tolist() for name in ("loss", "rounded_loss")}

    def test_a_run_rounds_from_its_start_step_on_and_is_not_repeated(self):
        log = self.sweep.run("qat", self.config)
        self.assertEqual([kind for kind, _ in self.steps], ["compute"] * 2 + ["int4"] * 2)
        self.assertEqual(self._losses(log), {"loss": [_ROUNDED_LOSS], "rounded_loss": []})
        self.sweep.run("qat", self.config)
        self.assertLen(self.steps, 4)

    def test_the_last_weights_of_a_run_without_are_measured_rounded_too(self):
        plain = self.config.at_step(0)
        log = self.sweep.run("plain", plain, rounded=self.config.quantization)
        self.assertEqual([kind for kind, _ in self.steps], ["compute"] * 4)
        self.assertEqual(self._losses(log), {"loss": [_LOSS], "rounded_loss": [_ROUNDED_LOSS]})

    def test_both_runs_see_the_same_tokens(self):
        self.sweep.run("qat", self.config)
        self.sweep.run("plain", self.config.at_step(0))
        for (_, with_int4), (_, without) in zip(self.steps[:4], self.steps[4:], strict=True):
            np.testing.assert_array_equal(with_int4, without)


class WithStepsTest(absltest.TestCase):
    def test_the_start_of_rounding_keeps_its_share(self):
        rounded = QuantizationConfig(format=WeightFormat.INT4, start_step=2)
        config = dataclasses.replace(tiny.experiment(), quantization=rounded)
        self.assertEqual(ablation_sweep.with_steps(config, 8).quantization.start_step, 4)


class ScheduleTest(absltest.TestCase):
    def test_another_peak_moves_all_rates_and_another_length_all_phases(self):
        schedule = ScheduleConfig(
            peak=1.0,
            warmup_steps=2,
            decay_steps=4,
            final=0.1,
            anneal_steps=6,
            anneal_start=0.4,
            anneal_final=0.2,
        )
        config = tiny.experiment(optimizer={"schedule": schedule}, training={"num_steps": 20})
        rates = learning_rate_schedule(schedule, 20)(np.arange(20))
        doubled = learning_rate_schedule(ablation_sweep.with_peak(schedule, 2.0), 20)
        np.testing.assert_allclose(doubled(np.arange(20)), 2 * rates, rtol=1e-6)
        longer = ablation_sweep.with_steps(config, 40).optimizer.schedule
        stretched = learning_rate_schedule(longer, 40)(np.arange(1, 40, 2))
        np.testing.assert_allclose(stretched, rates, rtol=1e-6)


if __name__ == "__main__":
    absltest.main()
