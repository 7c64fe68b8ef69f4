r"""Shows what a checkpoint holds, how large its values are, and how it differs from another.

    python tools/inspect_checkpoint.py --checkpoint=models/Kimi-K2-Instruct
    python tools/inspect_checkpoint.py --checkpoint=models/mine --norms --filter='layers\.1\.'
    python tools/inspect_checkpoint.py --checkpoint=models/mine --diff=models/theirs

A checkpoint is a folder of safetensors files, the folder of a run (its newest checkpoint is shown),
or one that tools/pack_int4.py has written. Tensors whose names differ in numbers only share a line;
--each gives each its own. Names, shapes and dtypes come from headers alone; --norms and --diff read
the values, block by block, as they are stored: FP8 without its scales, INT4 as packed codes. With
--dequantize they are the model's own values under the published names, in float32, so that FP8 can
be compared with bfloat16, and a run with a published folder.

The exit code of --diff is 0 if nothing differs, 1 if something does, and 2 for what cannot be read.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import program
from kimi_jax.core.byte_progress import byte_progress
from kimi_jax.core.errors import CheckpointFileError, ConfigError, require
from kimi_jax.interop import inspection
from kimi_jax.interop.inspection import Difference, Group, Norms, Tensors
from kimi_jax.interop.safetensors_header import TensorInfo
from kimi_jax.interop.safetensors_io import SafetensorsFolder

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder to show", required=True)
_DIFF = flags.DEFINE_string("diff", None, "folder to compare it with")
_NORMS = flags.DEFINE_bool("norms", False, "read the values: RMS, largest, how many are NaN or Inf")
_FILTER = flags.DEFINE_string("filter", None, "regular expression; only names that contain it")
_EACH = flags.DEFINE_bool("each", False, "a line for each tensor")
_VALUES = flags.DEFINE_bool("values", True, "with --diff: compare values, not only what is there")
_DEQUANTIZE = flags.DEFINE_bool("dequantize", False, "values and names of the model, not as stored")
_PIPED_WIDTH = 200  # of lines that do not go to a terminal
_DIFFERENT = 1  # exit code
_THREADS = os.cpu_count() or 1  # NumPy works on several tensors at a time


def main() -> None:
    """Opens one checkpoint or two, and prints tables."""
    require(not (_NORMS.value and _DIFF.value), "give --norms or --diff, not both")
    require(_VALUES.value or _DIFF.value is not None, "--novalues is an option of --diff")
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    with contextlib.ExitStack() as stack:
        _inspect(console, stack)


def _inspect(console: Console, stack: contextlib.ExitStack) -> None:
    source = _open(_CHECKPOINT.value, stack)
    infos = _filtered(source)
    require(
        bool(infos),
        f"--filter={_FILTER.value} fits none of the {len(source.tensors):,} names in "
        f"{_CHECKPOINT.value}, such as {next(iter(source.tensors), None)}",
    )
    if _DIFF.value is None:
        norms = _all_norms(source, infos) if _NORMS.value else None
        console.print(_tree(infos, norms))
        console.print(f"{_CHECKPOINT.value}: {len(infos):,} tensors, {_size(infos.values())}")
        return
    other = _open(_DIFF.value, stack)
    if _print_differences(console, source, infos, other, _filtered(other)):
        sys.exit(_DIFFERENT)


def _open(folder: str, stack: contextlib.ExitStack) -> Tensors:
    """Returns the tensors of a folder, whichever kind it is.

    Raises:
      CheckpointFileError: it is of no kind, not complete, or damaged.
    """
    path = pathlib.Path(folder)
    if _DEQUANTIZE.value:
        from checkpoint_source import open_input  # takes seconds as well

        from kimi_jax.interop.dequantized_tensors import DequantizedTensors

        return DequantizedTensors(stack.enter_context(open_input(folder)).source)
    is_safetensors = not path.is_dir() or any(path.glob("*.safetensors*"))
    return stack.enter_context(SafetensorsFolder(path)) if is_safetensors else _open_orbax(path)


def _open_orbax(path: pathlib.Path) -> Tensors:
    """Opens what training has written; imports orbax, which takes seconds, only here."""
    from kimi_jax.interop.orbax_tensors import OrbaxTensors
    from kimi_jax.training.checkpoint import newest_state
    from kimi_jax.training.packed import WEIGHTS_FOLDER

    if (path / WEIGHTS_FOLDER).is_dir():
        return OrbaxTensors(path / WEIGHTS_FOLDER)
    state = newest_state(path)
    if state is None:
        raise CheckpointFileError(
            f"{path}: holds no *.safetensors file, no checkpoint of a run and no packed model"
        )
    return OrbaxTensors(state)


def _filtered(source: Tensors) -> dict[str, TensorInfo]:
    """What --filter leaves."""
    try:
        pattern = re.compile(_FILTER.value or "")
    except re.error as error:
        raise ConfigError(f"--filter={_FILTER.value} is no regular expression: {error}") from error
    return {name: info for name, info in source.tensors.items() if pattern.search(name)}


def _tree(infos: dict[str, TensorInfo], norms: dict[str, Norms | None] | None = None) -> Table:
    """A line for each group, with norms if they are given."""
    titles = ("RMS", "largest", "not finite") if norms is not None else ()
    table = _table("tensor", "count", "dtype", "shape", "size", *titles)
    for group in _groups({name: (info.dtype, info.shape) for name, info in infos.items()}):
        dtype, shape = group.key
        size = _size(infos[name] for name in group.names)
        cells = [] if norms is None else _norm_cells({name: norms[name] for name in group.names})
        table.add_row(escape(group.pattern), _count(group), dtype, _shape(shape), size, *cells)
    return table


def _norm_cells(norms: dict[str, Norms | None]) -> list[str]:
    """RMS of all values of a group; the largest and the first not finite, with names."""
    if None in norms.values():  # all tensors of a group are of one dtype
        return ["-", "-", "-"]
    total = sum(norms.values(), Norms())
    largest = max(norms, key=lambda name: norms[name].largest)
    damaged = next((name for name, value in norms.items() if value.num_non_finite), None)
    return [
        f"{total.rms:.4g}",
        _at(f"{total.largest:.4g}", largest, norms),
        _at(f"{total.num_non_finite:,}", damaged, norms),
    ]


def _print_differences(
    console: Console,
    left: Tensors,
    left_infos: dict[str, TensorInfo],
    right: Tensors,
    right_infos: dict[str, TensorInfo],
) -> bool:
    """Prints what differs; returns whether anything does."""
    only_left = {name: info for name, info in left_infos.items() if name not in right_infos}
    only_right = {name: info for name, info in right_infos.items() if name not in left_infos}
    for folder, infos in ((_CHECKPOINT.value, only_left), (_DIFF.value, only_right)):
        if infos:
            console.print(f"only in {folder}:", _tree(infos))
    both = {n: (info, right_infos[n]) for n, info in left_infos.items() if n in right_infos}
    changed = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    if changed:
        console.print("of another dtype or shape:", _changes(changed))
    differing = {}
    if _VALUES.value:
        found = _all_differences(left, right, both)
        differing = {name: value for name, value in found.items() if value.num_values}
        if differing:
            console.print("of other values:", _distances(both, differing))
        console.print(f"values of {len(found):,} tensors compared, {len(differing):,} differ")
    console.print(
        f"{len(both):,} names in both, {len(only_left):,} only in {_CHECKPOINT.value}, "
        f"{len(only_right):,} only in {_DIFF.value}, {len(changed):,} of another dtype or shape"
    )
    return bool(only_left or only_right or changed or differing)


def _changes(pairs: dict[str, tuple[TensorInfo, TensorInfo]]) -> Table:
    table = _table("tensor", "count", _CHECKPOINT.value, _DIFF.value)
    kinds = {name: tuple((i.dtype, i.shape) for i in pair) for name, pair in pairs.items()}
    for group in _groups(kinds):
        cells = [f"{dtype} {_shape(shape)}" for dtype, shape in group.key]
        table.add_row(escape(group.pattern), _count(group), *cells)
    return table


def _distances(
    pairs: dict[str, tuple[TensorInfo, TensorInfo]], differences: dict[str, Difference]
) -> Table:
    """A line for each group in which something differs."""
    table = _table("tensor", "differ", "values", "largest absolute", "largest relative")
    for group in _groups({name: pair[0].shape for name, pair in pairs.items()}):
        found = {name: differences[name] for name in group.names if name in differences}
        if not found:
            continue
        differ = f"{len(found):,} of {len(group.names):,}"
        table.add_row(escape(group.pattern), differ, *_distance_cells(found, group.names))
    return table


def _distance_cells(found: dict[str, Difference], names: Collection[str]) -> list[str]:
    """How many values differ in a group, and by how much at most, with names."""
    far = max(found, key=lambda name: found[name].absolute)
    relatively_far = max(found, key=lambda name: found[name].relative)
    return [
        f"{sum(value.num_values for value in found.values()):,}",
        _at(f"{found[far].absolute:.4g}", far, names),
        _at(f"{found[relatively_far].relative:.4g}", relatively_far, names),
    ]


def _all_norms(source: Tensors, infos: dict[str, TensorInfo]) -> dict[str, Norms | None]:
    total = sum(info.num_bytes for info in infos.values())

    def measure(name: str, advance: Callable[[int], None]) -> Norms | None:
        return inspection.norms(source, name, advance)

    return _measure_all("norms", infos, total, measure)


def _all_differences(
    left: Tensors, right: Tensors, pairs: dict[str, tuple[TensorInfo, TensorInfo]]
) -> dict[str, Difference]:
    """Differences of what has one shape on both sides."""
    names = [name for name, (a, b) in pairs.items() if a.shape == b.shape]
    total = sum(info.num_bytes for name in names for info in pairs[name])

    def measure(name: str, advance: Callable[[int], None]) -> Difference:
        return inspection.difference(left, right, name, advance)

    return _measure_all("values", names, total, measure)


def _measure_all(
    title: str, names: Collection[str], total_bytes: int, measure: Callable[..., Any]
) -> dict[str, Any]:
    """Returns `measure(name, advance)` of each name, with a progress bar on the terminal."""
    lock, done = threading.Lock(), 0
    with (
        byte_progress(title, total_bytes, transient=True) as show,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    ):

        def advance(num_bytes: int) -> None:
            nonlocal done
            with lock:
                done += num_bytes
                show(done)

        results = pool.map(lambda name: measure(name, advance), names)
        return dict(zip(names, results, strict=True))


def _groups(keys: dict[str, Hashable]) -> list[Group]:
    if _EACH.value:
        return [Group(name, key, (name,), 1) for name, key in keys.items()]
    return inspection.group(keys)


def _table(tensor: str, *titles: str) -> Table:
    table = Table()
    table.add_column(tensor, overflow="fold")
    for title in titles:
        table.add_column(title, overflow="fold", justify="left")
    return table


def _count(group: Group) -> str:
    """How many there are, and of how many if some are missing."""
    found = f"{len(group.names):,}"
    return found if group.expected == len(group.names) else f"{found} of {group.expected:,}"


def _at(text: str, name: str | None, names: Collection[str]) -> str:
    """Adds where it is, if there is a choice."""
    return f"{text} in {escape(name)}" if name is not None and len(names) > 1 else text


def _shape(shape: tuple[int, ...]) -> str:
    return escape(str(list(shape)))


def _size(infos: Iterable[TensorInfo]) -> str:
    size = sum(info.num_bytes for info in infos)
    unit, divisor = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)
    return f"{size / divisor:,.3f} {unit}"


if __name__ == "__main__":
    program.run(main)
