import dataclasses
import enum
from collections.abc import Mapping

from absl.testing import absltest, parameterized

from kimi_jax.configs.checks import check_fields, require_positive
from kimi_jax.core.errors import ConfigError


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paint:
    count: int = 1
    share: float | None = None
    color: Color = Color.RED
    names: tuple[str, ...] = ()
    layers: Mapping[str, Color] = dataclasses.field(default_factory=dict)
    shiny: bool = False


class ChecksTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"count": 1.0}, "paint.count must be an integer, got 1.0 (float)"),
        ({"count": True}, "paint.count must be an integer, got True (bool)"),
        ({"share": "half"}, "paint.share must be a number or None, got 'half' (str)"),
        ({"share": False}, "paint.share must be a number or None, got False (bool)"),
        ({"color": "red"}, "paint.color must be one of 'red', 'blue', got 'red' (str)"),
        ({"names": ["a"]}, "paint.names must be"),
        ({"names": ("a", 1)}, "paint.names must be"),
        ({"layers": {"top": "red"}}, "paint.layers must be"),
        ({"shiny": 1}, "paint.shiny must be True or False, got 1 (int)"),
    )
    def test_a_wrong_type_is_named(self, values, message):
        with self.assertRaises(ConfigError) as caught:
            check_fields(Paint(**values), "paint")
        self.assertStartsWith(str(caught.exception), message)

    @parameterized.parameters(
        {}, {"share": 1}, {"share": 0.5}, {"names": ("a", "b")}, {"layers": {"top": Color.BLUE}}
    )
    def test_a_right_type_passes(self, **values):
        check_fields(Paint(**values), "paint")

    def test_positive_means_greater_than_zero_or_none(self):
        require_positive(Paint(count=1, share=None), "paint", "count", "share")
        with self.assertRaisesRegex(ConfigError, "paint.count must be greater than 0, got 0"):
            require_positive(Paint(count=0), "paint", "count")


if __name__ == "__main__":
    absltest.main()
