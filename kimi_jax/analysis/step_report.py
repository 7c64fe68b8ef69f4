"""Everything that a compiled training step tells about memory, work and time, per device."""

import collections
import dataclasses
import math
from typing import Any

import jax

from kimi_jax.analysis import costs, hlo
from kimi_jax.analysis.buffers import Buffer
from kimi_jax.analysis.compiled_program import ProgramReport, report_device
from kimi_jax.analysis.expected_flops import expected_flops
from kimi_jax.analysis.scopes import BACKWARD, FORWARD, RECOMPUTED
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.model.accounting import train_flops_per_step
from kimi_jax.parallel.topologies import spans_network, torus_dimensions

Bandwidths = dict[tuple[str, ...], float]
Report = dict[str, Any]

OPTIMIZER = "optimizer"
NEWTON_SCHULZ = "newton_schulz"
_OUTERMOST_SCOPE = "train_step"
_SAMPLED_DEVICES = 32
_GOLDEN = 0.6180339887498949  # its multiples keep no step with the axes of a mesh
_BUFFERS = 20  # that are named


def step_report(
    compiled: jax.stages.Compiled,
    state: Any,
    *,
    config: ExperimentConfig,
    plan: Any,
    mesh: jax.sharding.Mesh,
    chip: costs.Chip,
    buffers: tuple[Buffer, ...],
) -> Report:
    """Gathers the figures of a compiled step, ready for JSON; bytes, seconds and operations.

    Args:
      compiled: the step.
      state: abstract state, with shardings.
      config: the run.
      plan: specs of the parameters.
      mesh: the devices it was compiled for.
      chip: what one of them can do.
      buffers: the temporaries where they are the most.
    """
    sizes = dict(mesh.shape)
    module = hlo.parse(compiled.as_text())
    # Devices own different matrices of the optimizer: work is a mean, time that of the slowest.
    numbers = _sample(mesh.size)
    programs = [
        report_device(module, sizes, device=number, skip_scopes=(_OUTERMOST_SCOPE,))
        for number in numbers
    ]
    bandwidths = link_bandwidths(programs[0], mesh, chip)
    slowest = max(programs, key=lambda p: costs.predict(p, chip, bandwidths).one_by_one)
    return {
        "mesh": sizes,
        "devices": mesh.size,
        "memory": memory(compiled, state, chip),
        "buffers": [dataclasses.asdict(buffer) for buffer in buffers[:_BUFFERS]],
        "collectives": [
            dataclasses.asdict(c) | {"seconds": c.bytes / bandwidths[c.axes]}
            for c in slowest.collectives
        ],
        "flops": flops(programs, config=config, plan=plan, mesh=mesh),
        "time": time(slowest, config=config, chip=chip, bandwidths=bandwidths, devices=mesh.size),
        "scopes": scope_table(slowest, chip, bandwidths),
        "unknown_loops": dict(collections.Counter(slowest.unknown_loops)),
        "unknown_custom_calls": slowest.unknown_calls,
        "assumptions": list(costs.ASSUMPTIONS),
    }


def _sample(devices: int) -> list[int]:
    """Returns all numbers of few devices, or some of many, spread over every axis."""
    if devices <= _SAMPLED_DEVICES:
        return list(range(devices))
    return sorted({int(devices * (i * _GOLDEN % 1)) for i in range(_SAMPLED_DEVICES)})


def link_bandwidths(
    program: ProgramReport, mesh: jax.sharding.Mesh, chip: costs.Chip
) -> Bandwidths:
    """Returns the bytes per second that a device can send along each combination of mesh axes."""
    devices = mesh.devices.reshape(-1)
    bandwidths = {}
    for axes, numbers in program.groups.items():
        group = [devices[number] for number in numbers]
        if spans_network(group):
            bandwidths[axes] = chip.network_bandwidth
        elif group[0].platform == "tpu":
            bandwidths[axes] = chip.link_bandwidth * max(1, torus_dimensions(group))
        else:
            bandwidths[axes] = chip.link_bandwidth
    return bandwidths


def memory(compiled: jax.stages.Compiled, state: Any, chip: costs.Chip) -> Report:
    """Splits the compiler's own figures of a device's memory, in bytes."""
    stats = compiled.memory_analysis()
    parameters = shard_bytes(state.params)
    optimizer = shard_bytes(state.optimizer)
    return {
        "parameters": parameters,
        "optimizer_state": optimizer,
        "other_arguments": stats.argument_size_in_bytes - parameters - optimizer,
        "results_in_new_memory": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
        "chip": chip.memory_bytes,
    }


def shard_bytes(tree: Any) -> int:
    """Sums the bytes that one device holds of a tree of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def flops(
    programs: list[ProgramReport],
    *,
    config: ExperimentConfig,
    plan: Any,
    mesh: jax.sharding.Mesh,
) -> Report:
    """Compares counted operations, the mean over devices, with the closed form, per device."""
    counted = collections.Counter()
    for program in programs:
        for scope, part in program.scopes.items():
            names = scope.name.split("/")
            kind = NEWTON_SCHULZ if NEWTON_SCHULZ in names else scope.phase
            counted[OPTIMIZER if kind == FORWARD and OPTIMIZER in names else kind] += part.flops
    expected = dataclasses.asdict(expected_flops(config, plan, mesh.shape))
    table = {
        kind: {
            "counted": counted[kind] / len(programs),
            "closed_form": expected.get(kind, 0.0) / mesh.size,
        }
        for kind in (FORWARD, BACKWARD, RECOMPUTED, NEWTON_SCHULZ, OPTIMIZER)
    }
    # A fusion's name may give work of one pass to another; the sum is not affected.
    passes = [table[kind] for kind in (FORWARD, BACKWARD, RECOMPUTED)]
    table["passes"] = {
        column: sum(row[column] for row in passes) for column in ("counted", "closed_form")
    }
    return table


def time(
    program: ProgramReport,
    *,
    config: ExperimentConfig,
    chip: costs.Chip,
    bandwidths: Bandwidths,
    devices: int,
) -> Report:
    """Predicts seconds and the share of the peak."""
    prediction = costs.predict(program, chip, bandwidths)
    model_flops = train_flops_per_step(
        config.model, config.training.batch_sequences, config.data.sequence_length
    )

    def utilization(seconds: float) -> float:
        return costs.model_flops_utilization(model_flops, seconds, chip, devices)

    whole = prediction.overlapped
    return {
        "compute_seconds": whole.compute,
        "memory_seconds": whole.memory,
        "network_seconds": whole.network,
        "step_seconds": whole.longest,
        "limit": whole.limit,
        "step_seconds_one_by_one": prediction.one_by_one,
        "model_flops_per_device": model_flops / devices,
        "mfu": utilization(whole.longest),
        "mfu_one_by_one": utilization(prediction.one_by_one),
    }


def scope_table(program: ProgramReport, chip: costs.Chip, bandwidths: Bandwidths) -> list[Report]:
    """Lists the parts of the program with their work and time, the longest first."""
    rows = []
    for scope, part in program.scopes.items():
        seconds = costs.seconds(part, chip, bandwidths)
        rows.append(
            {
                "scope": scope.name,
                "phase": scope.phase,
                "flops": part.flops,
                "bytes": part.bytes,
                "sent": sum(part.sent.values()),
                "compute_seconds": seconds.compute,
                "memory_seconds": seconds.memory,
                "network_seconds": seconds.network,
                "seconds": seconds.longest,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])
