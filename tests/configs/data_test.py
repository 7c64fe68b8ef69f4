import dataclasses

from absl.testing import absltest, parameterized

from kimi_jax.configs.data import (
    DataConfig,
    SourceConfig,
    SourceKind,
    TokenizerConfig,
    TokenizerKind,
)
from kimi_jax.core.errors import ConfigError


class DataConfigTest(parameterized.TestCase):
    def test_default_is_the_embedded_corpus_as_bytes(self):
        config = DataConfig(sequence_length=64)
        self.assertEqual(config.tokenizer.kind, TokenizerKind.BYTES)
        self.assertEqual(
            {name: source.kind for name, source in config.sources.items()},
            {"embedded": SourceKind.EMBEDDED},
        )

    def test_sources_cannot_be_changed_after_the_config_was_built(self):
        given = {"mine": SourceConfig()}
        config = DataConfig(sequence_length=64, sources=given)
        given["other"] = SourceConfig()
        self.assertEqual(list(config.sources), ["mine"])
        with self.assertRaises(TypeError):
            config.sources["other"] = SourceConfig()

    def test_equal_configs_are_equal_and_have_equal_hashes(self):
        first, second = DataConfig(sequence_length=64), DataConfig(sequence_length=64)
        self.assertEqual(first, second)
        self.assertEqual(hash(first), hash(second))
        self.assertNotEqual(first, dataclasses.replace(first, seed=1))

    @parameterized.parameters(
        ({"sequence_length": 0}, "data.sequence_length"),
        ({"seed": -1}, "data.seed"),
        ({"held_out_fraction": 1.0}, "data.held_out_fraction"),
        ({"held_out_max_bytes": 0}, "data.held_out_max_bytes"),
        ({"train_max_bytes": 0}, "data.train_max_bytes"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"prefetch": 0}, "data.prefetch"),
        ({"sources": {}}, "data.sources"),
        ({"sources": {"": SourceConfig()}}, "data.sources"),
    )
    def test_wrong_option_is_named(self, options, message):
        with self.assertRaisesRegex(ConfigError, message):
            DataConfig(**{"sequence_length": 64, **options})


class SourceConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"kind": SourceKind.JSONL}, "needs data.sources.*.path"),
        ({"path": "a"}, "data.sources.*.path must be None"),
        ({"weight": 0.0}, "data.sources.*.weight"),
        ({"text_field": "content"}, "data.sources.*.text_field"),
        ({"suffixes": (".py",)}, "data.sources.*.suffixes"),
        ({"kind": SourceKind.TEXT, "path": "a", "suffixes": ("py",)}, "start with a dot"),
    )
    def test_wrong_option_is_named(self, options, message):
        with self.assertRaises(ConfigError) as caught:
            SourceConfig(**options)
        self.assertIn(message, str(caught.exception))


class TokenizerConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"kind": TokenizerKind.FILE}, "needs data.tokenizer.path"),
        ({"kind": TokenizerKind.KIMI}, "needs data.tokenizer.path"),
        ({"path": "a"}, "data.tokenizer.path must be None"),
        ({"kind": TokenizerKind.BPE}, "data.tokenizer.vocab_size of at least 259"),
        ({"kind": TokenizerKind.BPE, "vocab_size": 258}, "got 258"),
        ({"vocab_size": 300}, "data.tokenizer.vocab_size must be None"),
    )
    def test_wrong_option_is_named(self, options, message):
        with self.assertRaises(ConfigError) as caught:
            TokenizerConfig(**options)
        self.assertIn(message, str(caught.exception))


if __name__ == "__main__":
    absltest.main()
