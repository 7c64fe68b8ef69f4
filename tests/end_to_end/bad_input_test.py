import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from kimi_jax.configs.data import SourceConfig, SourceKind
from kimi_jax.core.errors import (
    CheckpointFileError,
    CheckpointMismatchError,
    ConfigError,
    DataError,
)
from kimi_jax.pretrain import pretrain
from kimi_jax.training import loop, workdir
from tests.support import program, published, tiny


class BadInputTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.workdir = self.folder / "run"
        tiny.write_corpus(self.folder / "corpus")

    def _refuse(self, error, message, **sections):
        """Expects an error of one short message before anything compiles or is written."""
        before = {path: path.read_bytes() for path in self.workdir.rglob("*") if path.is_file()}
        compiles = mock.patch.object(loop, "initial_state", side_effect=AssertionError("compiled"))
        with compiles, self.assertRaisesRegex(error, message):
            pretrain(tiny.text_experiment(self.folder, **sections), self.workdir)
        after = {path: path.read_bytes() for path in self.workdir.rglob("*") if path.is_file()}
        self.assertEqual(after, before)

    @parameterized.parameters(
        ("too few devices", {"parallel": {"data": 16}}, "needs 16 devices and there are 8"),
        ("mesh", {"parallel": {"data": 3, "expert": 1}}, "cannot be split over 3 shards"),
        ("experts", {"parallel": {"expert": 3}}, "parallel.expert .3. must divide"),
        ("vocabulary", {"model": {"vocab_size": 100}}, "model.vocab_size is 100, but the token"),
        (
            "schedule",
            {"training": {"num_steps": 3}, "optimizer": {"schedule": tiny.warm_up(4)}},
            "optimizer.schedule needs 4 steps .* but training.num_steps is 3",
        ),
    )  # fmt: skip
    def test_a_configuration_that_does_not_fit(self, _, sections, message):
        self._refuse(ConfigError, message, **sections)

    def test_initial_weights_of_another_architecture_show_what_differs(self):
        other = tiny.text_experiment(self.folder, model={"num_heads": 4}).model
        published.export(self.folder / "weights", other)
        self._refuse(
            ConfigError,
            r"(?s)weights holds a model of another architecture.*model.num_heads: 2 here, 4 there",
            training={"initial_weights": str(self.folder / "weights")},
        )

    def test_initial_weights_that_are_not_complete(self):
        model = tiny.text_experiment(self.folder).model
        published.export(self.folder / "weights", model)
        for file in (self.folder / "weights").glob("*.safetensors"):
            file.unlink()
        self._refuse(
            CheckpointFileError,
            "model-00001-of-00001.safetensors.* missing",
            training={"initial_weights": str(self.folder / "weights")},
        )

    def test_a_workdir_of_another_configuration_shows_what_differs(self):
        workdir.claim(self.workdir, tiny.text_experiment(self.folder), resume=True)
        self._refuse(
            CheckpointMismatchError,
            r"(?s)another configuration.*optimizer.weight_decay: 0.1 -> 0.5",
            optimizer={"weight_decay": 0.5},
        )

    @parameterized.parameters(
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl.* 2|line 2.*bad.jsonl"),
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "bad.jsonl.* 2|line 2.*bad.jsonl"),
        ("bad.txt", b"caf\xe9", "bad.txt.*UTF-8"),
        ("empty.txt", b"", "data.sources.text has no documents"),
        ("other.bin", b"x", "data.sources.text.path .* has no file"),
        (None, b"", "data.sources.text.path .* is no file"),
    )
    def test_a_corpus_that_cannot_be_read(self, name, content, message):
        folder = self.folder / "bad"
        if name:
            folder.mkdir()
            (folder / name).write_bytes(content)
        kind = SourceKind.JSONL if name == "bad.jsonl" else SourceKind.TEXT
        sources = {"text": SourceConfig(kind=kind, path=str(folder))}
        self._refuse(DataError, message, data={"sources": sources})


class CommandLineTest(parameterized.TestCase):
    @parameterized.parameters(
        ("--config.model.num_hedas=4", "unknown option model.num_hedas; did you mean model.num_h"),
        ("--config.model.num_heads=four", "flag --config.model.num_heads=four: "),
        ("--config.model.q_latent_dim=wide", "model.q_latent_dim must be an integer or None, got"),
        ("--config.modle.num_heads=4", "an override of --config names 'modle'"),
        ("--config.parallel.data=5", "needs 5 devices and there are 4"),
        ("extra", "unexpected arguments: extra"),
    )
    def test_a_wrong_override_is_one_message(self, override, message):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            tiny.write_corpus(folder / "corpus")
            config = program.write_config(folder, parallel={"simulated_devices": 4})
            self._expect(message, f"--config={config}", override, f"--workdir={folder / 'run'}")
            self.assertFalse((folder / "run").exists())

    def test_a_missing_file_is_named(self):
        self._expect("--config cannot be read: .*'nowhere.py'", "--config=nowhere.py")

    def _expect(self, message, *arguments):
        process = program.start_training(*arguments)
        _, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 2, errors)
        self.assertNotIn("Traceback", errors)
        self.assertLen(errors.strip().splitlines(), 1)
        self.assertRegex(errors, "^ConfigError: .*" + message)


if __name__ == "__main__":
    absltest.main()
