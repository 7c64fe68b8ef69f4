import pathlib
import signal
import tempfile

from absl.testing import absltest

from tests.support import program, tiny

NUM_STEPS = 40
TRAINING = {
    "num_steps": NUM_STEPS,
    "batch_sequences": 4,
    "checkpoint_every": 5,
    "sample_tokens": 0,
}
# The run changes its program on the way.
INT4 = (
    "--config.quantization.format=int4",
    "--config.quantization.group_size=8",
    f"--config.quantization.start_step={NUM_STEPS // 2}",
)


class ResumeTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        tiny.write_corpus(self.folder / "corpus")
        self.config = program.write_config(
            self.folder,
            training=TRAINING,
            parallel={"data": 2, "expert": 2, "simulated_devices": 4},
        )

    def _start(self, workdir):
        return program.start_training(f"--config={self.config}", f"--workdir={workdir}", *INT4)

    def _finish(self, workdir):
        process = self._start(workdir)
        _, errors = process.communicate(timeout=300)
        self.assertEqual(process.returncode, 0, errors)
        return program.read_records(workdir)

    def test_a_killed_and_an_interrupted_run_go_on_bit_for_bit(self):
        whole = self._finish(self.folder / "whole")
        broken = self.folder / "broken"

        process = self._start(broken)
        program.wait_for_step(process, broken, 7)
        process.kill()
        process.communicate()
        written = len(program.read_records(broken))
        self.assertBetween(written, 8, NUM_STEPS - 10)

        process = self._start(broken)
        program.wait_for_step(process, broken, written + 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130, errors)
        message = errors.strip().splitlines()[-1]
        self.assertStartsWith(message, "stopped by SIGINT after step ")
        self.assertIn(str(broken), message)
        steps_done = len(program.read_records(broken))
        self.assertIn(f"after step {steps_done} of {NUM_STEPS}", message)
        self.assertLess(steps_done, NUM_STEPS)

        records = self._finish(broken)
        self.assertEqual([record["step"] for record in records], list(range(NUM_STEPS)))
        for name in ("loss/train", "optimizer/gradient_norm", "qk_clip/max_logit"):
            self.assertEqual([r[name] for r in records], [r[name] for r in whole], name)
        self.assertEqual(records[-1]["eval/loss"], whole[-1]["eval/loss"])
        self.assertLess(records[-1]["loss/train"], records[0]["loss/train"])


if __name__ == "__main__":
    absltest.main()
