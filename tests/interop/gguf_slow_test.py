"""What an unmodified llama.cpp makes of our files: log-probabilities and tokens."""

import dataclasses
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.configs.model import YarnConfig
from kimi_jax.data.bpe_tokenizer import load_bpe, train_bpe
from kimi_jax.data.kimi_tokenizer import load_kimi
from kimi_jax.interop.gguf import write_gguf
from kimi_jax.interop.gguf_encode import GgufType
from kimi_jax.interop.gguf_tokenizer import read_gguf_tokenizer
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import abstract_parameters
from tests.support import published, tiny

_PUBLISHED_TOKENIZER = pathlib.Path(__file__).parents[3] / "shared" / "data" / "kimi_k2"
_LENGTH = 128
_FLOAT32_CACHE = 0  # ggml's number of the format; a cache in float16 costs 2e-3
_TOLERANCE = 1e-3  # of log-probabilities, for float32; 5e-6 was measured
# Of the mean KL divergence; a fifth of each was measured. llama.cpp rounds activations to the
# format of the weights, which sends some tokens to other experts than ours go to.
_DIVERGENCES = {GgufType.F16: 1e-3, GgufType.BF16: 5e-3, GgufType.Q8_0: 3e-2, GgufType.Q4_0: 1e-3}

K2 = dataclasses.replace(presets.tiny(vocab_size=256), max_position=512)
_STEP = YarnConfig(factor=8.0, original_max_position=64, beta_fast=1.0, beta_slow=1.0)
MODELS = {
    "k2": K2,
    "heads_of_k2": dataclasses.replace(
        K2, kv_latent_dim=512, head_nope_dim=128, head_rope_dim=64, head_value_dim=128
    ),
    "expert_groups": dataclasses.replace(K2, num_expert_groups=4, expert_groups_per_token=2),
    "no_query_latent": dataclasses.replace(K2, q_latent_dim=None),
    # llama.cpp reads 27 layers in a way of their own. Every token goes to every expert: among so
    # many routers one meets a tie, which rounding breaks in one way here and in another there.
    "layers_of_moonlight": dataclasses.replace(
        K2, q_latent_dim=None, num_layers=27, num_routed_experts=4
    ),
    "yarn": dataclasses.replace(K2, yarn=dataclasses.replace(_STEP, beta_fast=32.0)),
    "yarn_with_k2s_betas": dataclasses.replace(K2, yarn=_STEP),
}
TEXTS = (
    "Hello, world! don't WE'LL go",
    "机器学习machine learning深度学习ABC 你好，世界！",
    "def f(x):\n    return x ** 2  # square\n\n\nprint(f(12345678))\t\n",
    "for (int i = 0; i < 10; ++i) { a[i] += b[i]; }\r\n",
    "1234567 3.14159, 2024-11-23",
    "camelCase HTTPServer iPhone",
    "  trailing   \n\n \t x",
    "naïve café e\u0301 Ελληνικά русский עברית العربية हिन्दी 漢字と仮名 한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "<|im_end|>[BOS]<think>",
    "",
)


def llama(file, **options):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the extra interop-test")
    return llama_cpp.Llama(str(file), verbose=False, n_threads=2, **options)


def their_log_probabilities(file, tokens, config):
    model = llama(
        file,
        logits_all=True,
        n_ctx=512,
        type_k=_FLOAT32_CACHE,
        type_v=_FLOAT32_CACHE,
        yarn_beta_fast=config.yarn.beta_fast if config.yarn else -1.0,
    )
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], np.float64)
    model.close()
    return np.asarray(jax.nn.log_softmax(logits))


def our_log_probabilities(source, tokens):
    config, mesh = source.config, tiny.mesh(1, 1)
    options = {"config": config, "choices": ComputeConfig(dtype=ComputeDtype.FLOAT32)}
    like = abstract_parameters(transformer.specs(config), mesh)
    params = published.transformer_params(source.tensors, config)
    params = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), params, like)
    ids = jnp.asarray([tokens])

    @jax.jit
    def run(params):
        positions, segments = jnp.arange(len(tokens))[None], jnp.ones_like(ids)
        hidden, _ = transformer.forward(params, ids, positions, segments, **options)
        return jax.nn.log_softmax(transformer.logits(params, hidden, **options))

    with jax.set_mesh(mesh):
        return np.asarray(run(params))[0]


@pytest.mark.slow
class LlamaCppSlowTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.tokens = np.random.default_rng(1).integers(0, K2.vocab_size, _LENGTH).tolist()

    def both(self, source, weight_type):
        file = self.folder / f"{weight_type.value}.gguf"
        write_gguf(file, source, None, weight_type=weight_type, identity="random")
        ours = our_log_probabilities(source, self.tokens)
        return ours, their_log_probabilities(file, self.tokens, source.config)

    @parameterized.parameters(*MODELS)
    def test_float32_gives_our_log_probabilities(self, name):
        ours, theirs = self.both(published.RandomSource(MODELS[name]), GgufType.F32)
        self.assertGreater(ours.std(), 0.5)
        np.testing.assert_allclose(theirs, ours, atol=_TOLERANCE, rtol=0)

    @parameterized.parameters(*_DIVERGENCES)
    def test_other_formats_stay_close(self, weight_type):
        source = published.RandomSource(K2, int4=weight_type is GgufType.Q4_0)
        ours, theirs = self.both(source, weight_type)
        divergence = (np.exp(ours) * (ours - theirs)).sum(axis=-1).mean()
        self.assertLess(divergence, _DIVERGENCES[weight_type])

    def write_with(self, tokenizer, vocab_size):
        config = dataclasses.replace(
            presets.tiny(vocab_size=vocab_size), embed_dim=32, num_layers=2
        )
        file = self.folder / "model.gguf"
        write_gguf(
            file,
            published.RandomSource(config),
            tokenizer,
            weight_type=GgufType.BF16,
            identity="random",
        )
        return llama(file, vocab_only=True)

    def assert_encodes_like(self, model, tokenizer):
        for text in TEXTS:
            found = model.tokenize(text.encode(), add_bos=False, special=False)
            self.assertEqual(found, tokenizer.encode(text), text)

    def test_text_becomes_the_ids_of_kimis_published_tokenizer(self):
        if not (_PUBLISHED_TOKENIZER / "tiktoken.model").is_file():
            self.skipTest("needs the published tokenizer")
        ours = load_kimi(str(_PUBLISHED_TOKENIZER))
        model = self.write_with(read_gguf_tokenizer(_PUBLISHED_TOKENIZER), ours.vocab_size)
        self.assert_encodes_like(model, ours)
        turn = "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
        names = ("<|im_user|>", "<|im_middle|>", "<|im_end|>", "<|im_assistant|>")
        found = model.tokenize(turn.encode(), special=True)
        self.assertContainsSubset({ours.specials[name] for name in names}, set(found))
        self.assertEqual(found[0], ours.specials["<|im_user|>"])  # no begin token before it
        self.assertEqual((model.token_bos(), model.token_eos()), (ours.bos_id, ours.eos_id))

    def test_text_becomes_the_ids_of_a_trained_tokenizer(self):
        file = self.folder / "tokenizer.json"
        train_bpe(TEXTS * 20, 400, file)
        (self.folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": "{{ messages[0]['content'] }}"})
        )
        ours = load_bpe(file)
        model = self.write_with(read_gguf_tokenizer(self.folder), ours.vocab_size)
        self.assert_encodes_like(model, ours)
        self.assertEqual(model.tokenize(b"x")[0], ours.bos_id)
        self.assertIn("messages[0]", model.metadata["tokenizer.chat_template"])


if __name__ == "__main__":
    absltest.main()
