from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.training import device_peak


class DevicePeakTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        device_peak._measure.cache_clear()
        for name, value in (("CPU_SIDE", 256), ("MEASURE_SECONDS", 0.05)):
            patch = mock.patch.object(device_peak, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    @parameterized.parameters("float32", "bfloat16")
    def test_the_peak_is_a_rate_a_computer_can_have(self, dtype):
        peak = device_peak.measure_matmul_peak(dtype)
        # Slower than a core without vector units, or faster than any CPU, is a wrong count.
        self.assertBetween(peak, 1e8, 1e14)

    def test_one_device_is_measured_whatever_the_mesh_of_the_run(self):
        sizes = []

        def watched(*args, fastest=device_peak._fastest):
            sizes.append(jax.sharding.get_abstract_mesh().size)
            return fastest(*args)

        with (
            jax.set_mesh(make_mesh(ParallelConfig(data=4, expert=2), 4)),
            mock.patch.object(device_peak, "_fastest", watched),
        ):
            self.assertGreater(device_peak.measure_matmul_peak("float32"), 0)
        self.assertEqual(sizes, [1])

    def test_simulated_devices_are_not_counted_apart(self):
        with mock.patch.object(device_peak, "_fastest", return_value=2.0):
            peak = device_peak.measure_matmul_peak("float32")
        self.assertEqual(peak, 256.0**3)

    def test_accelerators_are_multiplied_by_their_number(self):
        gpu = mock.Mock(platform="gpu")
        with (
            mock.patch.object(jax, "local_devices", return_value=[gpu]),
            mock.patch.object(jax, "device_count", return_value=16),
            mock.patch.object(device_peak, "make_mesh", return_value=make_mesh(
                ParallelConfig(data=1, expert=1), 1
            )),
            mock.patch.object(device_peak, "_fastest", return_value=1.0),
        ):  # fmt: skip
            peak = device_peak.measure_matmul_peak("bfloat16")
        chain = 2.0 * device_peak.ACCELERATOR_SIDE**3 * device_peak.ACCELERATOR_PRODUCTS
        self.assertEqual(peak, 16 * chain)

    def test_the_second_measurement_costs_nothing(self):
        with mock.patch.object(device_peak, "_fastest", return_value=1.0) as measured:
            device_peak.measure_matmul_peak("bfloat16")
            device_peak.measure_matmul_peak("bfloat16")
        measured.assert_called_once()

    def test_memory_of_a_cpu_process_grows_with_what_it_holds(self):
        before = device_peak.process_memory_bytes()
        held = np.ones(64 << 20, np.uint8)
        grown = device_peak.process_memory_bytes() - before
        self.assertGreater(grown, 0.9 * held.nbytes)
        # The two are counted apart, with a few pages between them.
        self.assertGreater(
            device_peak.peak_memory_bytes(), 0.9 * device_peak.process_memory_bytes()
        )

    def test_memory_of_accelerators_is_what_they_report(self):
        stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 6,
                 "peak_bytes_in_use": 7}]  # fmt: skip
        devices = [mock.Mock(memory_stats=lambda s=s: s) for s in stats]
        with mock.patch.object(jax, "local_devices", return_value=devices):
            self.assertEqual(device_peak.process_memory_bytes(), 11)
            self.assertEqual(device_peak.peak_memory_bytes(), 9)


if __name__ == "__main__":
    absltest.main()
