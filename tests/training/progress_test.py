import io
from unittest import mock

from absl.testing import absltest
from rich.console import Console

from kimi_jax.training import progress

_METRICS = {
    "loss/train": 3.25,
    "eval/bits_per_byte": 1.75,
    "optimizer/learning_rate": 2e-4,
    "qk_clip/max_logit": 99.5,
    "qk_clip/heads_clipped": 7.0,
    "throughput/tokens_per_second": 4213.0,
    "throughput/share_of_peak": 0.314,
    "memory/bytes_in_use": 1.5 * 2**30,
    "time/seconds_left": 3723.0,
}
_SHOWN = ("loss 3.2500", "1.7500", "2.00e-04", "99.5", "heads clipped 7", "tokens/s 4,213",
          "31.4 %", "1.50 GiB", "left 1:02:03")  # fmt: skip


def _file_console():
    return Console(file=io.StringIO(), width=100)


class ProgressTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.console = _file_console()
        self.now = 0.0
        clock = mock.patch.object(progress.time, "monotonic", lambda: self.now)
        clock.start()
        self.addCleanup(clock.stop)

    def _lines(self):
        return self.console.file.getvalue().splitlines()

    def test_a_log_file_gets_a_line_with_every_value_and_the_time_left(self):
        with progress.Progress(10, console=self.console) as shown:
            self.now = 61.0
            shown.update(0, _METRICS)
        (line,) = self._lines()
        for text in ("step 1/10", "elapsed 0:01:01", *_SHOWN):
            self.assertIn(text, line)

    def test_a_log_file_gets_the_first_step_one_line_in_ten_seconds_and_the_last_step(self):
        with progress.Progress(40, console=self.console) as shown:
            for step in range(40):
                self.now += 0.5
                shown.update(step, {"loss/train": 1.0})
        steps = [line.split(",")[0] for line in self._lines()]
        self.assertEqual(steps, ["step 1/40", "step 21/40", "step 40/40"])

    def test_absent_metrics_are_left_out_and_earlier_ones_remembered(self):
        with progress.Progress(10, console=self.console, line_seconds=0.0) as shown:
            shown.update(0, {"eval/bits_per_byte": 2.5})
            shown.update(1, {"loss/train": 1.0})
        self.assertNotIn("loss", self._lines()[0])
        self.assertIn("held-out bits/byte 2.5000", self._lines()[1])
        self.assertNotIn("left", self._lines()[1])

    def test_nothing_is_shown_before_metrics_were_fetched(self):
        with progress.Progress(10, console=self.console) as shown:
            shown.update(None, {})
        self.assertEmpty(self._lines())

    def test_a_terminal_shows_the_same_values_in_place(self):
        self.console = Console(
            file=io.StringIO(), force_terminal=True, width=100, color_system=None
        )
        with progress.Progress(10, console=self.console) as shown:
            shown.update(4, _METRICS)
            shown.note("saved checkpoint 5")
        written = self.console.file.getvalue()
        for text in ("step 5 of 10", "3.2500", "1:02:03", "saved checkpoint 5"):
            self.assertIn(text, written)

    def test_an_endless_time_left_is_a_question_mark(self):
        self.assertEqual(progress.clock(float("nan")), "?")
        self.assertEqual(progress.clock(float("inf")), "?")
        self.assertEqual(progress.clock(59.6), "0:01:00")

    def test_the_banner_shows_every_row_and_takes_brackets_literally(self):
        progress.print_banner(
            "tiny run",
            {"Mesh": [("data", "4"), ("expert", "2")], "Optimizer": [("muon", "w[q]", "12")]},
            console=self.console,
        )
        written = self.console.file.getvalue()
        for text in ("tiny run", "Mesh", "expert", "Optimizer", "w[q]", "12"):
            self.assertIn(text, written)


if __name__ == "__main__":
    absltest.main()
