from unittest import mock

from absl.testing import absltest

from kimi_jax.configs.quantization import WeightFormat
from kimi_jax.training import phases
from tests.support import tiny

_START = 3


class PhasesTest(absltest.TestCase):
    def _compile(self, config, first_step):
        """Programs are represented by whether they round, and listed as they are compiled."""
        compiled = []

        def compile_train_step(config, plan, mesh):
            compiled.append(config.quantization.enabled)
            return compiled[-1]

        with mock.patch.object(phases, "compile_train_step", compile_train_step):
            run = phases.compile_phases(config, None, tiny.mesh(1, 1), first_step=first_step)
        return run, compiled

    def test_a_run_changes_its_program_at_the_first_step_that_rounds(self):
        options = {"format": WeightFormat.INT4, "start_step": _START}
        config = tiny.experiment(quantization=options)
        program, compiled = self._compile(config, 0)
        self.assertCountEqual(compiled, [False, True])
        self.assertEqual([program(step) for step in range(4)], [False, False, False, True])

    def test_a_run_that_goes_on_after_that_step_compiles_once(self):
        options = {"format": WeightFormat.INT4, "start_step": _START}
        program, compiled = self._compile(tiny.experiment(quantization=options), _START)
        self.assertEqual(compiled, [True])
        self.assertTrue(program(_START))

    def test_a_run_that_rounds_nothing_compiles_once(self):
        program, compiled = self._compile(tiny.experiment(), 0)
        self.assertEqual(compiled, [False])
        self.assertFalse(program(2))


if __name__ == "__main__":
    absltest.main()
