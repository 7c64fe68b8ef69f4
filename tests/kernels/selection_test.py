from absl.testing import absltest

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.selection import select


class SelectTest(absltest.TestCase):
    def test_auto_takes_plain_xla(self):
        available = {Implementation.XLA: len, Implementation.REFERENCE: sum}
        self.assertIs(select("op", Implementation.AUTO, available), len)

    def test_a_named_implementation_is_the_one_that_runs(self):
        available = {Implementation.XLA: len, Implementation.REFERENCE: sum}
        self.assertIs(select("op", Implementation.REFERENCE, available), sum)

    def test_a_named_implementation_that_does_not_exist_raises(self):
        with self.assertRaisesRegex(NotImplementedError, "op has no implementation 'reference'"):
            select("op", Implementation.REFERENCE, {Implementation.XLA: len})


if __name__ == "__main__":
    absltest.main()
