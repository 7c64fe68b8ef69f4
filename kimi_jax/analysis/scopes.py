"""Where in the program an operation comes from, read from the name that JAX gave it."""

import dataclasses
import re

FORWARD = "forward"
RECOMPUTED = "recomputed"
BACKWARD = "backward"

_WRAPPED = re.compile(r"^(?:jvp|transpose|vmap|checkpoint|remat)\((.*)\)$")
# Parts of a name that say how a function was called, not which.
_MECHANICS = re.compile(
    r"^(?:jit\(.*\)|pjit|while|body|cond|scan|eval_jaxpr|checkpoint|rematted_computation|remat\d?|"
    r"closed_call|core_call|custom_[jv][vj]p_call(?:_jaxpr)?|shard_map|branch_\d+_fun|"
    r"jaxpr|.*->.*|)$"
)


@dataclasses.dataclass(frozen=True, order=True)
class Scope:
    """A named part of the program.

    Attributes:
      name: named scopes, outermost first, joined by slashes.
      phase: forward, recomputed (a forward operation repeated for the backward pass) or backward.
    """

    name: str
    phase: str


def read_scope(operation_name: str, *, depth: int, skip: tuple[str, ...] = ()) -> Scope | None:
    """Reads the named scopes of an operation.

    Args:
      operation_name: such as `jit(step)/jvp(model)/while/body/block/mla/dot_general`.
      depth: how many scopes to keep, counted from the outermost.
      skip: scopes to leave out, such as the one around everything.

    Returns:
      None if the name has no scope.
    """
    parts = [_unwrap(part) for part in operation_name.split("/")[:-1]]
    names = [part for part in parts if not _MECHANICS.match(part) and part not in skip]
    if not names:
        return None
    phase = FORWARD
    if "rematted_computation" in operation_name:
        phase = RECOMPUTED
    elif "transpose(" in operation_name:
        phase = BACKWARD
    return Scope("/".join(names[:depth]), phase)


def _unwrap(part: str) -> str:
    while match := _WRAPPED.match(part):
        part = match.group(1)
    return part
