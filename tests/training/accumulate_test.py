import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding

from kimi_jax.analysis.compiled_program import read_program
from kimi_jax.model.stats import ModelStats
from kimi_jax.parallel.rules import TOKENS
from kimi_jax.training.accumulate import accumulate, split_micro_batches
from tests.support import tiny

# float32 sums of 32 x 32 terms in another order.
TOLERANCE = 1e-5
COUNT = 4


def _losses(params, batch):
    return (batch.inputs * params["slope"] + params["start"] - batch.targets) ** 2


def _share(params, micro_batch, total_weight):
    """A line fitted to the tokens: small, but with weights and statistics like the model's."""
    loss = jnp.sum(_losses(params, micro_batch) * micro_batch.weights) / total_weight
    stats = ModelStats(
        max_logit=jnp.max(micro_batch.inputs).astype(jnp.float32)[None, None],
        expert_load=jnp.sum(micro_batch.inputs).astype(jnp.float32)[None, None],
        dropped=jnp.zeros(()),
        balance_loss=jnp.sum(micro_batch.weights),
    )
    return loss, ({"loss/train": loss}, stats)


def _exact(params, micro_batch, total_weight):
    return _share(params, micro_batch, total_weight)


def _mean_of_means(params, micro_batch, total_weight):
    del total_weight
    return _share(params, micro_batch, COUNT * jnp.sum(micro_batch.weights))


def _compile(share, count, mesh):
    params = {"slope": jnp.float32(0.5), "start": jnp.float32(1.0)}

    @jax.jit
    def run(params, batch):
        total = jnp.sum(batch.weights)
        return accumulate(share, params, split_micro_batches(batch, count), total)

    with jax.set_mesh(mesh):
        batch = tiny.batch(mesh)
        return run.lower(params, batch).compile(), (params, batch)


def _run(share, count, **axes):
    mesh = tiny.mesh(**{"data": 1, "expert": 1} | axes)
    with jax.set_mesh(mesh):
        compiled, arguments = _compile(share, count, mesh)
        return jax.device_get(compiled(*arguments))


class AccumulateTest(parameterized.TestCase):
    def test_gradients_and_loss_are_those_of_the_whole_batch(self):
        gradients, parts, _ = _run(_exact, COUNT)
        batch = tiny.host_batch()
        x, y, w = (
            np.asarray(part, np.float64) for part in (batch.inputs, batch.targets, batch.weights)
        )
        error = 0.5 * x + 1.0 - y
        expected = {
            "slope": np.sum(2 * error * x * w) / w.sum(),
            "start": np.sum(2 * error * w) / w.sum(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(gradients[name], value, rtol=TOLERANCE)
        np.testing.assert_allclose(
            parts["loss/train"], np.sum(error**2 * w) / w.sum(), rtol=TOLERANCE
        )

    def test_the_mean_of_micro_batch_means_is_something_else(self):
        exact, _, _ = _run(_exact, COUNT)
        faulty, _, _ = _run(_mean_of_means, COUNT)
        self.assertGreater(abs(faulty["slope"] / exact["slope"] - 1), 100 * TOLERANCE)

    def test_maxima_stay_maxima_and_counts_are_added(self):
        batch = tiny.host_batch()
        for count in (1, COUNT):
            _, _, stats = _run(_exact, count)
            self.assertEqual(stats.max_logit[0, 0], batch.inputs.max())
            self.assertEqual(stats.expert_load[0, 0], batch.inputs.sum())
            np.testing.assert_allclose(stats.balance_loss, batch.weights.sum(), rtol=TOLERANCE)

    def test_replicas_add_up_what_the_whole_batch_has(self):
        got = _run(_exact, COUNT, data=2, expert=2, replica=2)
        chex.assert_trees_all_close(got, _run(_exact, 1), rtol=TOLERANCE)

    def test_replicas_exchange_nothing_until_the_last_micro_batch(self):
        mesh = tiny.mesh(data=2, expert=2, replica=2)
        runs = {}
        for count in (1, COUNT):
            text = _compile(_exact, count, mesh)[0].as_text()
            collectives = read_program(text, mesh.shape).collectives
            runs[count] = sum(c.count for c in collectives if "replica" in c.axes)
        self.assertGreater(runs[1], 0)
        self.assertEqual(runs[1], runs[COUNT])

    @parameterized.parameters({"expert": 4}, {"expert": 2, "context": 2})
    def test_a_micro_batch_takes_every_nth_row_and_stays_on_its_devices(self, **axes):
        mesh = tiny.mesh(2, **axes)
        with jax.set_mesh(mesh):
            batch = tiny.batch(mesh)
            micro = jax.jit(lambda b: split_micro_batches(b, COUNT))(batch)
        rows = tiny.NUM_ROWS // COUNT
        self.assertEqual(micro.inputs.shape, (COUNT, rows, tiny.LENGTH))
        host = np.asarray(batch.inputs)
        for index in range(COUNT):
            np.testing.assert_array_equal(micro.inputs[index], host[index::COUNT])
        before = NamedSharding(mesh, TOKENS).devices_indices_map(host.shape)
        owners = {
            (row, position): device
            for device, (some_rows, some) in before.items()
            for row in range(*some_rows.indices(len(host)))
            for position in range(*some.indices(tiny.LENGTH))
        }
        for shard in micro.inputs.addressable_shards:
            spans = zip(shard.index, micro.inputs.shape, strict=True)
            parts = [range(*span.indices(size)) for span, size in spans]
            for index, row, position in itertools.product(*parts):
                self.assertEqual(owners[row * COUNT + index, position], shard.device)


if __name__ == "__main__":
    absltest.main()
