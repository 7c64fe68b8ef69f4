import jax
from absl.testing import absltest, parameterized

from kimi_jax.analysis import memory
from kimi_jax.analysis.step_report import shard_bytes
from kimi_jax.configs.compute import ComputeDtype, Remat, ResidualFormat
from kimi_jax.configs.quantization import Quantize, WeightFormat
from kimi_jax.model import transformer
from kimi_jax.training.state import abstract_state
from kimi_jax.training.step import make_optimizer
from tests.support import tiny


def _terms(config, data=2, expert=4, **others):
    terms = memory.estimate(config, memory.mesh_sizes(data, expert, **others))
    return {term.name: term.bytes for term in terms}


class MemoryTest(parameterized.TestCase):
    @parameterized.parameters((1, 1, 1), (2, 4, 1), (8, 1, 1), (2, 2, 2))
    def test_parameters_and_optimizer_are_those_of_the_real_state(self, data, expert, pipe):
        config = tiny.experiment()
        mesh = tiny.mesh(data, expert, pipe=pipe)
        with jax.set_mesh(mesh):
            plan = transformer.specs(config.model)
            state = abstract_state(config, plan, make_optimizer(config, plan), mesh)
        terms = _terms(config, data, expert, pipe=pipe)
        self.assertEqual(terms["parameters"], shard_bytes(state.params))
        # The state has scalars, counters and norms, too.
        small = shard_bytes(state.optimizer) - terms["optimizer state"]
        self.assertBetween(small, 0, 200)

    def test_full_remat_keeps_the_input_of_each_layer(self):
        config = tiny.experiment(compute={"remat": Remat.FULL})
        tokens = tiny.NUM_ROWS * tiny.LENGTH // 8
        kept = _terms(config)["activations kept for the backward pass"]
        self.assertEqual(kept, 4 * tokens * config.model.embed_dim * config.model.num_layers)

    @parameterized.parameters(Remat.K2, Remat.NONE)
    def test_fp8_residuals_take_a_byte_a_value_and_a_float32_for_128(self, remat):
        def kept(residuals):
            compute = {"remat": remat, "feed_forward_residuals": residuals}
            config = tiny.experiment(compute=compute, model={"expert_ffn_dim": 144})
            return _terms(config, 8, 1)["activations kept for the backward pass"]

        tokens, model = tiny.NUM_ROWS * tiny.LENGTH // 8, tiny.MODEL
        rows = tokens * model.experts_per_token
        # One dense layer of width 48; two mixtures with a shared expert.
        codes = tokens * 2 * 48 + 2 * (tokens * 2 * 144 + rows * (model.embed_dim + 2 * 144))
        scales = tokens * 2 + 2 * (tokens * 2 * 2 + rows * (1 + 2 * 2))
        # Without remat the estimate has no rows, but SwiGLU's results.
        without_remat = tokens * 3 * 48 + 2 * 3 * 144 * (tokens + rows)
        replaced = {Remat.K2: codes, Remat.NONE: without_remat}[remat]
        saved = kept(ResidualFormat.COMPUTE) - kept(ResidualFormat.FP8)
        self.assertEqual(saved, 4 * replaced - codes - 4 * scales)

    def test_a_pipeline_keeps_the_inputs_of_its_idle_ticks_and_its_layers_gradients(self):
        config = tiny.experiment(compute={"remat": Remat.FULL})
        alone, piped = _terms(config), _terms(config, expert=2, pipe=2)
        kept = "activations kept for the backward pass"
        layers = config.model.num_layers
        self.assertEqual(piped[kept], alone[kept] * (layers + 1) // layers)
        row = "pipeline: gradients of stages, micro-batches in line"
        self.assertNotIn(row, alone)
        # Of two micro-batches those that wait and those that are finished, and their gradients.
        queues = 4 * 2 * (tiny.NUM_ROWS * tiny.LENGTH // 8) * config.model.embed_dim
        of_stage = piped["gradients"] - piped["gradients while layers run"]
        self.assertGreater(of_stage, 0)
        self.assertEqual(piped[row], 4 * queues + of_stage)

    def test_codes_take_four_and_a_half_bits_and_the_place_of_the_cast(self):
        bfloat16 = {"compute": {"dtype": ComputeDtype.BFLOAT16}}
        plain = _terms(tiny.experiment(**bfloat16))
        options = {"format": WeightFormat.INT4, "group_size": 8}
        rounded = _terms(tiny.experiment(quantization=options, **bfloat16))
        values = 2 * 3 * 8 * 32 * 16 // 8  # two mixtures, three matrices each, on 8 devices
        row, cast = "codes and scales of quantised weights", "layers' weights in the compute dtype"
        self.assertNotIn(row, plain)
        self.assertEqual(rounded[row], values * (4 / 8 + 2 / 8))
        self.assertEqual(plain[cast] - rounded[cast], 2 * values)
        on_use = tiny.experiment(quantization=options | {"quantize": Quantize.USE}, **bfloat16)
        self.assertEqual(_terms(on_use), plain)

    def test_micro_batches_divide_activations_and_double_gradients(self):
        one = _terms(tiny.experiment(compute={"remat": Remat.FULL}))
        four = _terms(
            tiny.experiment(compute={"remat": Remat.FULL}, training={"accumulation_steps": 4})
        )
        kept = "activations kept for the backward pass"
        self.assertEqual(four[kept], one[kept] // 4)
        self.assertEqual(four["gradients"], 2 * one["gradients"])

    def test_the_peak_is_state_and_the_larger_phase(self):
        terms = (
            memory.Term("state", (memory.STATE,), 10),
            memory.Term("a", (memory.LAYERS, memory.LOSS), 3),
            memory.Term("b", (memory.LAYERS,), 4),
            memory.Term("c", (memory.LOSS,), 2),
            memory.Term("d", (memory.UPDATE,), 6),
        )
        self.assertEqual(memory.peak(terms), 17)

    def test_less_memory_needs_a_larger_mesh_and_too_little_none(self):
        config = tiny.experiment()
        alone = memory.peak(memory.estimate(config, memory.mesh_sizes(1, 1)))
        self.assertEqual(memory.smallest_mesh(config, 2 * alone)[0], 1)
        self.assertGreater(memory.smallest_mesh(config, alone // 2)[0], 1)
        self.assertIsNone(memory.smallest_mesh(config, 1000))


if __name__ == "__main__":
    absltest.main()
