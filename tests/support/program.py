"""Runs the programs as a user does, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = """
import pathlib

from kimi_jax.configs import convert
from tests.support import tiny


def get_config():
    sections = {sections!r}
    return convert.to_config_dict(tiny.text_experiment(pathlib.Path({folder!r}), **sections))
"""


def write_config(folder: pathlib.Path, **sections: dict) -> pathlib.Path:
    """Writes the file of `tiny.text_experiment(folder, **sections)`."""
    file = folder / "config.py"
    file.write_text(_CONFIG.format(folder=str(folder), sections=sections))
    return file


def start_training(*arguments: str) -> subprocess.Popen:
    """Starts `python -m experiments.train`, compiling quickly and sharing what is compiled."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=_ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_records(workdir: pathlib.Path) -> list[dict]:
    """Returns the complete lines of a run's metrics."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Waits until a step appears in the metrics of a running process."""
    end = time.monotonic() + 120
    while not any(record["step"] == step for record in read_records(workdir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.005)
