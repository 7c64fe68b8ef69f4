"""Type checks shared by every config, so that a wrong value is reported where it was written."""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

from kimi_jax.core.errors import ConfigError, require


def check_fields(config: Any, section: str) -> None:
    """Raises `ConfigError` if a field's value does not have the field's declared type.

    Args:
      config: an instance of a config dataclass.
      section: how the user addresses it, such as "model" or "data.tokenizer".
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            raise ConfigError(
                f"{section}.{field.name} must be {describe(hints[field.name])}, "
                f"got {value!r} ({type(value).__name__})"
            )


def require_positive(config: Any, section: str, *names: str) -> None:
    """Raises `ConfigError` unless each named field is None or greater than zero."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value > 0, f"{section}.{name} must be greater than 0, got {value!r}"
        )


def describe(hint: Any) -> str:
    """Says in words what values a type hint admits."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(describe(arg) for arg in typing.get_args(hint))
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    return {int: "an integer", float: "a number", str: "a string", bool: "True or False"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return any(_fits(value, arg) for arg in typing.get_args(hint))
    if origin is tuple:
        (item, *_) = typing.get_args(hint)
        return isinstance(value, tuple) and all(_fits(v, item) for v in value)
    if origin is not None and issubclass(origin, Mapping):
        _, item = typing.get_args(hint)
        return isinstance(value, Mapping) and all(_fits(v, item) for v in value.values())
    if hint is float:  # 1 is a number; True is not
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
