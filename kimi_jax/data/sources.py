"""Finds the files of a source and reads their documents, one at a time."""

import glob
import importlib.util
import os
import pathlib
import sysconfig
from collections.abc import Iterator

from kimi_jax.configs.data import SourceConfig, SourceKind
from kimi_jax.core.errors import DataError
from kimi_jax.data import record_files
from kimi_jax.data.documents import Document

TEXT_SUFFIXES = tuple(
    [
        ".txt",
        ".md",
        ".rst",
        ".tex",
        ".py",
        ".pyi",
        ".ipynb",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".rs",
        ".go",
        ".java",
        ".kt",
        ".js",
        ".ts",
        ".html",
        ".css",
        ".sh",
        ".sql",
        ".rb",
        ".pl",
        ".lua",
        ".hs",
        ".ml",
        ".scala",
        ".swift",
        ".jl",
        ".r",
        ".f90",
        ".proto",
        ".toml",
        ".yaml",
        ".yml",
        ".json",
    ]
)
_FOLDER_SUFFIXES = {
    SourceKind.JSONL: (".jsonl", ".jsonl.gz"),
    SourceKind.PARQUET: (".parquet",),
    SourceKind.ARRAY_RECORD: (".array_record", ".arrayrecord"),
}
_FOREIGN_FOLDERS = frozenset(("site-packages", "dist-packages", "__pycache__"))


def source_files(source: SourceConfig, option: str) -> list[pathlib.Path]:
    """Returns the files of a source in the order in which they are read.

    Args:
      source: the source.
      option: how the user addresses it, such as "data.sources.mine".

    Raises:
      DataError: there is no such file, or the folder has none of the right kind.
    """
    if source.kind is SourceKind.EMBEDDED:
        return _embedded_files()
    path = pathlib.Path(source.path).expanduser()
    suffixes = _FOLDER_SUFFIXES.get(source.kind) or source.suffixes or TEXT_SUFFIXES
    if path.is_dir():
        files = _files_below(path, suffixes)
        missing = f"has no file that ends in {', '.join(suffixes)}"
    elif path.is_file():
        files, missing = [path], ""
    else:
        found = glob.iglob(str(path), recursive=True)
        files = sorted(file for file in map(pathlib.Path, found) if file.is_file())
        missing = "is no file, no folder, and no pattern that matches a file"
    if not files:
        raise DataError(f"{option}.path {source.path!r} {missing}")
    if source.kind is not SourceKind.TEXT:
        _check_suffixes(files, suffixes, source, option)
    return files


def read_documents(source: SourceConfig, option: str) -> Iterator[Document]:
    """Yields the documents of a source, the empty ones left out.

    Args:
      source: the source.
      option: how the user addresses it, such as "data.sources.mine".

    Raises:
      DataError: a file is missing, unreadable, malformed, or not valid UTF-8.
    """
    if source.kind is SourceKind.EMBEDDED:
        yield from _embedded_documents()
        return
    path = pathlib.Path(source.path).expanduser()
    for file in source_files(source, option):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            yield from _file_documents(file, name, source, option)
        except OSError as error:
            raise DataError(f"{option}.path: cannot read {file}: {error}") from error


def _file_documents(
    file: pathlib.Path, name: str, source: SourceConfig, option: str
) -> Iterator[Document]:
    match source.kind:
        case SourceKind.TEXT:
            records = iter([(name, record_files.decode_utf8(file.read_bytes(), str(file)))])
        case SourceKind.JSONL:
            records = record_files.read_jsonl(file, name, source.text_field, option)
        case SourceKind.PARQUET:
            records = record_files.read_parquet(file, name, source.text_field, option)
        case SourceKind.ARRAY_RECORD:
            records = record_files.read_array_record(file, name)
    for record_name, text in records:
        if text:
            yield Document(record_name, text, len(text.encode()))


def _check_suffixes(
    files: list[pathlib.Path], suffixes: tuple[str, ...], source: SourceConfig, option: str
) -> None:
    for file in files:
        if not file.name.endswith(suffixes):
            raise DataError(
                f"{option}.path: {file} does not end in {' or '.join(suffixes)}, as files of "
                f"{option}.kind {source.kind.value!r} do"
            )


def _files_below(
    folder: pathlib.Path, suffixes: tuple[str, ...], foreign: frozenset[str] = frozenset()
) -> list[pathlib.Path]:
    """Returns the files in `folder` and below, sorted, hidden and `foreign` folders left out."""
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name not in foreign]
        files += [
            os.path.join(root, name) for name in names if name[0] != "." and name.endswith(suffixes)
        ]
    return [pathlib.Path(file) for file in sorted(files) if os.path.isfile(file)]


def _embedded_files() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    # The topics come as documents of their own; their source file would repeat held-out ones.
    topics = root / "pydoc_data" / "topics.py"
    return [file for file in _files_below(root, (".py",), _FOREIGN_FOLDERS) if file != topics]


def _embedded_documents() -> Iterator[Document]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for file in _embedded_files():
        raw = file.read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:  # the library tests its own decoders with such files
            continue
        if text:
            yield Document(f"python/{file.relative_to(root).as_posix()}", text, len(raw))
    if importlib.util.find_spec("pydoc_data") is None:  # some systems package it apart
        return
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield Document(f"topics/{topic}", text, len(text.encode()))
