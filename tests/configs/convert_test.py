import dataclasses
import json
import pathlib
import warnings

from absl import flags
from absl.testing import absltest, parameterized
from ml_collections import config_flags

from experiments.configs import tiny_cpu
from kimi_jax.configs import convert, presets
from kimi_jax.configs.compute import Remat
from kimi_jax.configs.data import DataConfig, SourceConfig, SourceKind
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.model import YarnConfig
from kimi_jax.core.errors import ConfigError
from tests.support import tiny

_MODELS = {
    "kimi_k2": presets.kimi_k2(),
    "kimi_k2_thinking": presets.kimi_k2_thinking(),
    "moonlight_16b": presets.moonlight_16b(),
    "deepseek_v3": presets.deepseek_v3(),
    "tiny": presets.tiny(vocab_size=300),
}
_SOURCES = {
    "web": SourceConfig(kind=SourceKind.JSONL, path="a.jsonl", weight=3.0, text_field="body"),
    "code": SourceConfig(kind=SourceKind.TEXT, path="src", suffixes=(".py", ".c")),
}
_TINY_CPU = pathlib.Path(tiny_cpu.__file__)


def _with_flags(*overrides, file=_TINY_CPU):
    """Parses a command line as the programs do."""
    values = flags.FlagValues()
    arguments = ["program", f"--config={file}", *overrides]
    config_flags.DEFINE_config_file(
        "config",
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=arguments,
    )
    with warnings.catch_warnings():
        # ml_collections loads the file by a method that Python is about to drop.
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
        values(arguments)
    return convert.from_mapping(ExperimentConfig, values.config.to_dict())


def _experiment(model):
    return dataclasses.replace(
        tiny.experiment(), model=model, data=DataConfig(sequence_length=32, sources=_SOURCES)
    )


class ConvertTest(parameterized.TestCase):
    @parameterized.named_parameters(_MODELS.items())
    def test_a_config_survives_a_config_dict_and_json(self, model):
        config = _experiment(model)
        values = convert.to_config_dict(config)
        self.assertEqual(convert.from_mapping(ExperimentConfig, values), config)
        text = json.dumps(convert.to_json_dict(config))
        self.assertEqual(convert.from_mapping(ExperimentConfig, json.loads(text)), config)

    def test_every_experiment_file_survives(self):
        files = sorted(_TINY_CPU.parent.glob("*.py"))
        for file in [file for file in files if file.name != "__init__.py"]:
            with self.subTest(file.name):
                config = _with_flags(file=file)
                again = convert.from_mapping(ExperimentConfig, convert.to_config_dict(config))
                self.assertEqual(again, config)

    @parameterized.parameters(
        ("parallel.expert", "2", 2),
        ("parallel.expert", "None", None),
        ("model.q_latent_dim", "None", None),
        ("model.q_latent_dim", "32", 32),
        ("model.yarn", "{'factor': 2.0, 'original_max_position': 64}", YarnConfig(
            factor=2.0, original_max_position=64)),
        ("optimizer.schedule.peak", "0.5", 0.5),
        ("optimizer.qk_clip_threshold", "None", None),
        ("optimizer.qk_clip_threshold", "50", 50),
        ("optimizer.nesterov", "False", False),
        ("compute.remat", "k2", Remat.K2),
        ("training.eval_every", "7", 7),
        ("data.cache_dir", "/some/folder", "/some/folder"),
        ("data.sources", "{'mine': {'kind': 'text', 'path': 'x'}}", {
            "mine": SourceConfig(kind=SourceKind.TEXT, path="x")}),
    )  # fmt: skip
    def test_a_flag_overrides(self, path, text, expected):
        value = _with_flags(f"--config.{path}={text}")
        for name in path.split("."):
            value = getattr(value, name)
        self.assertEqual(value, expected)

    def test_flags_reach_into_a_source_and_suffixes(self):
        start = "--config.data.sources.embedded"
        config = _with_flags(
            f"{start}.kind=text", f"{start}.path=somewhere", f"{start}.suffixes=('.py','.md')"
        )
        self.assertEqual(
            config.data.sources["embedded"],
            SourceConfig(kind=SourceKind.TEXT, path="somewhere", suffixes=(".py", ".md")),
        )

    @parameterized.parameters(
        ("model.num_hedas", "4", "unknown option model.num_hedas; did you mean model.num_heads"),
        ("modle", "4", "unknown option modle; did you mean model"),
        ("compute.remat", "k3", "compute.remat must be one of 'none', 'k2', 'full', got 'k3'"),
        ("model.yarn", "3", "model.yarn must be a group of options, got 3"),
        ("training.eval_every", "-1", "training.eval_every must be greater than 0, got -1"),
    )
    def test_a_wrong_option_is_named(self, path, text, message):
        with self.assertRaises(ConfigError) as caught:
            _with_flags(f"--config.{path}={text}")
        self.assertStartsWith(str(caught.exception), message)

    def test_a_missing_option_is_named(self):
        values = convert.to_json_dict(tiny.experiment())
        del values["training"]["num_steps"]
        with self.assertRaisesRegex(ConfigError, "option training.num_steps is not set"):
            convert.from_mapping(ExperimentConfig, values)

    def test_differences_show_both_values(self):
        old = convert.to_json_dict(tiny.experiment())
        new = convert.to_json_dict(
            tiny.experiment(model={"q_latent_dim": None}, compute={"remat": Remat.FULL})
        )
        self.assertEqual(
            convert.differences(old, new),
            ["compute.remat: 'none' -> 'full'", "model.q_latent_dim: 16 -> None"],
        )
        self.assertEmpty(convert.differences(old, old))


if __name__ == "__main__":
    absltest.main()
