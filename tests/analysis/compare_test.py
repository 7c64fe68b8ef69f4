import pathlib

import numpy as np
from absl.testing import absltest

from kimi_jax.analysis.compare import Across, curves
from kimi_jax.analysis.run_log import RunLog
from kimi_jax.core.errors import DataError
from tests.analysis import fake_run


def _run(config, steps=5):
    metrics = [{"step": s, "seconds": 2.0 * s, "loss/train": 6.0 - s} for s in range(steps)]
    return RunLog(
        workdir=pathlib.Path("nowhere"),
        metrics=tuple(metrics),
        layers=(),
        config=config,
        summary={},
    )


def _legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


class CurvesTest(absltest.TestCase):
    def test_runs_are_drawn_over_tokens_seen(self):
        figure = curves({"muon": _run(fake_run.CONFIG), "adamw": _run(fake_run.CONFIG, steps=3)})
        first, second = figure.axes[0].lines
        np.testing.assert_array_equal(first.get_xdata(), 2048 * np.arange(1, 6))
        np.testing.assert_array_equal(second.get_ydata(), [6, 5, 4])
        self.assertEqual(_legend(figure), ["muon", "adamw"])
        self.assertNotEqual(first.get_color(), second.get_color())

    def test_runs_may_be_drawn_over_seconds_and_steps(self):
        for across, expected in ((Across.SECONDS, [0, 2, 4]), (Across.STEPS, [0, 1, 2])):
            figure = curves({"muon": _run({}, steps=3)}, across=across)
            np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), expected)

    def test_lines_mark_values_and_positions(self):
        figure = curves(
            {"muon": _run(fake_run.CONFIG)}, horizontal={"target": 2.5}, vertical={"half": 4096.0}
        )
        _, horizontal, vertical = figure.axes[0].lines
        np.testing.assert_array_equal(horizontal.get_ydata(), [2.5, 2.5])
        np.testing.assert_array_equal(vertical.get_xdata(), [4096, 4096])
        texts = [text.get_text() for text in figure.axes[0].texts]
        self.assertEqual(texts, ["target", "half"])

    def test_a_run_without_the_metric_is_named_as_such(self):
        figure = curves({"muon": _run(fake_run.CONFIG)}, metric="eval/loss")
        self.assertEqual(_legend(figure), ["muon: not recorded"])

    def test_tokens_cannot_be_shown_without_the_config(self):
        with self.assertRaisesRegex(DataError, "draw it across steps"):
            curves({"muon": _run({})})


if __name__ == "__main__":
    absltest.main()
