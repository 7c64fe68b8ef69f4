from absl.testing import absltest, parameterized

from kimi_jax.analysis import costs
from kimi_jax.analysis.compiled_program import ProgramReport, Work
from kimi_jax.analysis.scopes import FORWARD, Scope
from kimi_jax.core.errors import ConfigError

_CHIP = costs.Chip(
    flops=100.0,
    memory_bytes=1000,
    memory_bandwidth=10.0,
    link_bandwidth=2.0,
    network_bandwidth=1.0,
)
_BANDWIDTHS = {("data",): 2.0, ("replica",): 1.0}
_ATTENTION = Work(flops=500.0, bytes=10.0, sent={("data",): 4.0})  # 5, 1 and 2 seconds
_EXCHANGE = Work(flops=100.0, bytes=40.0, sent={("data",): 6.0, ("replica",): 3.0})  # 1, 4, 6


def _program(**scopes: Work) -> ProgramReport:
    return ProgramReport(
        scopes={Scope(name, FORWARD): work for name, work in scopes.items()},
        collectives=(),
        groups={},
        unknown_loops=(),
        unknown_calls={},
    )


class CostsTest(parameterized.TestCase):
    def test_the_longest_of_the_three_is_the_time(self):
        seconds = costs.seconds(_ATTENTION, _CHIP, _BANDWIDTHS)
        self.assertEqual((seconds.compute, seconds.memory, seconds.network), (5.0, 1.0, 2.0))
        self.assertEqual((seconds.longest, seconds.limit), (5.0, "compute"))
        self.assertEqual(costs.seconds(_EXCHANGE, _CHIP, _BANDWIDTHS).limit, "network")

    def test_the_whole_overlaps_while_scopes_one_by_one_do_not(self):
        prediction = costs.predict(
            _program(attention=_ATTENTION, exchange=_EXCHANGE), _CHIP, _BANDWIDTHS
        )
        self.assertEqual(prediction.overlapped, costs.Seconds(6.0, 5.0, 8.0))
        self.assertEqual(prediction.overlapped.longest, 8.0)
        self.assertEqual(prediction.one_by_one, 5.0 + 6.0)

    def test_utilization_is_the_share_of_all_devices_peak(self):
        self.assertEqual(costs.model_flops_utilization(3200.0, 8.0, _CHIP, 16), 0.25)

    @parameterized.parameters(
        ("v5p:8x8x8", 459e12, 95),
        ("tpu7x:4x4x4", 1153.5e12, 96),
        ("h100:64", 989e12, 80),
    )
    def test_chips_are_found_by_the_name_of_a_topology(self, topology, flops, gib):
        chip = costs.chip_of(topology)
        self.assertEqual((chip.flops, chip.memory_bytes), (flops, gib * 2**30))

    def test_a_unit_of_memory_takes_longer_than_a_unit_of_arithmetic(self):
        for name, chip in costs.CHIPS.items():
            with self.subTest(name):
                self.assertBetween(chip.flops / chip.memory_bandwidth, 100, 700)
                self.assertGreater(chip.memory_bandwidth, chip.link_bandwidth)
                self.assertGreater(chip.link_bandwidth, chip.network_bandwidth)

    def test_an_unknown_chip_is_refused_with_the_known_ones(self):
        with self.assertRaisesRegex(ConfigError, "'v9' is unknown; choose from v5e, v5p"):
            costs.chip_of("v9:2x2")


if __name__ == "__main__":
    absltest.main()
