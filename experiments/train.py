"""Pre-trains a model: python -m experiments.train --config=experiments/configs/tiny_cpu.py.

Options of the run are overridden by path, such as --config.training.num_steps=1000. The same
command resumes a run that was stopped. At the end, WORKDIR/report/index.html shows it.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import program
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.parallel.mesh import simulate_devices
from kimi_jax.parallel.multihost import Job
from kimi_jax.pretrain import pretrain

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="file whose get_config() returns the configuration",
    lock_config=False,
    accept_new_attributes=True,  # unknown options are reported with all others, by load_config
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; by default runs/ and the name of the config file"
)
_RESUME = flags.DEFINE_bool("resume", True, "go on with the run that the workdir holds")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "for a run of several processes: auto on TPU pods, SLURM and Kubernetes, else the HOST:PORT of "
    "process 0; see experiments/launch/README.md",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator=HOST:PORT")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator=HOST:PORT; from 0")
flags.mark_flag_as_required("config")


def main() -> None:
    """Turns flags into a configuration and runs it."""
    config = program.load_config(_CONFIG, ExperimentConfig)
    config_file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    simulate_devices(config.parallel.simulated_devices)
    with Job(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
        pretrain(config, _WORKDIR.value or f"runs/{config_file.stem}", resume=_RESUME.value)


if __name__ == "__main__":
    program.run(main)
