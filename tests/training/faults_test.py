import os
import signal

from absl.testing import absltest, parameterized

from kimi_jax.core.errors import TrainingFailedError
from kimi_jax.training import faults
from tests.support import tiny


class FaultsTest(parameterized.TestCase):
    @parameterized.product(
        name=("loss/train", "optimizer/gradient_norm"),
        value=(float("nan"), float("inf"), float("-inf")),
    )
    def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(self, name, value):
        with self.assertRaisesRegex(TrainingFailedError, f"{name} became .* at step 7"):
            faults.check(7, {"loss/train": 1.0, "optimizer/gradient_norm": 1.0, name: value})

    def test_finite_and_absent_numbers_pass(self):
        faults.check(7, {"loss/train": 1e30, "qk_clip/max_logit": float("-inf")})
        faults.check(None, {})

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM)
    def test_a_signal_is_only_noted_and_the_handler_comes_back(self, number):
        before = signal.getsignal(number)
        with faults.StopRequest(tiny.mesh(2, 4)) as stop:
            self.assertIsNone(stop.agreed())
            os.kill(os.getpid(), number)
            self.assertEqual(stop.agreed(), number.name)
            self.assertEqual(signal.getsignal(number), before)
        self.assertEqual(signal.getsignal(number), before)

    def test_a_second_interrupt_acts_at_once(self):
        # What Python does by default, even where the shell that started it ignores interrupts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with self.assertRaises(KeyboardInterrupt), faults.StopRequest(tiny.mesh(1, 1)):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    absltest.main()
