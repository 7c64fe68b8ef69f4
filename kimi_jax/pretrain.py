"""One call for a whole pre-training run: corpus, training, evaluation, sample, report."""

import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.analysis.report import write_report
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.param_spec import count_parameters
from kimi_jax.core.rng import key_for
from kimi_jax.data.corpus import Corpus, open_corpus
from kimi_jax.data.pipeline import HeldOut, held_out_batches
from kimi_jax.data.tokenizer import check_vocabulary
from kimi_jax.evaluation.perplexity import HeldOutEvaluation
from kimi_jax.inference.sampling import sample
from kimi_jax.model import accounting, transformer
from kimi_jax.optimizers.muon_clip import describe_labels
from kimi_jax.optimizers.schedules import learning_rate_schedule
from kimi_jax.parallel import mesh as meshes
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
    training = config.training
    meshes.check_batch(mesh, training.batch_sequences, training.accumulation_steps)
    learning_rate_schedule(config.optimizer.schedule, training.num_steps)  # raises if it is too long
    corpus = open_corpus(config.data)
    check_vocabulary(corpus.tokenizer, config.model.vocab_size)
    held_out = held_out_batches(corpus, config.data, training.batch_sequences)
    print_banner(pathlib.Path(workdir).name, _sections(config, mesh, corpus, held_out))
    started = time.monotonic()
    with jax.set_mesh(mesh):
        evaluate = HeldOutEvaluation(config, held_out, mesh)
        state = train(config, workdir, corpus, mesh=mesh, evaluate=evaluate, resume=resume)
        summary = _summary(config, mesh, held_out) | {
            "seconds": time.monotonic() - started,
            "bits_per_byte": evaluate(state.params)["eval/bits_per_byte"],
            "sample": _sample(config, corpus, state),
        }
    path = pathlib.Path(workdir) / SUMMARY_FILE
    path.write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report(workdir)
    print_banner("finished", {"held-out text": _result_rows(summary), "report": [(str(report),)]})
    return report


def _sections(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, corpus: Corpus, held_out: HeldOut
) -> dict[str, list[tuple[str, ...]]]:
    """Rows of the tables that open a run."""
    plan = transformer.specs(config.model)
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    flops = accounting.train_flops_per_step(
        config.model, config.training.batch_sequences, config.data.sequence_length
    )
    return {
        "model": [
            ("parameters", f"{count_parameters(plan):,}"),
            ("active per token", f"{accounting.active_parameters(config.model):,}"),
            ("batch", f"{config.batch_tokens:,} tokens, {flops / 1e9:,.1f} GFLOP a step"),
            ("mesh", f"{axes} ({mesh.size} x {device.device_kind})"),
        ],
        "corpus": [(name, f"{value:,}") for name, value in corpus.statistics().items()]
        + [
            ("held-out entropy of bytes", f"{held_out.unigram_bits_per_byte:.4f} bits per byte"),
            ("held-out gzip -9", f"{held_out.gzip_bits_per_byte:.4f} bits per byte"),
        ],
        "optimizer": [(describe_labels(plan, config.optimizer),)],
    }


def _summary(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, held_out: HeldOut
) -> dict[str, float]:
    return {
        "unigram_bits_per_byte": held_out.unigram_bits_per_byte,
        "gzip_bits_per_byte": held_out.gzip_bits_per_byte,
        "held_out_bytes": held_out.num_bytes,
        "parameters": count_parameters(transformer.specs(config.model)),
        "active_parameters": accounting.active_parameters(config.model),
        "tokens": config.training.num_steps * config.batch_tokens,
        "devices": mesh.size,
        "qk_clip_threshold": config.optimizer.qk_clip_threshold,
    }


def _sample(config: ExperimentConfig, corpus: Corpus, state: TrainState) -> dict[str, str] | None:
    """Lets the model write from the start of a document."""
    num_tokens = min(config.training.sample_tokens, config.model.max_position - 1)
    if not num_tokens:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    prompts = np.full((mesh.size, 1), corpus.tokenizer.bos_id, np.int32)
    tokens = sample(
        state.params,
        jnp.asarray(prompts),
        key_for(jax.random.wrap_key_data(state.rng), "sample"),
        num_tokens=num_tokens,
        temperature=_SAMPLE_TEMPERATURE,
        config=config.model,
        choices=config.compute,
    )
    text = corpus.tokenizer.decode(np.asarray(tokens)[0, 1:].tolist())
    return {"prompt": "", "text": text}


def _result_rows(summary: dict[str, float]) -> list[tuple[str, str]]:
    return [
        ("this model", f"{summary['bits_per_byte']:.4f} bits per byte"),
        ("entropy of bytes", f"{summary['unigram_bits_per_byte']:.4f}"),
        ("gzip -9", f"{summary['gzip_bits_per_byte']:.4f}"),
    ]
