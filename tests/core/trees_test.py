from absl.testing import absltest

from kimi_jax.core.trees import leaf_names


class TreesTest(absltest.TestCase):
    def test_each_leaf_becomes_its_own_path(self):
        names = leaf_names({"a": {"b": 1, "c": [2, 3]}})
        self.assertEqual(names, {"a": {"b": "a.b", "c": ["a.c.0", "a.c.1"]}})


if __name__ == "__main__":
    absltest.main()
