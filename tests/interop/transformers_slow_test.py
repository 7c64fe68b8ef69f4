"""What the libraries that published checkpoints are made for read from ours.

Needs the extra `interop-test`.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import tempfile
import unittest

import jax
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.configs.hugging_face_export import FileFormat, to_hugging_face, with_quantization
from kimi_jax.configs.model import YarnConfig
from kimi_jax.configs.quantization import WeightFormat
from kimi_jax.core.param_spec import NORM, map_specs
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_export import export_hugging_face
from kimi_jax.interop.hf_import import import_parameters
from kimi_jax.interop.nnx_view import NnxView
from kimi_jax.interop.tensor_source import ParameterSource
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import abstract_parameters
from kimi_jax.quantization import int4
from kimi_jax.training import packed
from tests.support import tiny

_LIBRARIES = ("torch", "transformers", "compressed_tensors", "accelerate")
pytestmark = [
    pytest.mark.slow,
    # Those of the libraries are not ours to heed.
    pytest.mark.filterwarnings("ignore"),
]

# Latent norms have this epsilon in transformers, whatever config.json says.
_NORM_EPS = 1e-6
_GROUP = 32
_BLOCK = 128
_TOLERANCE = 1e-4  # of logits of order one, in float32 on both sides
_YARN = YarnConfig(factor=32.0, original_max_position=64, beta_fast=1.0, beta_slow=1.0)
# Matrices of several blocks of 128 whose last one is not whole, as that of K2's kv_a_proj.
_K2 = dataclasses.replace(
    tiny.MODEL,
    embed_dim=160,
    kv_latent_dim=160,
    expert_ffn_dim=32,
    routed_scaling_factor=2.827,
    yarn=_YARN,
    max_position=2048,
    norm_eps=_NORM_EPS,
)
_MOONLIGHT = dataclasses.replace(
    _K2, q_latent_dim=None, num_shared_experts=2, routed_scaling_factor=2.446, yarn=None
)
_DEEPSEEK = dataclasses.replace(
    _K2,
    num_dense_layers=2,
    num_expert_groups=4,
    expert_groups_per_token=2,
    routed_scaling_factor=2.5,
    rope_theta=10_000.0,
)
# transformers infers the size of a block from the number of scales: whole blocks, or a single one.
_WHOLE_BLOCKS = dataclasses.replace(_K2, embed_dim=256, kv_latent_dim=124)
_FAMILIES = {"k2": _K2, "moonlight": _MOONLIGHT, "deepseek_v3": _DEEPSEEK}


def _parameters(config, mesh):
    """Random values that bfloat16 has, with which activations stay of order one."""
    like = abstract_parameters(transformer.specs(config), mesh)

    def place(spec, leaf, at):
        leaf = leaf if spec.kind == NORM else leaf / 2
        return jax.device_put(leaf.astype(ml_dtypes.bfloat16).astype(np.float32), at.sharding)

    plan = transformer.specs(config)
    return map_specs(place, plan, tiny.host_parameters(config), like)


def _pack(params, config):
    """Returns the parameters with codes and scales in place of routed experts."""
    quantization = {"format": WeightFormat.INT4, "group_size": _GROUP}
    run = dataclasses.replace(tiny.experiment(quantization=quantization), model=config)
    return jax.jit(functools.partial(packed.pack, config=run))(params)


def _file_tensors(folder):
    from safetensors import torch as safetensors_torch

    (file,) = folder.glob("*.safetensors")
    return safetensors_torch.load_file(file)


def _their_logits(folder, tokens, **options):
    """Returns the logits of transformers in float32, of whatever its own loader made."""
    import torch
    import transformers

    model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    problems = {kind: names for kind, names in report.items() if names}
    assert not problems, problems
    with torch.no_grad():
        return model.float().eval()(torch.tensor(tokens)).logits.numpy()


@unittest.skipUnless(all(map(importlib.util.find_spec, _LIBRARIES)), "needs the extra interop-test")
class TransformersSlowTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "model"
        self.mesh = tiny.mesh(2, 2)
        self.enterContext(jax.set_mesh(self.mesh))
        self.tokens = np.random.default_rng(1).integers(0, tiny.MODEL.vocab_size, (4, 40))

    def _export(self, params, config, form):
        export_hugging_face(
            self.folder,
            Encoder(ParameterSource.of(params, config), form, _GROUP),
            fields=with_quantization(to_hugging_face(config), form, _GROUP),
            identity="test",
        )

    def _our_logits(self, params, config):
        view = NnxView(params, config, ComputeConfig(dtype=ComputeDtype.FLOAT32))
        tokens = jax.numpy.asarray(self.tokens, "int32")
        return jax.jit(lambda view, tokens: view(tokens))(view, tokens)

    def _imported(self):
        with HfCheckpoint(self.folder) as checkpoint:
            return import_parameters(checkpoint, self.mesh)

    def _assert_same_logits(self, theirs, ours):
        self.assertGreater(np.std(ours), 0.5)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=_TOLERANCE)

    @parameterized.named_parameters((f"_{name}", name) for name in _FAMILIES)
    def test_transformers_computes_our_logits_from_a_bf16_export(self, name):
        config = _FAMILIES[name]
        params = _parameters(config, self.mesh)
        self._export(params, config, FileFormat.BF16)
        theirs = _their_logits(self.folder, self.tokens)
        self._assert_same_logits(theirs, self._our_logits(params, config))

    def test_transformers_computes_our_logits_from_an_fp8_export(self):
        import transformers

        params = _parameters(_WHOLE_BLOCKS, self.mesh)
        self._export(params, _WHOLE_BLOCKS, FileFormat.FP8)
        values = transformers.FineGrainedFP8Config(dequantize=True)
        theirs = _their_logits(self.folder, self.tokens, quantization_config=values)
        self._assert_same_logits(theirs, self._our_logits(self._imported(), _WHOLE_BLOCKS))

    def test_transformers_computes_our_logits_from_an_int4_export(self):
        import transformers

        params = _pack(_parameters(_K2, self.mesh), _K2)
        self._export(params, _K2, FileFormat.INT4)
        values = transformers.CompressedTensorsConfig(dequantize=True)
        theirs = _their_logits(self.folder, self.tokens, quantization_config=values)
        self._assert_same_logits(theirs, self._our_logits(self._imported(), _K2))

    def test_torch_dequantizes_fp8_blocks_to_the_nearest_values(self):
        import torch

        params = _parameters(_K2, self.mesh)
        self._export(params, _K2, FileFormat.BF16)
        exact = _file_tensors(self.folder)
        self.folder = self.folder.with_name("fp8")
        self._export(params, _K2, FileFormat.FP8)
        tensors = _file_tensors(self.folder)
        names = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
        self.assertLen(names, len([name for name in tensors if name.endswith("_scale_inv")]))
        self.assertIn("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", names)
        self.assertNotIn("lm_head.weight", names)
        for name in names:
            rows, columns = tensors[name].shape
            scale = tensors[f"{name}_scale_inv"]
            scale = scale.repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)
            scale = scale[:, :columns]
            self.assertEqual(scale.shape, tensors[name].shape, name)
            error = (tensors[name].float() * scale - exact[name].float()).abs()
            # Half a step: of three bits of mantissa, or of the smallest exponent.
            allowed = torch.maximum(exact[name].float().abs() * 2**-4, scale * 2**-10)
            self.assertTrue(bool((error <= allowed * (1 + 1e-6)).all()), name)

    def test_compressed_tensors_decompresses_our_codes_to_our_values(self):
        import torch
        from compressed_tensors.compressors.pack_quantized.base import (
            PackedQuantizationCompressor,
        )
        from compressed_tensors.quantization import QuantizationConfig

        params = _pack(_parameters(_K2, self.mesh), _K2)
        self._export(params, _K2, FileFormat.INT4)
        fields = json.loads((self.folder / "config.json").read_text())["quantization_config"]
        (scheme,) = QuantizationConfig.model_validate(fields).config_groups.values()
        tensors = _file_tensors(self.folder)
        ours = params.moe_blocks.feed_forward.experts
        for published, parameter in (("gate", "w_gate"), ("up", "w_up"), ("down", "w_down")):
            values = int4.dequantize(getattr(ours, parameter), jax.numpy.bfloat16)
            values = np.asarray(values, np.float32).swapaxes(-1, -2)
            for layer, expert in np.ndindex(values.shape[:2]):
                prefix = (
                    f"model.layers.{layer + _K2.num_dense_layers}.mlp.experts.{expert}."
                    f"{published}_proj."
                )
                stored = {
                    part: tensors[prefix + part]
                    for part in ("weight_packed", "weight_scale", "weight_shape")
                }
                found = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
                self.assertEqual(found.dtype, torch.bfloat16)
                np.testing.assert_array_equal(found.float().numpy(), values[layer, expert], prefix)

    @parameterized.parameters(presets.kimi_k2, presets.moonlight_16b, presets.deepseek_v3)
    def test_transformers_reads_our_config_json_without_remote_code(self, preset):
        import transformers

        config = preset()
        self.folder.mkdir()
        text = json.dumps(to_hugging_face(config, bos_token_id=1, eos_token_id=2))
        (self.folder / "config.json").write_text(text)
        found = transformers.AutoConfig.from_pretrained(self.folder)
        self.assertIs(type(found), transformers.DeepseekV3Config)
        for theirs, ours in (
            ("hidden_size", config.embed_dim),
            ("q_lora_rank", config.q_latent_dim),
            ("qk_head_dim", config.head_qk_dim),
            ("num_key_value_heads", config.num_heads),
            ("topk_group", config.expert_groups_per_token),
            ("num_nextn_predict_layers", 0),
            ("bos_token_id", 1),
        ):
            self.assertEqual(getattr(found, theirs), ours, theirs)
        self.assertEqual(found.rope_parameters["rope_theta"], config.rope_theta)
        factor = config.yarn and config.yarn.factor
        self.assertEqual(found.rope_parameters.get("factor"), factor)


if __name__ == "__main__":
    absltest.main()
