import json
import pathlib
import signal
import socket
import tempfile
import time

import numpy as np
from absl.testing import absltest

from kimi_jax.parallel.watch import LOST_EXIT
from tests.support import program, tiny

NUM_STEPS = 12
SECTIONS = {
    "model": {"num_layers": 1, "num_dense_layers": 0},
    "training": {
        "num_steps": NUM_STEPS,
        "batch_sequences": 8,
        "checkpoint_every": 2,
        "sample_tokens": 1,
    },
    "parallel": {"data": 1, "expert": 8, "simulated_devices": 4},  # devices of one process
}
ALONE = "--config.parallel.simulated_devices=8"
COMPARED = ("loss/train", "optimizer/gradient_norm", "qk_clip/max_logit")
# Between processes an all-reduce adds float32 numbers in another order than within one: one unit in
# the last place of the loss after two steps, which training then magnifies.
ORDER_OF_SUMS = 1e-4
END_SECONDS = 60  # for a process that has lost another


def _first_line(file):
    return file.read_text().splitlines()[0]


class TwoProcessTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        tiny.write_corpus(cls.folder / "corpus")
        cls.config = program.write_config(cls.folder, **SECTIONS)
        cls.alone = cls.folder / "alone"
        process = program.start_training(f"--config={cls.config}", f"--workdir={cls.alone}", ALONE)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    def _start_two(self, workdir):
        with socket.create_server(("127.0.0.1", 0)) as free:
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        processes = [
            program.start_training(
                f"--config={self.config}",
                f"--workdir={workdir}",
                f"--coordinator={coordinator}",
                "--num_processes=2",
                f"--process_id={index}",
            )
            for index in range(2)
        ]
        for process in processes:
            self.enterContext(process)
            self.addCleanup(process.kill)
        return processes

    def _check_equals_the_run_of_one_process(self, workdir):
        expected, found = program.read_records(self.alone), program.read_records(workdir)
        self.assertEqual([record["step"] for record in found], list(range(NUM_STEPS)))
        for name in COMPARED:
            np.testing.assert_allclose(
                [r[name] for r in found], [r[name] for r in expected], ORDER_OF_SUMS, err_msg=name
            )
        np.testing.assert_allclose(found[-1]["eval/loss"], expected[-1]["eval/loss"], ORDER_OF_SUMS)
        # Before the first update nothing has been added up in another order but the loss.
        first, alone = (
            json.loads(_first_line(folder / "layers.jsonl")) for folder in (workdir, self.alone)
        )
        self.assertEqual(first, alone)
        np.testing.assert_allclose(found[0]["loss/train"], expected[0]["loss/train"], 1e-6)

    def _check_ends_when_the_other_is_killed(self, workdir, victim):
        processes = self._start_two(workdir)
        program.wait_for_step(processes[0], workdir, 3)
        processes[victim].kill()
        killed = time.monotonic()
        survivor = processes[1 - victim]
        _, errors = survivor.communicate(timeout=END_SECONDS)
        self.assertLess(time.monotonic() - killed, END_SECONDS)
        self.assertLess(len(program.read_records(workdir)), NUM_STEPS)
        host = socket.gethostname()
        self.assertRegex(
            errors, rf"PeerLostError: process {victim} \({host}\) was lost: it was killed"
        )
        self.assertIn("goes on from the last checkpoint", errors)
        return survivor

    def test_a_run_whose_first_process_is_killed_ends_clearly_and_goes_on_in_two(self):
        workdir = self.folder / "first_killed"
        self._check_ends_when_the_other_is_killed(workdir, victim=0)
        first, second = self._start_two(workdir)
        output, errors = first.communicate(timeout=300)
        self.assertEqual(first.returncode, 0, errors)
        self.assertIn("report", output)
        output, errors = second.communicate(timeout=60)
        self.assertEqual(second.returncode, 0, errors)
        self.assertNotIn("step", output)
        self.assertNotIn("report", output)
        self._check_equals_the_run_of_one_process(workdir)

    def test_a_run_whose_second_process_is_killed_or_stopped_goes_on_in_one(self):
        workdir = self.folder / "second_killed"
        survivor = self._check_ends_when_the_other_is_killed(workdir, victim=1)
        self.assertEqual(survivor.returncode, LOST_EXIT)

        processes = self._start_two(workdir)
        program.wait_for_step(processes[0], workdir, 5)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            _, errors = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 130, errors)
            steps_done = len(program.read_records(workdir))
            self.assertIn(f"stopped by SIGTERM after step {steps_done} of {NUM_STEPS}", errors)

        alone = program.start_training(f"--config={self.config}", f"--workdir={workdir}", ALONE)
        _, errors = alone.communicate(timeout=300)
        self.assertEqual(alone.returncode, 0, errors)
        self._check_equals_the_run_of_one_process(workdir)


if __name__ == "__main__":
    absltest.main()
