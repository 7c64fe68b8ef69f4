"""Compiles the training step of an experiment for accelerators that are not there, and reports.

    python tools/aot_compile.py --config=experiments/configs/tiny_cpu.py --topology=v5p:2x2x1

Tells, per device: memory against the chip's, the largest buffers, communication, operations against
the closed form, and the predicted time of a step with its share of the peak. Options of the run are
overridden by path, such as --config.parallel.expert=4. Needs the extra `aot` (TPUs) or `aot-cuda`.
"""

import contextlib
import json
import pathlib
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from experiments import program
from kimi_jax.analysis import buffers, costs, step_report, step_tables
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.errors import KimiError
from kimi_jax.parallel import topologies

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="file whose get_config() returns the configuration",
    lock_config=False,
    accept_new_attributes=True,  # unknown options are reported with all others, by load_config
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "such as v5p:8x8x8, or h100:64")
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "slices of that topology", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "file for all figures")
_HLO = flags.DEFINE_string("hlo", None, "file for the text of the compiled program")
flags.mark_flags_as_required(["config", "topology"])

_PROGRESS_SECONDS = 15.0
_LEAST_WIDTH = 140  # of the tables
_NAMED_BUFFERS = 10  # of a program that does not fit


class DoesNotFitError(KimiError):
    """The compiler found no way to run the program in the memory of the device."""


def main() -> None:
    """Compiles, prints, writes."""
    config = program.load_config(_CONFIG, ExperimentConfig)
    topologies.prepare_environment()
    chip = costs.chip_of(_TOPOLOGY.value)
    devices = topologies.absent_devices(_TOPOLOGY.value, _NUM_SLICES.value)
    report = compile_and_report(config, devices, chip)
    report = {"topology": _TOPOLOGY.value, "num_slices": _NUM_SLICES.value} | report
    console = Console()
    step_tables.print_tables(report, Console(width=max(console.width, _LEAST_WIDTH)))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=1))


def compile_and_report(config: ExperimentConfig, devices: list, chip: costs.Chip) -> dict:
    """Lowers and compiles the step; returns all figures, also those of the compilation."""
    import jax

    from kimi_jax.model import transformer
    from kimi_jax.parallel.mesh import check_batch, make_mesh
    from kimi_jax.training.state import abstract_state
    from kimi_jax.training.step import lower_train_step, make_optimizer

    mesh = make_mesh(config.parallel, config.model.num_routed_experts, devices)
    check_batch(mesh, config.training.batch_sequences, config.training.accumulation_steps)
    seconds: dict[str, float] = {}
    with jax.set_mesh(mesh):
        plan = transformer.specs(config.model)
        with _timed("lowering", seconds):
            lowered = lower_train_step(config, plan, mesh)
            state = abstract_state(config, plan, make_optimizer(config, plan), mesh)
        with tempfile.TemporaryDirectory() as folder, _timed("compiling", seconds):
            compiled = _compile(lowered, chip, folder)
            live = buffers.read_dump(pathlib.Path(folder))
    if _HLO.value:
        pathlib.Path(_HLO.value).write_text(compiled.as_text())
    with _timed("reading", seconds):
        report = step_report.step_report(
            compiled, state, config=config, plan=plan, mesh=mesh, chip=chip, buffers=live
        )
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return report | {"tool": {"seconds": seconds, "peak_rss_bytes": peak_kib * 1024}}


def _compile(lowered: Any, chip: costs.Chip, folder: str) -> Any:
    """Compiles, and lets the compiler write its buffer assignment into a folder.

    Raises:
      DoesNotFitError: the program needs more memory than the device has.
    """
    import jax

    try:
        return lowered.compile(buffers.dump_options(folder))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(_too_large(str(error), chip, folder)) from error


def _too_large(message: str, chip: costs.Chip, folder: str) -> str:
    largest = buffers.read_dump(pathlib.Path(folder))[:_NAMED_BUFFERS]
    listed = "".join(
        f"\n  {b.bytes / costs.GIB:8.3f} GiB  {b.shape}  {b.operation_name or b.name}"
        for b in largest
    )
    return (
        f"the step does not fit a device of {chip.memory_bytes / costs.GIB:.1f} GiB. The compiler "
        f"says: {message.splitlines()[0]}\nThe largest temporaries at the peak:{listed}\n"
        "What helps: more devices (parallel.data, parallel.expert), compute.remat=full, a smaller "
        "compute.logits_chunk_tokens, more training.accumulation_steps"
    )


@contextlib.contextmanager
def _timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Prints what goes on and, now and then, for how long; stores the seconds."""
    start = time.monotonic()
    done = threading.Event()

    def tell() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            print(f"{what} ... {time.monotonic() - start:.0f} s so far", flush=True)

    print(f"{what} ...", flush=True)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
    seconds[what] = time.monotonic() - start
    print(f"{what}: {seconds[what]:.1f} s", flush=True)


if __name__ == "__main__":
    program.run(main)
