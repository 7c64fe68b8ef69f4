import functools
import math

import jax
import numpy as np
from absl.testing import absltest

from kimi_jax.configs.quantization import WeightFormat
from kimi_jax.data.batches import FIELDS, Batch, pad_batch
from kimi_jax.data.device_feed import put_batch
from kimi_jax.data.pipeline import HeldOut
from kimi_jax.evaluation.perplexity import HeldOutEvaluation
from kimi_jax.model import transformer
from kimi_jax.parallel.rules import BATCH
from tests.support import tiny

_QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time
NUM_BYTES = 1000
ROWS = 8
TOLERANCE = 2e-6  # relative; float32 sums of some hundred tokens


def _part(start, stop):
    whole = tiny.host_batch(rows=ROWS)
    return Batch(**{name: getattr(whole, name)[start:stop] for name in FIELDS})


def _held_out(*batches):
    return HeldOut(
        batches=batches,
        num_documents=2 * ROWS,
        num_tokens=ROWS * tiny.LENGTH,
        num_bytes=NUM_BYTES,
        unigram_bits_per_byte=8.0,
        gzip_bits_per_byte=8.0,
    )


class PerplexityTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.mesh = tiny.mesh(2, 2)
        cls.enterClassContext(jax.set_mesh(cls.mesh))
        cls.params = tiny.parameters(cls.mesh)

    def _measure(self, *batches):
        evaluate = HeldOutEvaluation(_held_out(*batches), self.mesh)
        return evaluate(self.params, tiny.experiment())

    def test_it_is_the_sum_over_the_logits_of_all_tokens(self):
        host = _part(0, ROWS)
        config = tiny.experiment()

        @functools.partial(jax.jit, compiler_options=_QUICK)
        def logits(batch):
            hidden, _ = transformer.forward(
                self.params,
                batch.inputs,
                batch.positions,
                batch.segments,
                config=config.model,
                choices=config.compute,
            )
            return transformer.logits(
                self.params, hidden, config=config.model, choices=config.compute
            )

        z = np.asarray(logits(put_batch(host, jax.NamedSharding(self.mesh, BATCH))), np.float64)
        z -= z.max(axis=-1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        nats = -np.take_along_axis(log_p, host.targets[..., None], axis=-1)[..., 0] * host.weights
        measured = self._measure(host)
        np.testing.assert_allclose(
            measured["eval/loss"], nats.sum() / host.weights.sum(dtype=np.float64), rtol=TOLERANCE
        )
        np.testing.assert_allclose(
            measured["eval/bits_per_byte"], nats.sum() / math.log(2) / NUM_BYTES, rtol=TOLERANCE
        )

    def test_neither_the_batch_size_nor_padding_matters(self):
        whole = self._measure(_part(0, ROWS))
        padded = self._measure(pad_batch(_part(0, 5), ROWS, 7), pad_batch(_part(5, ROWS), ROWS, 63))
        small = self._measure(_part(0, 4), _part(4, ROWS))
        for other in (padded, small):
            for name, value in whole.items():
                np.testing.assert_allclose(other[name], value, rtol=TOLERANCE)

    def test_a_run_that_rounds_is_measured_with_rounded_weights(self):
        options = {"format": WeightFormat.INT4, "group_size": 8}
        evaluate = HeldOutEvaluation(_held_out(_part(0, ROWS)), self.mesh)
        rounded = evaluate(self.params, tiny.experiment(quantization=options))["eval/loss"]
        on_grid = jax.jit(functools.partial(tiny.round_experts, group_size=8))(self.params)
        same = evaluate(on_grid, tiny.experiment())["eval/loss"]
        np.testing.assert_allclose(rounded, same, rtol=TOLERANCE)
        unrounded = evaluate(self.params, tiny.experiment())["eval/loss"]
        self.assertGreater(abs(unrounded / rounded - 1), 100 * TOLERANCE)


if __name__ == "__main__":
    absltest.main()
