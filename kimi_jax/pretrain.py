"""One call for a whole pre-training run: corpus, training, evaluation, sample, report."""

import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.analysis.report import FOLDER, PAGE, write_report
from kimi_jax.analysis.run_log import read_run
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.byte_progress import byte_progress
from kimi_jax.core.param_spec import count_parameters
from kimi_jax.core.rng import key_for
from kimi_jax.data.corpus import Corpus, open_corpus
from kimi_jax.data.pipeline import HeldOut, held_out_batches
from kimi_jax.data.tokenizer import check_vocabulary
from kimi_jax.evaluation.perplexity import HeldOutEvaluation
from kimi_jax.inference.sampling import sample
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_import import check_architecture, import_parameters
from kimi_jax.model import accounting, transformer
from kimi_jax.optimizers.muon_clip import describe_labels
from kimi_jax.optimizers.schedules import learning_rate_schedule
from kimi_jax.parallel import mesh as meshes
from kimi_jax.parallel import multihost
from kimi_jax.parallel.rules import REPLICATED
from kimi_jax.quantization import qat
from kimi_jax.training.checkpoint import newest_state
from kimi_jax.training.loop import train
from kimi_jax.training.progress import print_banner
from kimi_jax.training.state import TrainState

SUMMARY_FILE = "summary.json"
_SAMPLE_TEMPERATURE = 0.6  # what K2-Instruct is published with


def pretrain(
    config: ExperimentConfig, workdir: str | os.PathLike, *, resume: bool = True
) -> pathlib.Path:
    """Runs or resumes a pre-training experiment from start to report.

    Everything that can be wrong with the input is checked before anything compiles.

    Args:
      config: the run.
      workdir: folder for everything it writes.
      resume: False refuses a folder that already holds a run.

    Returns:
      Path of the report's page.

    Raises:
      KimiError: one of its subclasses, for anything the user can mend.
    """
    mesh = meshes.make_mesh(config.parallel, config.model.num_routed_experts)
    multihost.check_mesh(mesh)
    training = config.training
    meshes.check_batch(mesh, training.batch_sequences, training.accumulation_steps)
    # Raises where the schedule does not fit into the run.
    learning_rate_schedule(config.optimizer.schedule, training.num_steps)
    # The others find what the first has put into the cache, where they share one.
    with multihost.first_before_others("open the corpus"):
        corpus = open_corpus(config.data)
    check_vocabulary(corpus.tokenizer, config.model.vocab_size)
    read_weights = _weights_reader(config, workdir, mesh)
    held_out = _held_out(config, corpus)
    print_banner(pathlib.Path(workdir).name, _sections(config, mesh, corpus, held_out))
    started = time.monotonic()
    with jax.set_mesh(mesh):
        evaluate = HeldOutEvaluation(held_out, mesh) if held_out else None
        state = train(
            config,
            workdir,
            corpus,
            mesh=mesh,
            evaluate=evaluate,
            read_weights=read_weights,
            resume=resume,
        )
        summary = _summary(config, mesh, held_out)
        summary["sample"] = _sample(config, corpus, state)
        summary["seconds"] = time.monotonic() - started
    if multihost.is_first():
        _report(pathlib.Path(workdir), summary, held_out)
    return pathlib.Path(workdir) / FOLDER / PAGE


def _report(workdir: pathlib.Path, summary: dict[str, Any], held_out: HeldOut | None) -> None:
    """Writes the summary and the report, and prints what came out."""
    results = _baseline_rows(held_out)
    if held_out is not None:
        _, bits_per_byte = read_run(workdir).series("eval/bits_per_byte")
        summary = summary | {"bits_per_byte": bits_per_byte[-1]}
        results.append(("held-out text: this model", f"{bits_per_byte[-1]:.4f} bits/byte"))
    (workdir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report(workdir)
    print_banner("finished", {"result": [*results, ("report", str(report))]})


def _weights_reader(
    config: ExperimentConfig, workdir: str | os.PathLike, mesh: jax.sharding.Mesh
) -> Callable[[], transformer.TransformerParams] | None:
    """Returns what reads the weights that training starts from, if it does not draw them.

    A new run's are checked here; one that goes on has no more need of them.
    """
    folder = config.training.initial_weights
    if folder is None:
        return None

    def read() -> transformer.TransformerParams:
        with HfCheckpoint(folder) as checkpoint:
            check_architecture(checkpoint, config.model)
            total = sum(info.num_bytes for info in checkpoint.files.tensors.values())
            share = total * jax.local_device_count() // mesh.size
            with byte_progress(f"reading {folder}", share, transient=True) as progress:
                return import_parameters(checkpoint, mesh, progress=progress)

    if newest_state(workdir) is None:
        with HfCheckpoint(folder) as checkpoint:
            check_architecture(checkpoint, config.model)
    return read


def _held_out(config: ExperimentConfig, corpus: Corpus) -> HeldOut | None:
    if not config.data.held_out_fraction:
        return None
    return held_out_batches(corpus, config.data, config.training.batch_sequences)


def _sections(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, corpus: Corpus, held_out: HeldOut | None
) -> dict[str, list[tuple[str, ...]]]:
    """Rows of the tables that open a run."""
    plan = transformer.specs(config.model)
    rounded = []
    if config.quantization.enabled:
        rounded = [("quantised", qat.describe(plan, config.quantization))]
    device = mesh.devices.flat[0]
    flops = accounting.train_flops_per_step(
        config.model, config.training.batch_sequences, config.data.sequence_length
    )
    return {
        "model": [
            ("parameters", f"{count_parameters(plan):,}"),
            ("active per token", f"{accounting.active_parameters(config.model):,}"),
            ("batch", f"{config.batch_tokens:,} tokens, {flops / 1e9:,.1f} GFLOP a step"),
            ("mesh", f"{meshes.describe(mesh)} ({mesh.size} x {device.device_kind})"),
            *rounded,
        ],
        "corpus": [(name, f"{value:,}") for name, value in corpus.statistics().items()]
        + _baseline_rows(held_out),
        "optimizer": [(describe_labels(plan, config.optimizer),)],
    }


def _baseline_rows(held_out: HeldOut | None) -> list[tuple[str, str]]:
    """What other ways of predicting the held-out text come to."""
    if held_out is None:
        return []
    return [
        ("held-out text: entropy of its bytes", f"{held_out.unigram_bits_per_byte:.4f} bits/byte"),
        ("held-out text: gzip -9", f"{held_out.gzip_bits_per_byte:.4f} bits/byte"),
    ]


def _summary(
    config: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    held_out: HeldOut | None,
) -> dict[str, Any]:
    """What the report's table shows, by the names that `analysis.report` knows."""
    summary = {
        "parameters": count_parameters(transformer.specs(config.model)),
        "active_parameters": accounting.active_parameters(config.model),
        "tokens": config.training.num_steps * config.batch_tokens,
        "devices": mesh.size,
    }
    if held_out is not None:
        summary |= {
            "unigram_bits_per_byte": held_out.unigram_bits_per_byte,
            "gzip_bits_per_byte": held_out.gzip_bits_per_byte,
            "held_out_bytes": held_out.num_bytes,
        }
    return summary


def _sample(config: ExperimentConfig, corpus: Corpus, state: TrainState) -> dict[str, str] | None:
    """Lets the model write from the start of a document."""
    num_tokens = min(config.training.sample_tokens, config.model.max_position - 1)
    if not num_tokens:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    prompts = np.full((meshes.sequence_shards(mesh), 1), corpus.tokenizer.bos_id, np.int32)
    tokens = sample(
        state.params,
        jnp.asarray(prompts),
        key_for(jax.random.wrap_key_data(state.rng), "sample"),
        num_tokens=num_tokens,
        temperature=_SAMPLE_TEMPERATURE,
        config=config.model,
        choices=config.compute,
        quantization=config.at_step(config.training.num_steps).quantization,
    )
    first = jax.reshard(tokens, REPLICATED)[0]  # every process has it then
    text = corpus.tokenizer.decode(np.asarray(first)[1:].tolist())
    return {"prompt": "", "text": text}
