"""Times the whole training step at one fixed shape, and prints a table.

    python tools/bench_train.py                   every case
    python tools/bench_train.py --only=float32    those whose name contains the text

Each case runs in a process of its own, with a cold compilation cache, so that the time to the first
step is that of a user's command and the peak memory is the case's own. The matrix product peak is
measured in the same process; the share of peak is a ratio of two figures of one run. So is that of
a step with INT4 experts to one without, which are taken in turn.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

SEQUENCES, LENGTH, VOCABULARY = 8, 256, 512
WARM_STEPS, TIMED_STEPS = 2, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    dtype: str
    optimizer: str
    devices: int
    int4: str | None = None  # when routed experts are rounded; None where they are not

    @property
    def name(self) -> str:
        """What `--only` searches."""
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        int4 = f" int4 once a {self.int4}" if self.int4 else ""
        return f"{self.dtype} {self.optimizer} {devices}{int4}"


CASES = [
    Case(dtype=dtype, optimizer=optimizer, devices=devices)
    for dtype, devices, optimizer in itertools.product(
        ("float32", "bfloat16"), (1, 8), ("adamw", "muon_clip")
    )
] + [
    Case(dtype=dtype, optimizer="adamw", devices=1, int4=int4)
    for dtype, int4 in itertools.product(("float32", "bfloat16"), ("step", "use"))
]


def comparison_config(case: Case):
    """The shape that other frameworks were timed at; data 2 x expert 4 on 8 devices."""
    from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
    from kimi_jax.configs.data import DataConfig
    from kimi_jax.configs.experiment import ExperimentConfig
    from kimi_jax.configs.model import ModelConfig
    from kimi_jax.configs.optimizer import OptimizerConfig, OptimizerName, ScheduleConfig
    from kimi_jax.configs.parallel import ParallelConfig
    from kimi_jax.configs.training import TrainingConfig

    model = ModelConfig(
        vocab_size=VOCABULARY,
        embed_dim=256,
        num_layers=4,
        num_dense_layers=1,
        num_heads=8,
        q_latent_dim=96,
        kv_latent_dim=64,
        head_nope_dim=32,
        head_rope_dim=16,
        head_value_dim=32,
        dense_ffn_dim=512,
        expert_ffn_dim=128,
        num_routed_experts=16,
        num_shared_experts=1,
        experts_per_token=4,
    )
    data, expert = (2, 4) if case.devices == 8 else (1, 1)
    return ExperimentConfig(
        model=model,
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(
            name=OptimizerName(case.optimizer), schedule=ScheduleConfig(peak=1e-3)
        ),
        training=TrainingConfig(num_steps=1000, batch_sequences=SEQUENCES),
        compute=ComputeConfig(dtype=ComputeDtype(case.dtype)),
        parallel=ParallelConfig(data=data, expert=expert, simulated_devices=case.devices),
        quantization=quantization_config(case),
    )


def quantization_config(case: Case):
    """INT4 experts, where the case has them."""
    from kimi_jax.configs.quantization import QuantizationConfig, Quantize, WeightFormat

    if case.int4 is None:
        return QuantizationConfig()
    return QuantizationConfig(format=WeightFormat.INT4, quantize=Quantize(case.int4))


class Runner:
    """A run that is timed step by step."""

    def __init__(self, config, mesh):
        """Compiles, beside the drawing of the weights."""
        from kimi_jax.model import transformer
        from kimi_jax.training.state import initial_state
        from kimi_jax.training.step import compile_train_step, make_optimizer

        plan = transformer.specs(config.model)
        self._step = compile_train_step(config, plan, mesh)
        self._state = initial_state(config, plan, make_optimizer(config, plan))
        self._batch = random_batch(mesh)

    def seconds(self) -> float:
        """Takes a step."""
        import jax

        begin = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin


def run_case(case: Case, started: float) -> dict[str, float | None]:
    """Runs one case in this process.

    Args:
      case: what to run.
      started: `time.time()` when the command began.
    """
    import jax
    import numpy as np

    from kimi_jax.model import accounting
    from kimi_jax.parallel import mesh as meshes
    from kimi_jax.training.device_peak import measure_matmul_peak, peak_memory_bytes

    config = comparison_config(case)
    meshes.simulate_devices(case.devices)
    mesh = meshes.make_mesh(config.parallel, config.model.num_routed_experts)
    with jax.set_mesh(mesh):
        runner = Runner(config, mesh)
        runner.seconds()
        first = time.time() - started
        seconds = [runner.seconds() for _ in range(WARM_STEPS + TIMED_STEPS)]
        memory = peak_memory_bytes()
        over_plain = time_over_plain(runner, case, mesh) if case.int4 else None
    median = float(np.median(seconds[WARM_STEPS:]))
    flops = accounting.train_flops_per_step(config.model, SEQUENCES, LENGTH)
    peak = measure_matmul_peak("float32")
    return {
        "first_step_seconds": first,
        "step_seconds": median,
        "tokens_per_second": SEQUENCES * LENGTH / median,
        "float32_peak_gflops": peak / 1e9,
        "share_of_float32_peak": flops / median / peak,
        "peak_memory_gib": memory / 2**30,
        "over_plain": over_plain,
    }


def time_over_plain(runner: Runner, case: Case, mesh) -> float:
    """Returns the median ratio of a step's time to that of the same run without INT4."""
    import numpy as np

    plain = Runner(comparison_config(dataclasses.replace(case, int4=None)), mesh)
    ratios = [runner.seconds() / plain.seconds() for _ in range(WARM_STEPS + 2 * TIMED_STEPS)]
    return float(np.median(ratios[WARM_STEPS:]))


def random_batch(mesh):
    """Rows of one document each, on the mesh."""
    import jax
    import numpy as np

    from kimi_jax.data.batches import Batch
    from kimi_jax.data.device_feed import put_batch
    from kimi_jax.parallel.rules import TOKENS

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH + 1))
    tokens = tokens.astype(np.int32)
    ones = np.ones((SEQUENCES, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    batch = Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=ones,
        positions=positions,
        weights=ones.astype(np.float32),
    )
    return put_batch(batch, jax.NamedSharding(mesh, TOKENS))


def print_table(rows: dict[str, dict[str, float | None]]) -> None:
    """Prints what was measured, and the ratios that have a bound."""
    table = Table(title="training step at the comparison shape")
    for heading in (
        "case",
        "first step s",
        "step s",
        "tokens/s",
        "of fp32 peak",
        "peak GF/s",
        "GiB",
    ):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['first_step_seconds']:.1f}",
            f"{row['step_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['share_of_float32_peak']:.1f} %",
            f"{row['float32_peak_gflops']:.0f}",
            f"{row['peak_memory_gib']:.2f}",
        )
    console = Console(width=120)
    console.print(table)
    for dtype in ("float32", "bfloat16"):
        for text, above, below in (
            ("MuonClip / AdamW, 1 device", "muon_clip 1 device", "adamw 1 device"),
            ("8 devices / 1, AdamW", "adamw 8 devices", "adamw 1 device"),
            ("8 devices / 1, MuonClip", "muon_clip 8 devices", "muon_clip 1 device"),
        ):
            pair = [rows.get(f"{dtype} {name}") for name in (above, below)]
            if all(pair):
                ratio = pair[0]["step_seconds"] / pair[1]["step_seconds"]
                console.print(f"{dtype:9} {text}: {ratio:.2f}")
    for name, row in rows.items():
        if row["over_plain"] is not None:
            console.print(f"{name} / without: {row['over_plain']:.2f}")


def main() -> None:
    """Runs the cases that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        (case,) = (case for case in CASES if case.name == arguments.case)
        print(json.dumps(run_case(case, arguments.started)))
        return
    rows = {}
    for case in CASES:
        if arguments.only in case.name:
            command = [sys.executable, __file__, "--case", case.name, "--started", str(time.time())]
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
            if finished.returncode:
                sys.exit(f"{case.name} failed:\n{finished.stderr}")
            rows[case.name] = json.loads(finished.stdout.splitlines()[-1])
            print(f"{case.name}: {rows[case.name]['step_seconds']:.3f} s a step", flush=True)
    print_table(rows)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
