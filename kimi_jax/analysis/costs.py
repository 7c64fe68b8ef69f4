"""From a program's work to seconds: what chips can do, and what is assumed of them."""

import dataclasses
from collections.abc import Mapping

from kimi_jax.analysis.compiled_program import ProgramReport, Work
from kimi_jax.core.errors import require

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device, as JAX counts devices, can do at best.

    Attributes:
      flops: bfloat16 matrix products, per second, dense.
      memory_bytes: size of the main memory.
      memory_bandwidth: bytes per second.
      link_bandwidth: bytes per second that the device can send along one dimension of the torus,
        both directions together; for GPUs, within a node.
      network_bandwidth: bytes per second that the device can send over the data-centre network.
    """

    flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


# TPUs: docs.cloud.google.com/tpu/docs, pages v5e, v5p, v6e and tpu7x, "system architecture": peak
# compute, HBM, bidirectional ICI per chip and DCN per chip. Of the bidirectional bandwidth, half is
# sent; it is shared by the 2 (v5e, v6e) or 3 dimensions of the torus. JAX shows a tpu7x chip as two
# devices, each with half of everything.
# GPUs: NVIDIA's data sheets of the H100 SXM5 and H200 (dense bfloat16; an NVLink port sends 450
# GB/s), and one 400 Gb/s port of the network per GPU, as in a DGX.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(
        flops=197e12,
        memory_bytes=16 * GIB,
        memory_bandwidth=819e9,
        link_bandwidth=400e9 / 2 / 2,
        network_bandwidth=25e9 / 8,
    ),
    "v5p": Chip(
        flops=459e12,
        memory_bytes=95 * GIB,
        memory_bandwidth=2765e9,
        link_bandwidth=1200e9 / 2 / 3,
        network_bandwidth=50e9 / 8,
    ),
    "v6e": Chip(
        flops=918e12,
        memory_bytes=32 * GIB,
        memory_bandwidth=1638e9,
        link_bandwidth=800e9 / 2 / 2,
        network_bandwidth=100e9 / 8,
    ),
    "tpu7x": Chip(
        flops=2307e12 / 2,
        memory_bytes=192 * GIB // 2,
        memory_bandwidth=7380e9 / 2,
        link_bandwidth=1200e9 / 2 / 3 / 2,
        network_bandwidth=100e9 / 8 / 2,
    ),
    "h100": Chip(
        flops=989e12,
        memory_bytes=80 * GIB,
        memory_bandwidth=3350e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    "h200": Chip(
        flops=989e12,
        memory_bytes=141 * 10**9,
        memory_bandwidth=4800e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
}

ASSUMPTIONS = (
    "matrix products run at the chip's peak, and nothing else takes time to compute",
    "the main memory delivers its peak, and nothing is read twice that one instruction reads once",
    "communication within a slice uses both directions of every torus dimension that the group of "
    "devices spans (GPUs: NVLink), without latency and without other groups in the way",
    "communication between slices or GPU nodes is limited by each device's share of the network",
    "computing, memory and network overlap perfectly; for the second figure within a scope only, "
    "one scope after the other",
    "ragged products and exchanges are counted for all rows of their buffers, filled or not",
    "a loop whose length depends on data counts once, a custom call of unknown cost not at all",
)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time of one part of the program on one device.

    Attributes:
      compute: for the matrix products.
      memory: for the traffic with the main memory.
      network: for the communication with other devices.
    """

    compute: float
    memory: float
    network: float

    @property
    def longest(self) -> float:
        """Time under perfect overlap."""
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        """What takes the longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How long a step takes.

    Attributes:
      overlapped: the whole program, everything overlapping: max(compute, memory, network).
      one_by_one: seconds, the sum over scopes of the longest of the three.
    """

    overlapped: Seconds
    one_by_one: float


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology's name such as v5p:8x8x8.

    Raises:
      ConfigError: there is no such chip.
    """
    kind = topology.partition(":")[0]
    require(kind in CHIPS, f"chip {kind!r} is unknown; choose from {', '.join(CHIPS)}")
    return CHIPS[kind]


def seconds(work: Work, chip: Chip, bandwidths: Mapping[tuple[str, ...], float]) -> Seconds:
    """Divides work by what a chip can do.

    Args:
      work: of one device.
      chip: the device.
      bandwidths: bytes per second that a device can send along each combination of mesh axes.
    """
    return Seconds(
        compute=work.flops / chip.flops,
        memory=work.bytes / chip.memory_bandwidth,
        network=sum(sent / bandwidths[axes] for axes, sent in work.sent.items()),
    )


def predict(
    report: ProgramReport, chip: Chip, bandwidths: Mapping[tuple[str, ...], float]
) -> Prediction:
    """Predicts the time of one run of a program; see `ASSUMPTIONS`."""
    parts = [seconds(work, chip, bandwidths).longest for work in report.scopes.values()]
    return Prediction(seconds(report.total, chip, bandwidths), sum(parts))


def model_flops_utilization(
    model_flops: float, step_seconds: float, chip: Chip, num_devices: int
) -> float:
    """Share of the devices' peak that the model's own operations use (PaLM, arXiv 2204.02311)."""
    return model_flops / (step_seconds * chip.flops * num_devices)
