"""The program as a user runs it, and its parts in this process."""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import jax
import numpy as np
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

from kimi_jax.configs import convert
from kimi_jax.core.errors import CheckpointFileError, ConfigError
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.tensor_source import ParameterSource
from kimi_jax.model import transformer
from kimi_jax.model.router import routed_scaling_factor
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.state import abstract_state
from kimi_jax.training.step import make_optimizer
from tests.support import families, tiny

_ROOT = pathlib.Path(__file__).parents[2]
_RELEASED = _ROOT.parent / "shared" / "data" / "kimi_k2"


@functools.cache
def _program():
    """The program as a module; a script finds its parts beside it."""
    sys.path.insert(0, str(_ROOT / "tools"))
    program = importlib.import_module("tools.convert_checkpoint")
    flags.FLAGS.mark_as_parsed()
    return program


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)],
        cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": str(_ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


class ConvertCheckpointTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.output = self.folder / "output"

    def _convert(self, given, form, **options):
        """Runs the program's main in this process."""
        program = _program()
        options = {"input": str(given), "output": str(self.output), "format": form} | options
        with flagsaver.flagsaver(**options):
            program.main()

    @unittest.skipUnless(_RELEASED.is_dir(), "needs the published config.json")
    def test_the_plan_of_int4_kimi_k2_says_594_gigabytes(self):
        result = _run(f"--input={_RELEASED}", "--format=int4", "--plan")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(result.stdout, r"all +│ 208,215 │ +594\.2 ")
        self.assertRegex(result.stdout, r"memory, at most +│ +│ +[0-2]\.\d\d ")

    def test_a_command_that_cannot_run_says_so_in_one_line(self):
        absent = self.folder / "absent"
        result = _run(f"--input={absent}", f"--output={self.output}", "--format=bf16")
        self.assertEqual(result.returncode, 2)
        self.assertEqual(result.stderr, f"CheckpointFileError: {absent} is no folder\n")
        self.assertEmpty(list(self.folder.iterdir()))

    @parameterized.named_parameters(
        ("no_output", {"output": None}, ConfigError, "--output is missing"),
        ("no_size", {"shard_gb": 0.0}, ConfigError, "--shard_gb must be positive, got 0.0"),
        ("no_tokenizer", {"tokenizer": "absent"}, ConfigError, "--tokenizer=absent is no folder"),
        ("an_empty_folder", {"input": "."}, ConfigError, "cannot read config.json"),
    )
    def test_main_refuses(self, options, error, message):
        families.write_family(self.folder / "model", "moonlight")
        self.enterContext(contextlib.chdir(self.folder))
        with self.assertRaisesRegex(error, message):
            self._convert(self.folder / "model", "bf16", **options)
        self.assertFalse(self.output.exists())

    def test_a_published_folder_becomes_another_with_its_tokenizer_and_is_verified(self):
        given = self.folder / "given"
        tensors = families.write_family(given, "kimi_k2_5")
        (given / "tiktoken.model").write_text("words")
        self._convert(given, "bf16", verify=True)
        names = {path.name for path in self.output.iterdir()}
        self.assertEqual(
            names,
            {
                "model-00001-of-00001.safetensors",
                "model.safetensors.index.json",
                "config.json",
                "tiktoken.model",
            },
        )
        fields = json.loads((self.output / "config.json").read_text())
        # What was written is the language model alone, under its own names.
        self.assertEqual(fields["architectures"], ["DeepseekV3ForCausalLM"])
        self.assertNotIn("quantization_config", fields)
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        with HfCheckpoint(self.output) as written:
            self.assertEqual(written.config, families.FAMILIES["kimi_k2_5"].config)
            found = written.rows(name, slice(0, 64)).astype(np.float32)
        np.testing.assert_array_equal(found, families.values(tensors, f"language_model.{name}"))

    def test_a_run_becomes_a_published_folder(self):
        workdir = self.folder / "run"
        config = tiny.text_experiment(self.folder, parallel={"data": 1, "expert": 1})
        tiny.write_corpus(self.folder / "corpus")
        params = _save_run(workdir, config)
        self._convert(workdir, "bf16")
        fields = json.loads((self.output / "config.json").read_text())
        self.assertEqual((fields["vocab_size"], fields["eos_token_id"]), (260, 257))
        expected = ParameterSource.of(params, config.model)
        with HfCheckpoint(self.output) as written:
            factor = routed_scaling_factor(config.model)  # which the rule leaves to be computed
            self.assertEqual(written.config.routed_scaling_factor, factor)
            for tensor in hf_tensors(written.config).values():
                rows = slice(0, tensor.shape[0])
                found = written.rows(tensor.name, rows)
                wanted = expected.rows(tensor.name, rows).astype(found.dtype)
                np.testing.assert_array_equal(found, wanted, tensor.name)

    def test_a_run_without_a_checkpoint_says_so(self):
        (self.folder / "run" / "checkpoints").mkdir(parents=True)
        config = convert.to_json_dict(tiny.text_experiment(self.folder))
        (self.folder / "run" / "config.json").write_text(json.dumps(config))
        with self.assertRaisesRegex(CheckpointFileError, "this run has no checkpoint yet"):
            self._convert(self.folder / "run", "bf16")


def _save_run(workdir, config):
    """Writes the newest of two checkpoints; returns its parameters on the host."""
    plan, mesh = transformer.specs(config.model), tiny.mesh(1, 1)
    with jax.set_mesh(mesh):
        like = abstract_state(config, plan, make_optimizer(config, plan), mesh)
    zeros = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), like)
    params = tiny.parameters(mesh, config.model)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(convert.to_json_dict(config)))
    with Checkpointer(workdir, keep=2) as checkpoints:
        checkpoints.save(zeros, {})
        checkpoints.save(zeros.replace(params=params, step=zeros.step + 12), {})
    return jax.device_get(params)


if __name__ == "__main__":
    absltest.main()
