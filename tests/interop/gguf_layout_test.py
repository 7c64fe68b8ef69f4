import collections
import dataclasses
import math

import gguf
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.model import YarnConfig
from kimi_jax.core.errors import ConfigError
from kimi_jax.core.param_spec import count_parameters
from kimi_jax.interop.gguf_layout import check_readable, gguf_tensors
from kimi_jax.model import transformer
from tests.support import published

TINY = presets.tiny(vocab_size=64)
MOONLIGHT_LIKE = dataclasses.replace(TINY, q_latent_dim=None)


def gguf_name(name, config):
    """What the format's own table calls a published tensor."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_layers)
    for expert in range(config.num_routed_experts):
        name = name.replace(f"experts.{expert}.", "experts.")
    if name.endswith("_bias"):
        return table.get_name(name.removesuffix("_bias")) + ".bias"
    return table.get_name(name.removesuffix(".weight")) + ".weight"


class GgufLayoutTest(parameterized.TestCase):
    @parameterized.parameters(TINY, MOONLIGHT_LIKE)
    def test_names_are_those_of_the_formats_own_table(self, config):
        found = {tensor.name for tensor in gguf_tensors(config)}
        expected = {gguf_name(name, config) for name in published.shapes(config)}
        for layer in range(config.num_layers):
            expected -= {f"blk.{layer}.attn_kv_b.weight"}
            expected |= {f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight"}
        self.assertEqual(found, expected)

    @parameterized.parameters(TINY, MOONLIGHT_LIKE)
    def test_every_published_row_is_written_once(self, config):
        rows = collections.Counter()
        for tensor in gguf_tensors(config):
            for piece in tensor.pieces:
                rows.update((piece.name, i) for i in range(piece.rows.start, piece.rows.stop))
        shapes = published.shapes(config)
        self.assertEqual(
            rows, {(name, i): 1 for name, shape in shapes.items() for i in range(shape[0])}
        )

    def test_kimi_k2_has_as_many_tensors_as_its_known_conversions_and_all_its_parameters(self):
        config = presets.kimi_k2()
        tensors = list(gguf_tensors(config))
        self.assertLen(tensors, 1096)
        self.assertEqual(
            sum(math.prod(tensor.shape) for tensor in tensors),
            count_parameters(transformer.specs(config)),
        )

    @parameterized.parameters(
        presets.kimi_k2(),
        presets.kimi_k2_thinking(),
        presets.moonlight_16b(),
        presets.deepseek_v3(),
        TINY,
    )
    def test_published_models_are_readable(self, config):
        check_readable(config)

    @parameterized.named_parameters(
        ("query_latent", {"num_layers": 27}, "27 layers"),
        ("query_latent_of_kanana", {"num_layers": 48, "vocab_size": 128_256}, "48 layers"),
        ("no_shared_expert", {"num_shared_experts": 0}, "num_shared_experts"),
        ("layers", {"num_layers": 513}, "num_layers is 513"),
        ("one_expert", {"num_routed_experts": 1, "experts_per_token": 1}, "num_routed_experts 1"),
        ("many_experts", {"num_routed_experts": 1025}, "num_routed_experts 1025"),
    )
    def test_models_that_llama_cpp_refuses_are_refused(self, changes, message):
        with self.assertRaisesRegex(ConfigError, message):
            check_readable(dataclasses.replace(TINY, **changes))

    @parameterized.parameters(
        {"factor": 0.5},
        {"factor": 8.0, "mscale": 0.707},
        {"factor": 8.0, "mscale": 0.0, "mscale_all_dim": 0.0},
    )
    def test_yarn_that_llama_cpp_computes_differently_is_refused(self, **options):
        yarn = YarnConfig(original_max_position=64, **options)
        with self.assertRaisesRegex(ConfigError, "YaRN"):
            check_readable(dataclasses.replace(TINY, yarn=yarn))

    def test_layers_of_dense_models_need_no_shared_expert(self):
        check_readable(dataclasses.replace(TINY, num_dense_layers=4, num_shared_experts=0))


if __name__ == "__main__":
    absltest.main()
