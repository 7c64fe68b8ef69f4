import dataclasses
import functools
import json
import os
import pathlib
import signal
import tempfile
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat
from kimi_jax.core.errors import (
    CheckpointMismatchError,
    TrainingFailedError,
    TrainingInterruptedError,
)
from kimi_jax.data.corpus import open_corpus
from kimi_jax.training import loop, phases, throughput
from kimi_jax.training.checkpoint import CHECKPOINT_FOLDER
from kimi_jax.training.step import train_step
from tests.support import tiny

EVERY_STEP = {
    "loss/train",
    "optimizer/learning_rate",
    "optimizer/gradient_norm",
    "optimizer/update_rms_muon",
    "optimizer/update_rms_adamw",
    "qk_clip/max_logit",
    "qk_clip/heads_clipped",
    "qk_clip/heads_clipped_ever",
    "experts/max_violation",
    "throughput/tokens_per_second",
    "throughput/step_seconds",
    "throughput/model_flops_per_second",
    "throughput/share_of_peak",
    "memory/bytes_in_use",
    "time/seconds_left",
}
NUM_HEADS = tiny.MODEL.num_layers * tiny.MODEL.num_heads
_QUICK = {"xla_backend_optimization_level": 0}


def _evaluate(params, config):
    del params
    return {"eval/loss": 3.0, "eval/bits_per_byte": 2.0}


class FakeStep:
    """Stands for the compiled step: no model, but what it is given is remembered."""

    def __init__(self, *, nan_at=None, interrupt_at=None, before=lambda step: None):
        self.batches = []
        self._nan_at, self._interrupt_at, self._before = nan_at, interrupt_at, before

    def __call__(self, state, batch):
        step = int(state.step)
        self._before(step)
        self.batches.append(np.asarray(batch.inputs))
        if step == self._interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        loss = jnp.float32(np.nan if step == self._nan_at else 1.0 + step)
        metrics = {"loss/train": loss, "optimizer/gradient_norm": jnp.float32(1.0)}
        return state.replace(step=state.step + 1), metrics


class LoopTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enterClassContext(
            mock.patch.object(throughput, "measure_matmul_peak", lambda dtype: 1e9)
        )
        cls.mesh = tiny.mesh(2, 2)
        cls.enterClassContext(jax.set_mesh(cls.mesh))
        cls.inputs = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        tiny.write_corpus(cls.inputs / "corpus")

    def setUp(self):
        super().setUp()
        self.workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def _config(self, **training):
        options = {"num_steps": 5, "batch_sequences": 4, "sample_tokens": 0, "eval_every": 2}
        return tiny.text_experiment(
            self.inputs,
            training=options | training,
            optimizer={"qk_clip_threshold": 1e-6},  # every head's largest logit is above
        )

    def _train(self, step, config=None, evaluate=_evaluate, **options):
        config = config or self._config()
        corpus = open_corpus(config.data)
        with mock.patch.object(phases, "compile_train_step", lambda config, plan, mesh: step):
            return loop.train(
                config, self.workdir, corpus, mesh=self.mesh, evaluate=evaluate, **options
            )

    def _records(self, name="metrics.jsonl"):
        return [json.loads(line) for line in (self.workdir / name).read_text().splitlines()]

    def _checkpoints(self):
        return sorted(path.name for path in (self.workdir / CHECKPOINT_FOLDER).iterdir())

    def test_a_real_run_records_every_step_and_clips_and_balances(self):
        config = self._config(num_steps=3, checkpoint_every=2)
        plan = loop.transformer.specs(config.model)
        step = jax.jit(
            functools.partial(
                train_step,
                config=config,
                plan=plan,
                transformation=loop.make_optimizer(config, plan),
            ),
            donate_argnums=0,
            compiler_options=_QUICK,
        )
        state = self._train(step, config)
        records = self._records()
        self.assertEqual([record["step"] for record in records], [0, 1, 2])
        for record in records:
            self.assertContainsSubset(EVERY_STEP, record)
            self.assertTrue(all(np.isfinite(list(record.values()))))
            self.assertEqual(record["qk_clip/heads_clipped_ever"], NUM_HEADS)
        self.assertEqual(records[0]["qk_clip/heads_clipped"], NUM_HEADS)
        self.assertEqual([("eval/loss" in record) for record in records], [False, True, True])
        layers = self._records("layers.jsonl")[0]
        self.assertEqual(np.shape(layers["max_logit"]), (3, 2))
        self.assertEqual(np.shape(layers["expert_load"]), (2, 8))
        self.assertEqual(self._checkpoints(), ["2", "3"])
        self.assertEqual(int(state.step), 3)
        self.assertTrue(np.all(state.clipped_ever))
        self.assertTrue(np.any(state.params.moe_blocks.feed_forward.router.selection_bias))

    def test_evaluations_round_from_the_step_on_that_rounds(self):
        rounded = []

        def evaluate(params, config):
            rounded.append(config.quantization.enabled)
            return _evaluate(params, config)

        options = QuantizationConfig(format=WeightFormat.INT4, start_step=3)
        config = dataclasses.replace(self._config(), quantization=options)
        self._train(FakeStep(), config, evaluate)
        records = self._records()
        measured = [record["step"] for record in records if "eval/loss" in record]
        self.assertEqual(dict(zip(measured, rounded, strict=True)), {1: False, 3: True, 4: True})

    def test_metrics_are_recorded_one_step_late(self):
        lines = []
        step = FakeStep(before=lambda step: lines.append(len(self._records())))
        self._train(step, self._config(eval_every=None))
        self.assertEqual(lines, [0, 0, 1, 2, 3])
        self.assertLen(self._records(), 5)

    @parameterized.named_parameters(
        ("where_a_checkpoint_is_due", 3), ("between_checkpoints", 2), ("last", 4)
    )
    def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(self, bad):
        with self.assertRaisesRegex(TrainingFailedError, f"loss/train became nan at step {bad}"):
            self._train(FakeStep(nan_at=bad), self._config(checkpoint_every=2))
        self.assertEqual(self._checkpoints()[-1], {3: "2", 2: "2", 4: "4"}[bad])
        self.assertIsNone(self._records()[bad]["loss/train"])

    def test_an_interrupted_run_saves_and_goes_on_with_the_next_batch(self):
        whole, first, second = FakeStep(), FakeStep(interrupt_at=2), FakeStep()
        with self.assertRaisesRegex(TrainingInterruptedError, "SIGINT after step 3 of 5"):
            self._train(first)
        self.assertEqual(self._checkpoints(), ["3"])
        self._train(second)
        records = self._records()
        self.assertEqual([record["step"] for record in records], [0, 1, 2, 3, 4])
        self.assertEqual([record["loss/train"] for record in records], [1, 2, 3, 4, 5])
        self.workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self._train(whole)
        np.testing.assert_array_equal(first.batches + second.batches, whole.batches)

    def test_given_weights_are_where_a_new_run_starts_and_a_resumed_one_does_not(self):
        config = self._config(num_steps=2)
        given = tiny.parameters(self.mesh, config.model)
        expected = jax.tree.map(np.asarray, given)
        state = self._train(FakeStep(), config, read_weights=lambda: given)
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.params), expected)
        self._train(FakeStep(), config, read_weights=mock.Mock(side_effect=AssertionError))

    def test_a_finished_run_takes_no_more_steps(self):
        self._train(FakeStep())
        again = FakeStep()
        self._train(again)
        self.assertEmpty(again.batches)
        self.assertLen(self._records(), 5)

    def test_noresume_refuses_a_folder_with_a_run(self):
        self._train(FakeStep())
        before = self._records()
        with self.assertRaisesRegex(CheckpointMismatchError, "already holds a run"):
            self._train(FakeStep(), resume=False)
        self.assertEqual(self._records(), before)


if __name__ == "__main__":
    absltest.main()
