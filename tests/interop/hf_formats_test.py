from absl.testing import absltest, parameterized

from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.errors import CheckpointFileError, ConfigError
from kimi_jax.interop import hf_formats
from kimi_jax.interop.hf_formats import Ignored
from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.safetensors_header import TensorInfo
from tests.support import families, published

_DTYPES = {
    "bfloat16": "BF16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int32": "I32",
    "int64": "I64",
}
_EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
_O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def _infos(family):
    tensors = families.random_tensors(family)
    return {n: TensorInfo(n, _DTYPES[a.dtype.name], a.shape) for n, a in tensors.items()}


class StoredTensorsTest(parameterized.TestCase):
    @parameterized.parameters(*families.FAMILIES)
    def test_what_is_stored_is_what_the_family_publishes(self, name):
        family = families.FAMILIES[name]
        published_infos = _infos(family)
        stored = [
            info
            for tensor in hf_tensors(family.config).values()
            for info in hf_formats.stored_tensors(tensor, family.form)
        ]
        found = hf_formats.contents(family.config, published_infos, "folder")
        ignored = {n for names in found.ignored.values() for n in names}
        expected = {
            n.removeprefix(family.prefix): (info.dtype, info.shape)
            for n, info in published_infos.items()
            if n not in ignored
        }
        self.assertEqual({info.name: (info.dtype, info.shape) for info in stored}, expected)

    def test_int4_needs_whole_groups(self):
        tensor = hf_tensors(families.K2)[_EXPERT]
        with self.assertRaisesRegex(ConfigError, f"{_EXPERT} .* groups of 48 do not divide .*256"):
            hf_formats.stored_tensors(tensor, FileFormat.INT4, 48)

    def test_rotary_buffers_have_the_size_that_released_files_have(self):
        (first, *others) = hf_formats.rotary_buffers(families.K2)
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        self.assertEqual(first, TensorInfo(name, "BF16", (64,)))
        self.assertLen(others, families.K2.num_layers - 1)


class ContentsTest(parameterized.TestCase):
    def _contents(self, infos, name="kimi_k2"):
        return hf_formats.contents(families.FAMILIES[name].config, infos, "folder")

    def test_each_family_is_accounted_for_and_what_is_left_out_is_reported(self):
        layer = families.DEEPSEEK_V3.num_layers
        expected = {
            "kimi_k2": {
                Ignored.ROTARY_BUFFER: [
                    f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)
                ]
            },
            "kimi_k2_5": {
                Ignored.VISION: [
                    "mm_projector.proj.0.bias",
                    "vision_tower.encoder.blocks.0.mlp.fc0.weight",
                ]
            },
            "deepseek_v3": {
                Ignored.TOKEN_PREDICTION: [
                    f"model.layers.{layer}.{member}.weight"
                    for member in ("eh_proj", "enorm", "mlp.experts.0.up_proj")
                ]
            },
        }
        for name, family in families.FAMILIES.items():
            found = self._contents(_infos(family), name)
            ignored = {reason: sorted(names) for reason, names in found.ignored.items()}
            self.assertEqual(ignored, expected.get(name, {}), name)
            self.assertEqual(found.prefix, family.prefix)
            self.assertEqual(found.forms.keys(), published.shapes(family.config).keys())
            expert = _EXPERT.replace("layers.1", f"layers.{family.config.num_layers - 1}")
            self.assertIs(found.forms[expert], family.form)
            self.assertIs(found.forms["model.norm.weight"], FileFormat.BF16)

    @parameterized.named_parameters(
        ("missing", "kimi_k2", _O_PROJ, None, "is missing"),
        ("missing_scale", "kimi_k2", _O_PROJ + "_scale_inv", None, "is missing"),
        ("missing_int4_scale", "kimi_k2_thinking", _EXPERT + "_scale", None, "is missing"),
        ("missing_int4_shape", "kimi_k2_thinking", _EXPERT + "_shape", None, "is missing"),
        ("missing_int4_codes", "kimi_k2_thinking", _EXPERT + "_packed", None, "is missing"),
        ("wrong_shape", "kimi_k2", _O_PROJ, ("F8_E4M3", (48, 256)), r"\[256, 48\], but is \[48"),
        ("wrong_scale_shape", "kimi_k2", _O_PROJ + "_scale_inv", ("F32", (2, 2)), r"\[2, 1\]"),
        ("wrong_dtype", "kimi_k2", _O_PROJ, ("I32", (256, 48)), "BF16 or F32 or F16, but is I32"),
        ("scale_in_bf16", "kimi_k2", _O_PROJ + "_scale_inv", ("BF16", (2, 1)), "must be F32"),
        (
            "int4_scale_in_f32",
            "kimi_k2_thinking",
            _EXPERT + "_scale",
            ("F32", (64, 8)),
            "must be BF16, but is F32",
        ),
        ("int4_codes_in_bytes", "kimi_k2_thinking", _EXPERT + "_packed", ("I8", (64, 32)), "I32"),
        (
            "groups_of_another_size",
            "kimi_k2_thinking",
            _EXPERT + "_scale",
            ("BF16", (64, 16)),
            "groups of different sizes",
        ),
        (
            "groups_that_do_not_divide",
            "kimi_k2_thinking",
            _EXPERT + "_scale",
            ("BF16", (64, 7)),
            r"must be \[64, 8\], but is \[64, 7\]",
        ),
        (
            "int4_of_another_matrix",
            "kimi_k2_thinking",
            _O_PROJ + "_packed",
            ("I32", (256, 6)),
            "only routed experts",
        ),
        ("extra", "kimi_k2", "model.extra.weight", ("BF16", (2,)), "belongs to nothing"),
        (
            "an_expert_too_many",
            "kimi_k2",
            "model.layers.1.mlp.experts.8.up_proj.weight",
            ("BF16", (64, 256)),
            "belongs to nothing",
        ),
        (
            "a_layer_too_many",
            "kimi_k2",
            "model.layers.2.self_attn.o_proj.weight",
            ("BF16", (256, 48)),
            "belongs to nothing",
        ),
        ("vision_without_a_text_prefix_is_extra", "kimi_k2_5", "visual.x", ("F32", ()), "nothing"),
    )
    def test_a_folder_is_refused_for(self, family, name, change, message):
        infos = _infos(families.FAMILIES[family])
        infos.pop(name, None)
        if change:
            infos[name] = TensorInfo(name, *change)
        # What has no codes is not in INT4, and then the weight itself is what is wrong.
        named = name.removesuffix("_packed") if "must be" not in message else name
        with self.assertRaisesRegex(CheckpointFileError, f"folder: .*{named}.* {message}"):
            self._contents(infos, family)

    def test_several_extra_tensors_are_named_and_the_rest_counted(self):
        infos = _infos(families.FAMILIES["moonlight"])
        infos |= {f"x{i}": TensorInfo(f"x{i}", "F32", (1,)) for i in range(7)}
        with self.assertRaisesRegex(CheckpointFileError, r"x0, x1, x2, x3, x4 \(and 2 more\)"):
            self._contents(infos, "moonlight")


if __name__ == "__main__":
    absltest.main()
