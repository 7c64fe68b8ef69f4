import pathlib
import tempfile

from absl.testing import absltest

from kimi_jax.analysis import costs, schedules
from kimi_jax.core.errors import ConfigError

_STEP = 100  # bundles of each branch below


def _bundles(count, depth):
    return [f"  0x10   : {'> ' * depth}{{ %v1_v0 = vadd.f32 %v1_v0, %v2_v0 }}"] * count


def _kernel(exit_test=10):
    """An excerpt of what libtpu writes for a kernel: a grid of 8 steps, two branches in each."""
    loop = (
        ""
        if exit_test is None
        else f"scmp.ge.s32.totalorder %s19_s14, {exit_test} /* loop exit test */"
    )
    return "\n".join(
        [
            "LB: loop body",
            "     0   :  { %7 = vsyncpa [#allocation4], 0 }",
            "   0x7 LB: > { %s2 = sadd.s32 4294967294, %s72 /* iteration index, stage = 2 */ }",
            "   0x8   :  {}",
            "  0x2f   : > { %165 = sbr.rel (%p12_p12) target = $region28 }",
            "  0x30   : > { %171 = sbr.rel (!%p13_p3) target = $region40 }",
            *_bundles(_STEP, 1),
            "  0x94 PF: > { %9 = vst [vmem:%s1] %v1_v0 } /* Start/End empty region 40 */",
            "  0x95   : > { %172 = sbr.rel (%p13_p3) target = $region44 }",
            *_bundles(2 * _STEP, 1),
            " 0x1f4 PF: > { %9 = vst [vmem:%s1] %v1_v0 } /* Start/End empty region 44 */",
            " 0x1f5   : > { %173 = sbr.rel (%p14_p3) target = $region45 }",
            *_bundles(3, 1),
            " 0x1f9   : > { %9 = dma.vmem_to_hbm [thread:$0] /*hbm=*/%s1, /* ",
            "base_bounds: (8, 16) */ } /* Start/End empty region 45 */",
            " 0x1fa PF: > { %9 = nop } /* Start/End empty region 28 */",
            f" 0x1fb   : > {{ %p16_p10 = {loop} }}",
            " 0x1fc   : > { %18 = sbr.rel (!%p16_p10) target = $region86 }",
            " 0x200   :  { %1 = vsyncpa [#a], 1 } /* exit bundle: %my_kernel.1 = custom-call() */",
        ]
    )


class SchedulesTest(absltest.TestCase):
    def test_a_grids_bundles_count_once_a_step_and_its_branches_apart(self):
        schedule = schedules.read(_kernel())
        self.assertEqual(schedule.branches, (8 * _STEP, 8 * 2 * _STEP))
        # The first and the last bundle; in each step 12, and 3 of a branch too small to be one.
        self.assertEqual(schedule.always, 2 + 8 * 15)

    def test_branches_count_by_the_share_of_steps_that_takes_them(self):
        schedule = schedules.Schedule(always=50, branches=(800, 1600))
        self.assertEqual(schedules.bundles(schedule, (0.25, 0.75)), 50 + 200 + 1200)

    def test_a_share_for_each_branch_is_demanded(self):
        with self.assertRaisesRegex(ConfigError, "has 2 branches .* and 1 shares were given"):
            schedules.bundles(schedules.read(_kernel()), (0.5,))

    def test_a_loop_of_unknown_length_is_refused(self):
        with self.assertRaisesRegex(ConfigError, "has 0 exit tests against a constant"):
            schedules.read(_kernel(exit_test=None))

    def test_only_kernels_are_read_from_a_folder_and_by_their_names(self):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "17-my_kernel.1-03-final_bundles.txt").write_text(_kernel())
            (folder / "17-TLP-03-final_bundles.txt").write_text("  0x1   :  {}\n")
            found = schedules.read_folder(folder)
            self.assertEqual(found, {"my_kernel.1": schedules.read(_kernel())})
            schedules.clear(folder)
            self.assertEqual(schedules.read_folder(folder), {})

    def test_the_slowest_of_schedule_compute_and_memory_is_predicted(self):
        chip = costs.CHIPS["v6e"]
        cases = {
            "schedule": dict(executed=1.75e9, flops=chip.flops / 2, moved_bytes=0.0),
            "compute": dict(executed=1.0, flops=chip.flops, moved_bytes=0.0),
            "memory": dict(executed=1.0, flops=0.0, moved_bytes=chip.memory_bandwidth),
        }
        for limit, work in cases.items():
            predicted = schedules.predict(clock=1.75e9, chip=chip, **work)
            self.assertEqual(predicted.limit, limit)
            self.assertAlmostEqual(predicted.seconds, 1.0)


if __name__ == "__main__":
    absltest.main()
