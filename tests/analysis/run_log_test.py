import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from kimi_jax.analysis.run_log import read_run
from kimi_jax.core.errors import DataError
from tests.analysis import fake_run


class RunLogTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_a_scalar_comes_with_the_steps_that_recorded_it(self):
        fake_run.write_lines(
            self.workdir / "metrics.jsonl",
            [{"step": 3, "loss/train": 2.5}, {"step": 4, "loss/train": None, "eval/loss": 2}],
        )
        run = read_run(self.workdir)
        steps, values = run.series("loss/train")
        np.testing.assert_array_equal(steps, [3, 4])
        np.testing.assert_array_equal(values, [2.5, np.nan])
        np.testing.assert_array_equal(run.series("eval/loss")[0], [4])
        self.assertEmpty(run.series("loss/balance")[0])

    def test_arrays_are_stacked_over_steps(self):
        fake_run.write_run(self.workdir, steps=40)
        steps, values = read_run(self.workdir).arrays("max_logit")
        np.testing.assert_array_equal(steps, [0, 10, 20, 30])
        self.assertEqual(values.shape, (4, fake_run.LAYERS, fake_run.HEADS))

    def test_a_torn_last_line_is_left_out(self):
        path = self.workdir / "metrics.jsonl"
        path.write_text('{"step": 0, "loss/train": 1.0}\n{"step": 1, "loss/tr')
        np.testing.assert_array_equal(read_run(self.workdir).series("loss/train")[0], [0])

    def test_a_broken_line_is_reported_with_its_place(self):
        (self.workdir / "layers.jsonl").write_text('{"step": 0}\nhello\n{"step": 2}\n')
        with self.assertRaisesRegex(DataError, "line 2 of .*layers.jsonl is not JSON"):
            read_run(self.workdir)

    def test_an_empty_folder_is_an_empty_run_and_a_missing_one_an_error(self):
        run = read_run(self.workdir)
        self.assertEqual((run.metrics, run.layers, run.config, run.summary), ((), (), {}, {}))
        with self.assertRaisesRegex(DataError, "is not a folder"):
            read_run(self.workdir / "elsewhere")

    def test_settings_are_found_by_their_path(self):
        (self.workdir / "config.json").write_text(json.dumps(fake_run.CONFIG))
        run = read_run(self.workdir)
        self.assertEqual(run.setting("optimizer.update_rms"), 0.2)
        self.assertIsNone(run.setting("optimizer.update_rms.deeper"))
        self.assertEqual(run.setting("training.seed", 7), 7)
        self.assertEqual(run.tokens_per_step, 2048)


if __name__ == "__main__":
    absltest.main()
