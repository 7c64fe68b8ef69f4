"""Writes the files of a run that never happened, with the shape of those of a real one."""

import json
import pathlib

import numpy as np

LAYERS, HEADS, EXPERTS = 3, 4, 8
THRESHOLD = 100.0

CONFIG = {
    "model": {"num_layers": LAYERS, "num_dense_layers": 1},
    "training": {"batch_sequences": 8},
    "data": {"sequence_length": 256},
    "optimizer": {"qk_clip_threshold": THRESHOLD, "update_rms": 0.2},
}
SUMMARY = {
    "bits_per_byte": 1.7123,
    "unigram_bits_per_byte": 4.8341,
    "gzip_bits_per_byte": 3.0256,
    "sample": {"prompt": "The <b>king", "text": " & queen </pre>\nwent | home."},
    "parameters": 12_345_678,
    "tokens": 409_600,
    "seconds": 3723.0,
    "platform": "cpu",
}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def scalars(step, rng):
    record = {
        "step": step,
        "seconds": 0.5 * step,
        "loss/train": 2.0 + 4.0 * np.exp(-step / 30) + rng.normal(0, 0.05),
        "optimizer/learning_rate": 2e-4 * min(1.0, (step + 1) / 20),
        "optimizer/gradient_norm": 0.5 + rng.gamma(2, 0.05),
        "optimizer/update_rms_muon": 0.2,
        "optimizer/update_rms_adamw": 0.25,
        "qk_clip/max_logit": 106.0,
        "qk_clip/heads_clipped": 1,
        "qk_clip/heads_clipped_ever": 2,
        "experts/max_violation": 3 * np.exp(-step / 50),
        "throughput/tokens_per_second": 4000 + rng.normal(0, 50),
        "throughput/share_of_peak": 0.4,
        "memory/bytes_in_use": 2 * 2**30,
    }
    if step % 50 == 49:
        record |= {"eval/loss": record["loss/train"] + 0.1, "eval/bits_per_byte": 2.0 - step / 1e3}
    return record


def arrays(step, rng):
    logits = rng.uniform(-1, 106, (LAYERS, HEADS))
    return {
        "step": step,
        "max_logit": logits.tolist(),
        "clipped_ever": (logits > THRESHOLD).astype(int).tolist(),
        "expert_load": rng.integers(0, 300, (LAYERS - 1, EXPERTS)).tolist(),
    }


def write_run(workdir, *, steps=200):
    """A finished run, with everything that a run records."""
    rng = np.random.default_rng(0)
    workdir = pathlib.Path(workdir)
    write_lines(workdir / "metrics.jsonl", [scalars(step, rng) for step in range(steps)])
    write_lines(workdir / "layers.jsonl", [arrays(step, rng) for step in range(0, steps, 10)])
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    (workdir / "summary.json").write_text(json.dumps(SUMMARY))
