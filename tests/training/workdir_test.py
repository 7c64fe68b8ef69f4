import json
import pathlib
import tempfile
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from kimi_jax.core.errors import CheckpointMismatchError, ConfigError
from kimi_jax.training import workdir
from tests.support import tiny


class WorkdirTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "run"

    def _files(self):
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def test_the_configuration_is_written(self):
        workdir.claim(self.folder, tiny.experiment(), resume=True)
        written = json.loads((self.folder / "config.json").read_text())
        self.assertEqual(written["model"]["num_heads"], tiny.MODEL.num_heads)

    def test_another_configuration_is_refused_with_the_difference_and_nothing_is_touched(self):
        workdir.claim(self.folder, tiny.experiment(), resume=True)
        (self.folder / "metrics.jsonl").write_text("{}\n")
        before = self._files()
        other = tiny.experiment(model={"num_heads": 4}, training={"seed": 1, "log_every": 5})
        with self.assertRaises(CheckpointMismatchError) as caught:
            workdir.claim(self.folder, other, resume=True)
        lines = str(caught.exception).splitlines()[1:]
        self.assertEqual(lines, ["  model.num_heads: 2 -> 4", "  training.seed: 0 -> 1"])
        self.assertEqual(self._files(), before)

    @parameterized.parameters(
        {"training": {"log_every": 7, "checkpoint_every": 1, "checkpoints_to_keep": 9}},
        {"parallel": {"data": 2, "expert": 1}, "training": {"accumulation_steps": 2}},
        {"data": {"num_threads": 1, "prefetch": 9, "cache_dir": "elsewhere"}},
    )
    def test_what_does_not_change_the_result_may_differ(self, **sections):
        workdir.claim(self.folder, tiny.experiment(), resume=True)
        workdir.claim(self.folder, tiny.experiment(**sections), resume=True)

    def test_noresume_refuses_a_folder_with_a_run_and_touches_nothing(self):
        workdir.claim(self.folder, tiny.experiment(), resume=False)
        before = self._files()
        with self.assertRaisesRegex(CheckpointMismatchError, "--noresume"):
            workdir.claim(self.folder, tiny.experiment(), resume=False)
        self.assertEqual(self._files(), before)

    def test_a_damaged_configuration_file_is_named(self):
        workdir.claim(self.folder, tiny.experiment(), resume=True)
        (self.folder / "config.json").write_text("{")
        with self.assertRaisesRegex(CheckpointMismatchError, "config.json is not JSON"):
            workdir.claim(self.folder, tiny.experiment(), resume=True)

    @parameterized.parameters(
        (None, "process 1 does not see .*config.json.*must be the same folder on every host"),
        ({"training": {"log_every": 9}}, "other options.*\n  training.log_every: 9 -> 1"),
        ({}, None),
    )
    def test_another_process_checks_that_it_sees_and_runs_the_same(self, first, message):
        if first is not None:
            workdir.claim(self.folder, tiny.experiment(**first), resume=True)
        before = self._files()
        with mock.patch.object(jax, "process_index", return_value=1):
            if message is None:
                workdir.claim(self.folder, tiny.experiment(), resume=False)
            else:
                with self.assertRaisesRegex(ConfigError, message):
                    workdir.claim(self.folder, tiny.experiment(), resume=True)
        self.assertEqual(self._files(), before)

    def test_a_folder_that_cannot_be_made_is_named(self):
        self.folder.write_text("a file")
        with self.assertRaisesRegex(ConfigError, "cannot write to --workdir .*run"):
            workdir.claim(self.folder / "inside", tiny.experiment(), resume=True)


if __name__ == "__main__":
    absltest.main()
