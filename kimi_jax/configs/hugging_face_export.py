"""Writes the config.json of a model, as programs that know DeepSeek-V3 read it."""

import enum
from collections.abc import Mapping
from typing import Any

from kimi_jax.configs.hugging_face import FIXED, SIZES
from kimi_jax.configs.model import ModelConfig, YarnConfig
from kimi_jax.core.errors import ConfigError, require

_QUANTIZATION = "quantization_config"
TEXT_SECTION = "text_config"  # of models with a vision tower
_INT4_GROUP_SIZE = 32  # of released checkpoints

# What released files say beside sizes and constants. The model type is that of the same
# architecture which transformers, vLLM and SGLang have built in, so that none needs remote code.
_RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "model_type": "deepseek_v3",
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


class FileFormat(enum.StrEnum):
    """Format of the weights in published files."""

    BF16 = "bf16"
    FP8 = "fp8"  # E4M3 and a scale for each block of 128 x 128, as Kimi K2 is released
    INT4 = "int4"  # compressed-tensors' pack-quantized routed experts, as K2 Thinking is released


def to_hugging_face(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> dict[str, Any]:
    """Returns the config.json of a model whose weights are bfloat16.

    `model_config_from_hugging_face` reads the same configuration from it.

    Args:
      config: the model.
      bos_token_id: token that begins a text; None leaves the field out.
      eos_token_id: token that ends it, likewise.

    Raises:
      ConfigError: the routed scaling factor is left to its rule, which files have no words for.
    """
    require(
        config.routed_scaling_factor is not None,
        "model.routed_scaling_factor is None, and a config.json must have a number; set it to "
        "that of the rule, kimi_jax.model.router.routed_scaling_factor(config)",
    )
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    fields = {
        **_RELEASED,
        **FIXED,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        **{name: token for name, token in tokens.items() if token is not None},
        "num_key_value_heads": config.num_heads,
        "rope_scaling": None if config.yarn is None else _yarn(config.yarn),
        "rope_theta": config.rope_theta,
    }
    return dict(sorted(fields.items()))


def with_quantization(
    fields: Mapping[str, Any], file_format: FileFormat | str, group_size: int = _INT4_GROUP_SIZE
) -> dict[str, Any]:
    """Returns a config.json that says in what format the weights are.

    A file with a vision tower says it in its text_config, as K2.5 is released; where such a file
    says it at the top, too, both are changed.

    Args:
      fields: the contents of a config.json; what it says of another format is dropped.
      file_format: of the weights that are written beside it.
      group_size: of INT4, weights along a matrix's inputs that share a scale.

    Raises:
      ConfigError: there is no such format.
    """
    known = [member.value for member in FileFormat]
    if file_format not in known:
        raise ConfigError(f"format must be one of {', '.join(known)}, got {file_format!r}")
    section = _quantization(FileFormat(file_format), group_size)
    result = _set_section(fields, section)
    if TEXT_SECTION not in fields:
        return result
    if _QUANTIZATION not in fields:
        result = dict(fields)
    return {**result, TEXT_SECTION: _set_section(fields[TEXT_SECTION], section)}


def int4_group_size(fields: Mapping[str, Any]) -> int | None:
    """Returns how many weights share a scale, where a config.json says that some are in INT4."""
    section = fields.get(TEXT_SECTION, fields).get(_QUANTIZATION) or {}
    groups = (section.get("config_groups") or {}).values()
    return next((group["weights"]["group_size"] for group in groups), None)


def _set_section(fields: Mapping[str, Any], section: dict[str, Any] | None) -> dict[str, Any]:
    """Sets the section, or removes it where it is None; other fields keep their order."""
    if section is None:
        return {name: value for name, value in fields.items() if name != _QUANTIZATION}
    return {**fields, _QUANTIZATION: section}


def _yarn(yarn: YarnConfig) -> dict[str, Any]:
    return {
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "factor": yarn.factor,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "original_max_position_embeddings": yarn.original_max_position,
        "type": "yarn",
    }


def _quantization(file_format: FileFormat, group_size: int) -> dict[str, Any] | None:
    if file_format is FileFormat.BF16:
        return None
    if file_format is FileFormat.FP8:
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": _int4_weights(group_size),
            }
        },
        "format": "pack-quantized",
        # All linear layers but those of the routed experts.
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _int4_weights(group_size: int) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
