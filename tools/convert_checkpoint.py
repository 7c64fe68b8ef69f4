"""Converts a checkpoint to a published form, a block of rows at a time.

    python tools/convert_checkpoint.py --input=runs/tiny_cpu --output=exports/tiny --format=bf16
    python tools/convert_checkpoint.py --input=Kimi-K2-Instruct --output=K2-bf16 --format=bf16
    python tools/convert_checkpoint.py --input=Kimi-K2-Instruct --output=K2.gguf --format=gguf_q8_0

The input is a folder in Hugging Face's form (bfloat16, FP8 or INT4), the folder of a run (its
newest checkpoint), or one that tools/pack_int4.py has written. The output has config.json, index
and tokenizer beside its weights, or is one GGUF file.

What is written waits under the output's name with .partial until all is there; the same command
continues one that was stopped. --plan prints what would be written, and needs no more of the input
than its config.json. --verify reads the output back.
"""

import pathlib

import jax
from absl import flags
from checkpoint_source import Input, describe, is_carried, open_input
from rich.console import Console
from rich.table import Table

from experiments import program
from kimi_jax.configs.hugging_face_export import FileFormat, with_quantization
from kimi_jax.core.byte_progress import byte_progress
from kimi_jax.core.errors import require
from kimi_jax.interop import verification
from kimi_jax.interop.gguf import GgufType, plan_gguf, verify_gguf, write_gguf
from kimi_jax.interop.gguf_tokenizer import VOCABULARY_FILES, read_gguf_tokenizer
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_encode import Encoder, peak_bytes
from kimi_jax.interop.hf_export import PlannedFile, export_hugging_face, plan_export
from kimi_jax.interop.hf_names import hf_tensors

_GB = 1e9
_GGUF = {f"gguf_{kind.value}": kind for kind in GgufType}
_FORMATS = [*(form.value for form in FileFormat), *_GGUF]

_INPUT = flags.DEFINE_string("input", None, "folder to convert", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write; must not exist")
_FORMAT = flags.DEFINE_enum(
    "format", None, _FORMATS, "of the weights; gguf_... writes one file", required=True
)
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "largest size of a safetensors file, in GB")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "folder whose files go beside the weights; by default those of the input"
)
_PLAN = flags.DEFINE_bool("plan", False, "print what would be written, and write nothing")
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "read the output back: its bytes are held against the input converted once more, and the "
    "logits of both sides on a prompt are compared where the model is small",
)


def main() -> None:
    """Plans, or converts and verifies."""
    jax.config.update("jax_platforms", "cpu")  # accelerators have other work
    require(_SHARD_GB.value > 0, f"--shard_gb must be positive, got {_SHARD_GB.value}")
    if _PLAN.value:
        Console().print(_plan_table())
        return
    require(_OUTPUT.value is not None, "--output is missing: name what to write")
    with open_input(_INPUT.value) as given:
        if _FORMAT.value in _GGUF:
            _convert_to_gguf(given)
            return
        encoder = _encoder(given)
        _convert(given, encoder)
        if _VERIFY.value:
            _verify(given, encoder)


def _convert_to_gguf(given: Input) -> None:
    kind = _GGUF[_FORMAT.value]
    num_bytes = sum(tensor.num_bytes for tensor in plan_gguf(given.source.config, kind))
    vocabularies = [file for file in _carried(given) if file.name in VOCABULARY_FILES]
    tokenizer = read_gguf_tokenizer(vocabularies[0]) if vocabularies else None
    _announce(given, num_bytes, "1 file")
    if tokenizer is None:
        Console().print("the file will have no tokenizer, as there is none beside the input")
    with byte_progress("converting", num_bytes) as progress:
        write_gguf(
            _OUTPUT.value,
            given.source,
            tokenizer,
            weight_type=kind,
            identity=given.identity,
            progress=progress,
        )
    if _VERIFY.value:
        with byte_progress("verifying", num_bytes) as progress:
            verify_gguf(_OUTPUT.value, given.source, weight_type=kind, progress=progress)
        _announce_verified(num_bytes)


def _announce_verified(num_bytes: int) -> None:
    Console().print(f"{num_bytes / _GB:,.3f} GB on disk are what the input converts to")


def _announce(given: Input, num_bytes: int, files: str) -> None:
    Console().print(
        f"{_INPUT.value} ({given.what}) -> {_OUTPUT.value}: {_FORMAT.value}, {files}, "
        f"{num_bytes / _GB:,.3f} GB"
    )


def _encoder(given: Input) -> Encoder:
    return Encoder(given.source, FileFormat(_FORMAT.value), given.group_size)


def _convert(given: Input, encoder: Encoder) -> None:
    plan = _plan(encoder)
    num_bytes = sum(file.num_bytes for file in plan)
    _announce(given, num_bytes, f"{len(plan)} file" + "s" * (len(plan) > 1))
    carried = _carried(given)
    if not carried:
        Console().print("no tokenizer lies beside the input; --tokenizer=FOLDER names one")
    with byte_progress("converting", num_bytes) as progress:
        export_hugging_face(
            _OUTPUT.value,
            encoder,
            fields=with_quantization(given.fields, encoder.form, encoder.group_size),
            identity=given.identity,
            carried=carried,
            shard_bytes=_shard_bytes(),
            progress=progress,
        )


def _carried(given: Input) -> list[pathlib.Path]:
    if _TOKENIZER.value is None:
        return given.carried
    folder = pathlib.Path(_TOKENIZER.value)
    require(folder.is_dir(), f"--tokenizer={folder} is no folder")
    return [file for file in sorted(folder.iterdir()) if is_carried(file)]


def _verify(given: Input, encoder: Encoder) -> None:
    num_bytes = sum(file.num_bytes for file in _plan(encoder))
    with byte_progress("verifying", num_bytes) as progress:
        verification.verify_bytes(_OUTPUT.value, encoder, progress)
    _announce_verified(num_bytes)
    if not verification.is_small(given.source):
        return
    with HfCheckpoint(_OUTPUT.value) as written:
        found = verification.compare_logits(given.source, written)
    Console().print(
        f"logits on {verification.LENGTH} random tokens, in float32: at most {found.largest:.3g} "
        f"apart (their RMS is {found.scale:.3g}), the same token preferred at "
        f"{found.same_choice:.1%} of the positions"
    )


def _plan(encoder: Encoder) -> tuple[PlannedFile, ...]:
    return plan_export(
        encoder.source.config,
        encoder.form,
        group_size=encoder.group_size,
        shard_bytes=_shard_bytes(),
    )


def _shard_bytes() -> int:
    return int(_SHARD_GB.value * _GB)


def _plan_table() -> Table:
    """What a conversion would write; from the configuration alone."""
    config, group_size, held_bytes = describe(_INPUT.value)
    if _FORMAT.value in _GGUF:
        planned = plan_gguf(config, _GGUF[_FORMAT.value])
        sizes = [(tensor.stored.value, tensor.num_bytes) for tensor in planned]
        files = [sum(size for _, size in sizes)]
    else:
        form = FileFormat(_FORMAT.value)
        plan = plan_export(config, form, group_size=group_size, shard_bytes=_shard_bytes())
        sizes = [(info.dtype, info.num_bytes) for file in plan for info in file.infos]
        files = [file.num_bytes for file in plan]
    table = Table("", "tensors", "GB", title=f"{_INPUT.value} as {_FORMAT.value}")
    for dtype in dict.fromkeys(dtype for dtype, _ in sizes):
        own = [size for other, size in sizes if other == dtype]
        table.add_row(dtype, f"{len(own):,}", f"{sum(own) / _GB:,.3f}")
    table.add_section()
    table.add_row("all", f"{len(sizes):,}", f"{sum(files) / _GB:,.1f}")
    table.add_row("files", f"{len(files):,}", f"at most {max(files) / _GB:,.2f}")
    memory = held_bytes + peak_bytes(hf_tensors(config).values())
    table.add_row("memory, at most", "", f"{memory / _GB:.2f}")
    return table


if __name__ == "__main__":
    program.run(main)
