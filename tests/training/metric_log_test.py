import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kimi_jax.core.errors import DataError, TrainingFailedError
from kimi_jax.training.metric_log import LAYERS_FILE, METRICS_FILE, TENSORBOARD_FOLDER, MetricLog


@jax.jit
def _slow(x):
    """About half a second of matrix products."""
    return jax.lax.fori_loop(0, 200, lambda _, y: y @ x * 0.01, x).sum()


class MetricLogTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def _records(self, name=METRICS_FILE):
        return [json.loads(line) for line in (self.workdir / name).read_text().splitlines()]

    def _run(self, steps, **options):
        with MetricLog(self.workdir, **options) as log:
            for step in steps:
                log.write(step, {"loss/train": jnp.float32(step), "max_logit": jnp.ones((2, 3))})

    def test_write_returns_while_the_device_still_computes(self):
        x = jnp.ones((768, 768))
        _slow(x).block_until_ready()
        with MetricLog(self.workdir) as log:
            loss = _slow(x)
            log.write(0, {"loss/train": loss})
            self.assertFalse(loss.is_ready())
            self.assertIsNone(log.latest_step)

    def test_latest_is_the_step_before_the_one_written(self):
        with MetricLog(self.workdir) as log:
            log.write(0, {"loss/train": jnp.float32(5), "max_logit": jnp.ones((2, 3))})
            self.assertEqual(log.latest, {})
            log.write(1, {"loss/train": jnp.float32(4)})
            self.assertEqual(log.latest_step, 0)
            self.assertEqual(log.latest["loss/train"], 5.0)
            self.assertIsInstance(log.latest["loss/train"], float)
            np.testing.assert_array_equal(log.latest["max_logit"], np.ones((2, 3)))
            log.flush()
            self.assertEqual(log.latest, {"loss/train": 4.0})

    def test_every_step_is_one_line_with_its_scalars_and_no_arrays(self):
        self._run(range(3))
        records = self._records()
        self.assertEqual([record["step"] for record in records], [0, 1, 2])
        self.assertEqual([record["loss/train"] for record in records], [0, 1, 2])
        self.assertEqual(set(records[0]), {"step", "seconds", "loss/train"})

    def test_metrics_given_twice_for_a_step_become_one_line(self):
        with MetricLog(self.workdir) as log:
            log.write(0, {"loss/train": 2.0})
            log.write(0, {"eval/bits_per_byte": 1.0})
        (record,) = self._records()
        self.assertEqual((record["loss/train"], record["eval/bits_per_byte"]), (2.0, 1.0))

    def test_arrays_are_written_every_nth_step_and_for_the_last(self):
        self._run(range(12), layers_every=5)
        records = self._records(LAYERS_FILE)
        self.assertEqual([record["step"] for record in records], [0, 5, 10, 11])
        self.assertEqual(records[0]["max_logit"], np.ones((2, 3)).tolist())

    def test_scalars_may_be_thinned_but_evaluations_and_the_last_step_stay(self):
        with MetricLog(self.workdir, lines_every=4) as log:
            for step in range(11):
                log.write(step, {"loss/train": float(step)})
                if step == 6:
                    log.write(step, {"eval/loss": 1.0})
        self.assertEqual([record["step"] for record in self._records()], [0, 4, 6, 8, 10])

    def test_a_step_already_recorded_is_refused(self):
        with MetricLog(self.workdir) as log:
            log.write(3, {"loss/train": 1.0})
            log.flush()
            with self.assertRaises(AssertionError):
                log.write(3, {"eval/loss": 1.0})

    def test_numbers_read_back_exactly_and_what_is_not_finite_is_null(self):
        value, count = np.float32(0.1), 3 << 40
        with MetricLog(self.workdir) as log:
            log.write(0, {
                "loss/train": jnp.float32(value), "loss/balance": jnp.bfloat16(0.25),
                "memory/bytes_in_use": count, "optimizer/gradient_norm": jnp.float32(jnp.inf),
                "clipped_ever": jnp.array([[True, False]]), "max_logit": jnp.array([[jnp.nan, 1]]),
            })  # fmt: skip
        (record,), (layers,) = self._records(), self._records(LAYERS_FILE)
        self.assertEqual(np.float32(record["loss/train"]), value)
        self.assertEqual(record["loss/train"], 0.1)
        self.assertEqual(record["loss/balance"], 0.25)
        self.assertEqual(record["memory/bytes_in_use"], count)
        self.assertIsNone(record["optimizer/gradient_norm"])
        self.assertEqual(layers["clipped_ever"], [[1, 0]])
        self.assertEqual(layers["max_logit"], [[None, 1.0]])

    def test_replicated_arrays_of_a_mesh_are_fetched(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
        loss = jax.device_put(jnp.float32(3), NamedSharding(mesh, PartitionSpec()))
        with MetricLog(self.workdir) as log:
            log.write(0, {"loss/train": loss})
        self.assertEqual(self._records()[0]["loss/train"], 3)

    def test_resuming_cuts_the_steps_after_the_checkpoint(self):
        self._run(range(8), layers_every=2)
        self._run(range(4, 6), from_step=4, layers_every=2)
        records = self._records()
        self.assertEqual([record["step"] for record in records], [0, 1, 2, 3, 4, 5])
        layers = self._records(LAYERS_FILE)
        self.assertEqual([record["step"] for record in layers], [0, 2, 4, 5])

    def test_seconds_go_on_counting_after_a_resumption(self):
        (self.workdir / METRICS_FILE).write_text('{"step": 3, "seconds": 1000.0}\n')
        self._run(range(4, 5), from_step=4)
        self.assertBetween(self._records()[1]["seconds"], 1000, 1100)

    def test_starting_anew_leaves_nothing_of_the_run_before(self):
        self._run(range(8))
        self._run(range(1))
        self.assertLen(self._records(), 1)

    def test_a_torn_last_line_is_dropped(self):
        self._run(range(3))
        path = self.workdir / METRICS_FILE
        path.write_text(path.read_text()[:-9])
        self._run(range(3, 5), from_step=3)
        self.assertEqual([record["step"] for record in self._records()], [0, 1, 3, 4])

    def test_a_line_that_is_not_json_is_reported_with_its_place(self):
        self._run(range(3))
        path = self.workdir / METRICS_FILE
        path.write_text("hello\n" + path.read_text())
        with self.assertRaisesRegex(DataError, "line 1 of .*metrics.jsonl is not JSON"):
            MetricLog(self.workdir, from_step=3)

    def test_a_run_that_fails_still_records_its_last_step(self):
        with self.assertRaises(TrainingFailedError), MetricLog(self.workdir) as log:
            log.write(0, {"loss/train": jnp.float32(jnp.nan)})
            raise TrainingFailedError("the loss is not finite")
        self.assertIsNone(self._records()[0]["loss/train"])

    def test_an_unexpected_error_gives_up_what_was_not_fetched(self):
        with self.assertRaises(ZeroDivisionError), MetricLog(self.workdir) as log:
            log.write(0, {"loss/train": 1.0})
            log.write(1, {"loss/train": 2.0})
            raise ZeroDivisionError
        self.assertLen(self._records(), 1)

    def test_tensorboard_gets_scalars_and_histograms(self):
        self._run(range(2))
        (events,) = (self.workdir / TENSORBOARD_FOLDER).iterdir()
        self.assertIn(b"loss/train", events.read_bytes())
        self.assertIn(b"layers/max_logit", events.read_bytes())


if __name__ == "__main__":
    absltest.main()
