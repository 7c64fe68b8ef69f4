import dataclasses
import pathlib

from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.hugging_face import model_config_from_hugging_face

# The released files are not part of the repository; they may lie beside it.
_RELEASED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "kimi_k2"


class PresetsTest(parameterized.TestCase):
    @parameterized.parameters(
        (presets.kimi_k2, "config.json"), (presets.kimi_k2_thinking, "k2_5_config.json")
    )
    def test_preset_is_the_released_configuration(self, preset, file):
        path = _RELEASED / file
        if not path.exists():
            self.skipTest(f"no {file} beside the repository")
        self.assertEqual(preset(), model_config_from_hugging_face(path))

    def test_thinking_differs_from_k2_in_context_and_epsilon_only(self):
        k2 = dataclasses.asdict(presets.kimi_k2())
        thinking = dataclasses.asdict(presets.kimi_k2_thinking())
        changed = {name for name in k2 if k2[name] != thinking[name]}
        self.assertEqual(changed, {"yarn", "max_position", "norm_eps"})

    def test_tiny_has_every_part_of_k2(self):
        tiny, k2 = presets.tiny(vocab_size=300), presets.kimi_k2()
        self.assertEqual(tiny.vocab_size, 300)
        for name in ("num_dense_layers", "num_shared_experts", "num_expert_groups", "rope_theta"):
            self.assertEqual(getattr(tiny, name), getattr(k2, name), name)
        self.assertIsNotNone(tiny.q_latent_dim)
        self.assertEqual((tiny.num_routed_experts, tiny.experts_per_token), (16, 4))


if __name__ == "__main__":
    absltest.main()
