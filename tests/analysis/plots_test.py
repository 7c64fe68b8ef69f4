import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.analysis import plots, style
from kimi_jax.analysis.report import FIGURES
from kimi_jax.analysis.run_log import RunLog, read_run
from tests.analysis import fake_run


def _run(metrics=(), layers=(), config=None):
    return RunLog(
        workdir=pathlib.Path("nowhere"),
        metrics=tuple(metrics),
        layers=tuple(layers),
        config=config or {},
        summary={},
    )


def _words(figure):
    axes = figure.axes
    legends = [axis.get_legend() for axis in axes if axis.get_legend()]
    texts = [text.get_text() for axis in axes for text in axis.texts]
    texts += [text.get_text() for legend in legends for text in legend.get_texts()]
    texts += [axis.get_title(loc=side) for axis in axes for side in ("left", "right")]
    return "\n".join(texts)


class PlotsTest(parameterized.TestCase):
    def _full(self):
        workdir = self.enterContext(tempfile.TemporaryDirectory())
        fake_run.write_run(workdir)
        return read_run(workdir)

    @parameterized.named_parameters((name, draw) for name, _, draw in FIGURES)
    def test_a_full_log_leaves_nothing_missing(self, draw):
        self.assertNotIn("not recorded", _words(draw(self._full())))

    @parameterized.named_parameters((name, draw) for name, _, draw in FIGURES)
    def test_an_empty_log_gives_a_figure_that_says_so(self, draw):
        self.assertIn("not recorded", _words(draw(_run())))

    def test_loss_shows_every_value_and_the_held_out_ones(self):
        run = self._full()
        (axis,) = plots.loss(run).axes
        every, _, held_out = axis.lines
        np.testing.assert_array_equal(every.get_ydata(), run.series("loss/train")[1])
        np.testing.assert_array_equal(held_out.get_ydata(), run.series("eval/loss")[1])

    def test_bits_per_byte_are_beside_byte_entropy_and_gzip(self):
        words = _words(plots.bits_per_byte(self._full()))
        self.assertIn("entropy of single bytes: 4.834", words)
        self.assertIn("gzip -9: 3.026", words)

    def test_the_heat_map_is_the_last_record_and_rings_the_heads_clipped(self):
        logits, clipped = [[9.0, 20.0, 30.0], [40.0, 50.0, 60.0]], [[0, 0, 1], [0, 1, 0]]
        run = _run(
            layers=[
                {"step": 0, "max_logit": [[0.0] * 3] * 2, "clipped_ever": [[0] * 3] * 2},
                {"step": 9, "max_logit": logits, "clipped_ever": clipped},
            ]
        )
        axis = plots.max_logit_heatmap(run).axes[0]
        np.testing.assert_array_equal(axis.images[0].get_array(), logits)
        np.testing.assert_array_equal(axis.collections[0].get_offsets(), [[2, 0], [1, 1]])

    def test_logits_over_time_have_a_line_a_layer_and_the_threshold(self):
        run = self._full()
        figure = plots.max_logit_over_time(run)
        self.assertLen(figure.axes[0].lines, fake_run.LAYERS + 1)
        self.assertIn("threshold 100", _words(figure))

    def test_expert_load_is_relative_to_an_even_one_and_counts_layers_from_the_first(self):
        load = [[10.0, 30.0], [20.0, 20.0]]
        run = _run(
            layers=[{"step": 0, "expert_load": load}], config={"model": {"num_dense_layers": 1}}
        )
        image = plots.expert_usage(run).axes[0].images[0]
        np.testing.assert_allclose(image.get_array(), [[0.5, 1.5], [1.0, 1.0]])
        self.assertEqual(tuple(image.get_extent()), (-0.5, 1.5, 2.5, 0.5))

    def test_values_that_are_not_finite_leave_a_gap(self):
        metrics = [{"step": s, "loss/train": None if s else 2.0} for s in range(3)]
        metrics[1]["throughput/share_of_peak"] = None
        layers = [{"step": 0, "max_logit": [[None, 1.0], [None, None]]}]
        run = _run(metrics, layers)
        for _, _, draw in FIGURES:
            draw(run)
        self.assertIn("not recorded: throughput/share_of_peak", _words(plots.throughput(run)))

    def test_smoothing_averages_evenly_around_each_value_and_skips_gaps(self):
        values = np.array([4.0, np.nan, 8.0, 0.0])
        np.testing.assert_allclose(style.smooth(values, 3), [4.0, 6.0, 4.0, 4.0])
        self.assertTrue(np.isnan(style.smooth(np.full(3, np.nan), 3)).all())


if __name__ == "__main__":
    absltest.main()
