"""Estimates a run's memory per device in closed form, and the smallest mesh that it fits.

    python tools/estimate_memory.py --config=experiments/configs/tiny_cpu.py --chip=v5p --devices=8

Nothing is compiled and no device is needed. Options of the run are overridden by path, such as
--config.parallel.expert=4. `tools/aot_compile.py` asks the compiler instead.
"""

import math

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from experiments import program
from kimi_jax.analysis import costs, memory
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.core.errors import require

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="file whose get_config() returns the configuration",
    lock_config=False,
    accept_new_attributes=True,  # unknown options are reported with all others, by load_config
)
_CHIP = flags.DEFINE_enum("chip", "v5p", sorted(costs.CHIPS), "whose memory to compare with")
_DEVICES = flags.DEFINE_integer("devices", None, "how many; by default the smallest mesh that fits")
flags.mark_flag_as_required("config")

_WHAT_HELPS = (
    "a batch that more devices divide (training.batch_sequences), compute.remat=full and "
    "compute.logits_chunk_tokens help"
)


def main() -> None:
    """Prints the table and the suggestion."""
    config = program.load_config(_CONFIG, ExperimentConfig)
    chip = costs.CHIPS[_CHIP.value]
    console = Console()
    found = memory.smallest_mesh(config, chip.memory_bytes)
    sizes = _sizes(config, _DEVICES.value)
    if sizes is None:
        require(found is not None, f"no mesh of {_CHIP.value} fits this run; {_WHAT_HELPS}")
        sizes = found[1]
    terms = memory.estimate(config, sizes)
    console.print(_table(terms, sizes, chip))
    if found is None:
        console.print(f"No mesh of {_CHIP.value} fits; {_WHAT_HELPS}.")
        return
    devices, smallest, most = found
    console.print(
        f"The smallest mesh of {_CHIP.value} that leaves a tenth of the memory free: {devices} "
        f"devices, {_describe(smallest)}: {most / costs.GIB:.2f} GiB"
    )


def _sizes(config: ExperimentConfig, devices: int | None) -> dict[str, int] | None:
    """Returns the mesh that the user has named, by --devices or in the configuration."""
    parallel = config.parallel
    data, expert = parallel.data, parallel.expert
    others = {name: getattr(parallel, name) for name in memory.CONFIGURED_AXES}
    fixed = math.prod(others.values())
    if devices is None:
        return memory.mesh_sizes(data, expert, **others) if data and expert else None
    left = devices // fixed
    expert = expert or (left // data if data else _widest_expert_axis(left, config))
    data = data or left // expert
    mesh = others | {"data": data, "expert": expert}
    require(
        fixed * data * expert == devices,
        f"--devices={devices} is not "
        + " x ".join(f"parallel.{name} {size}" for name, size in mesh.items()),
    )
    return memory.mesh_sizes(data, expert, **others)


def _widest_expert_axis(devices: int, config: ExperimentConfig) -> int:
    """Returns the size that splits the experts the most; the batch is split by any."""
    return math.gcd(devices, config.model.num_routed_experts)


def _table(terms: tuple[memory.Term, ...], sizes: dict[str, int], chip: costs.Chip) -> Table:
    title = f"Estimated memory per device, {_describe(sizes)}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "when"):
        table.add_column(heading)
    for heading in ("GiB", "of the chip"):
        table.add_column(heading, justify="right")
    rows = [(t.name, ", ".join(t.phases), t.bytes) for t in terms]
    rows += [("peak", "", memory.peak(terms)), (f"{_CHIP.value}", "", chip.memory_bytes)]
    for name, phase, size in rows:
        table.add_row(name, phase, f"{size / costs.GIB:.3f}", f"{size / chip.memory_bytes:.1%}")
    return table


def _describe(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


if __name__ == "__main__":
    program.run(main)
