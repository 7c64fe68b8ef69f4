"""Published weights go into a run, and come out of its checkpoint as they were."""

import pathlib
import shutil
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.interop.stored_parameters import stored_parameters
from kimi_jax.pretrain import pretrain
from kimi_jax.training import phases, throughput
from kimi_jax.training.checkpoint import newest_state
from tests.support import published, tiny


def _idle_step(state, batch):
    """Stands for the compiled step: learns nothing."""
    del batch
    metrics = {"loss/train": jnp.float32(1.0), "optimizer/gradient_norm": jnp.float32(1.0)}
    return state.replace(step=state.step + 1), metrics


class InitialWeightsTest(absltest.TestCase):
    def test_a_run_starts_from_published_weights_and_keeps_what_it_does_not_train(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        tiny.write_corpus(folder / "corpus")
        config = tiny.text_experiment(
            folder,
            data={"held_out_fraction": 0.0},
            parallel={"data": 2, "expert": 4},
            training={"num_steps": 1, "initial_weights": str(folder / "weights")},
        )
        published.export(folder / "weights", config.model)
        peak = mock.patch.object(throughput, "measure_matmul_peak", lambda dtype: 1e9)
        step = mock.patch.object(phases, "compile_train_step", lambda *arguments: _idle_step)
        with peak, step:
            pretrain(config, folder / "run")
            shutil.rmtree(folder / "weights")
            pretrain(config, folder / "run")  # goes on without them
        kept = stored_parameters(newest_state(folder / "run"), config.model, prefix="params.")
        source = published.RandomSource(config.model)
        for name, expected in source.tensors.items():
            found = kept.rows(name, slice(0, expected.shape[0]))
            np.testing.assert_array_equal(found, expected.astype(np.float32), err_msg=name)


if __name__ == "__main__":
    absltest.main()
