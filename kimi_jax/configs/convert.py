"""Between config dataclasses and `ConfigDict`s, which flags override; nothing else has both."""

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from kimi_jax.configs.checks import describe
from kimi_jax.core.errors import ConfigError


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Writes a config dataclass as a ConfigDict with all options, so that each can be overridden.

    Enums become their values. Options that may be None accept any value until `from_mapping` checks
    them, so that a flag can turn them off and on.
    """
    hints = typing.get_type_hints(type(config))
    fields = {
        field.name: _to_plain(getattr(config, field.name), hints[field.name])
        for field in dataclasses.fields(config)
    }
    return ml_collections.ConfigDict(fields)


def to_json_dict(config: Any) -> dict[str, Any]:
    """Writes a config dataclass as nested dictionaries of JSON values."""
    return _without_tuples(to_config_dict(config).to_dict())


Options = Mapping[str, Any] | ml_collections.ConfigDict


def from_mapping(cls: type, values: Options, section: str = "") -> Any:
    """Builds a config dataclass from nested mappings, such as a ConfigDict or parsed JSON.

    Args:
      cls: the dataclass.
      values: one entry for each option; options with a default may be left out.
      section: dotted path of `values`, for messages.

    Returns:
      The config, checked.

    Raises:
      ConfigError: an option is unknown (the nearest known name is suggested), missing, of a wrong
        type, or has a value that does not fit.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {_join(section, near[0])}?" if near else ""
            raise ConfigError(
                f"unknown option {_join(section, name)}{hint} Known here: {', '.join(known)}"
            )
    missing = [name for name, field in known.items() if name not in values and _required(field)]
    if missing:
        raise ConfigError(f"option {_join(section, missing[0])} is not set and has no default")
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: _from_plain(value, hints[name], _join(section, name))
            for name, value in values.items()
        }
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], section: str = "") -> list[str]:
    """Lists the options in which two nested mappings differ, as lines `path: old -> new`."""
    lines = []
    for name in sorted(set(old) | set(new)):
        path = _join(section, name)
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, path)
        elif before != after:
            lines.append(f"{path}: {before!r} -> {after!r}")
    return lines


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union other than None; the type itself where it is no union."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return [hint]


def _to_plain(value: Any, hint: Any) -> Any:
    (kind, *_) = _alternatives(hint)
    if kind is not hint:
        plain = None if value is None else _to_plain(value, kind)
        return config_dict.FieldReference(plain, field_type=object)
    if dataclasses.is_dataclass(value):
        return to_config_dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        item = typing.get_args(kind)[1]
        return ml_collections.ConfigDict({k: _to_plain(v, item) for k, v in value.items()})
    return float(value) if kind is float else value


def _from_plain(value: Any, hint: Any, path: str) -> Any:
    (kind, *_) = _alternatives(hint)
    if value is None or isinstance(value, enum.Enum) or dataclasses.is_dataclass(value):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if dataclasses.is_dataclass(kind):
        _check_mapping(value, path)
        return from_mapping(kind, value, path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _to_enum(value, kind, path)
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        _check_mapping(value, path)
        item = typing.get_args(kind)[1]
        return {k: _from_plain(v, item, _join(path, k)) for k, v in value.items()}
    return value


def _check_mapping(value: Any, path: str) -> None:
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{path} must be a group of options, got {value!r}")


def _to_enum(value: Any, kind: type[enum.Enum], path: str) -> enum.Enum:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{path} must be {describe(kind)}, got {value!r}") from None


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_tuples(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tuples(v) for v in value]
    return value
