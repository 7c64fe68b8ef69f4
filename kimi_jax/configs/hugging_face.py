"""Reads the config.json of published models of the family: Kimi K2, DeepSeek-V3, Moonlight."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from kimi_jax.configs.model import ModelConfig, YarnConfig
from kimi_jax.core.errors import ConfigError, require

_MODEL_TYPES = ("kimi_k2", "deepseek_v3")
_WITH_VISION = "kimi_k25"  # its language model is described in text_config

# Theirs -> ours; each must be given.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "num_dense_layers",
    "num_attention_heads": "num_heads",
    "q_lora_rank": "q_latent_dim",
    "kv_lora_rank": "kv_latent_dim",
    "qk_nope_head_dim": "head_nope_dim",
    "qk_rope_head_dim": "head_rope_dim",
    "v_head_dim": "head_value_dim",
    "intermediate_size": "dense_ffn_dim",
    "moe_intermediate_size": "expert_ffn_dim",
    "n_routed_experts": "num_routed_experts",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "experts_per_token",
    "n_group": "num_expert_groups",
    "topk_group": "expert_groups_per_token",
    "routed_scaling_factor": "routed_scaling_factor",
    "max_position_embeddings": "max_position",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}

# The only values that this model can compute; where a field is absent, the family means them.
FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

_ROPE_FIELDS = ("rope_scaling", "rope_parameters", "rope_theta")
_MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")

# Fields that do not change what the layers compute.
_WITHOUT_EFFECT = frozenset(
    {
        # What the files are.
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "model_type",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        # How texts are tokenized and classified.
        "bos_token_id",
        "eos_token_id",
        "id2label",
        "label2id",
        "pad_token_id",
        # What follows from other fields, or is checked against them.
        "head_dim",
        "num_key_value_heads",
        "qk_head_dim",
        # Other losses, and how training was laid out.
        "aux_loss_alpha",
        "ep_size",
        "pretraining_tp",
        "router_aux_loss_coef",
        "seq_aux",
        # Every configuration of the transformers library: interfaces and text generation.
        "add_cross_attention",
        "chunk_size_feed_forward",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "is_decoder",
        "is_encoder_decoder",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    }
)

_NO_SCALING = ("default", "none")


def model_config_from_hugging_face(config: Mapping[str, Any] | str | pathlib.Path) -> ModelConfig:
    """Returns our configuration of the model that a config.json describes.

    Multi-token prediction layers and vision towers are not part of this model; a warning in the log
    says where they are left out. How weights are quantized on disk is left out too.

    Args:
      config: the contents of a config.json, or its path.

    Raises:
      ConfigError: naming the field, where one is missing, unknown, or asks for mathematics that
        this model does not have.
    """
    fields = config if isinstance(config, Mapping) else _read(pathlib.Path(config))
    if fields.get("model_type") == _WITH_VISION:
        _check_fixed(fields)
        fields = _get(fields, "text_config")
        logging.warning("the vision tower of %s is left out: text_config only", _WITH_VISION)
    model_type = _get(fields, "model_type")
    require(
        model_type in _MODEL_TYPES,
        f"model_type must be one of {', '.join((*_MODEL_TYPES, _WITH_VISION))}, got {model_type!r}",
    )
    _check_fixed(fields)
    _check_key_value_heads(fields)
    _check_known(fields)
    _warn_of_token_prediction(fields)
    theta, yarn = _rope(fields)
    return ModelConfig(**_sizes(fields), rope_theta=theta, yarn=yarn)


def _read(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the config.json") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    require(isinstance(fields, Mapping), f"{path} must hold a JSON object")
    return fields


def _get(fields: Mapping[str, Any], name: str) -> Any:
    require(name in fields, f"{name} is missing; a config.json of this family has it")
    return fields[name]


def _sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {ours: _get(fields, theirs) for theirs, ours in SIZES.items()}
    for theirs, ours in SIZES.items():
        # Only the query latent has a meaning when it is null: queries are projected directly.
        require(
            sizes[ours] is not None or theirs == "q_lora_rank",
            f"{theirs} must be a number, got null",
        )
    return sizes


def _check_fixed(fields: Mapping[str, Any]) -> None:
    for name, only in FIXED.items():
        value = fields.get(name, only)
        require(value == only, f"{name} must be {only!r} in this model, got {value!r}")


def _check_key_value_heads(fields: Mapping[str, Any]) -> None:
    heads = _get(fields, "num_attention_heads")
    given = fields.get("num_key_value_heads")
    require(
        given is None or given == heads,
        f"num_key_value_heads must be num_attention_heads ({heads}), since every head has its own "
        f"keys and values; got {given}",
    )


def _check_known(fields: Mapping[str, Any]) -> None:
    known = {*SIZES, *FIXED, *_ROPE_FIELDS, *_MTP_FIELDS, *_WITHOUT_EFFECT}
    unknown = sorted(name for name in fields.keys() - known if fields[name] is not None)
    require(
        not unknown,
        f"unknown field {', '.join(f'{name} = {fields[name]!r}' for name in unknown)}; if it "
        "does not change what the layers compute, remove it from the config.json",
    )


def _warn_of_token_prediction(fields: Mapping[str, Any]) -> None:
    for name in _MTP_FIELDS:
        if fields.get(name):
            logging.warning(
                "%s is %s: multi-token prediction layers are left out", name, fields[name]
            )


def _rope(fields: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """Reads theta and YaRN from `rope_scaling`, or from its newer name `rope_parameters`."""
    given = [name for name in ("rope_scaling", "rope_parameters") if fields.get(name)]
    require(len(given) <= 1, "rope_scaling and rope_parameters are both given; keep one")
    section = given[0] if given else "rope_scaling"
    rope = dict(fields.get(section) or {})
    theta = rope.pop("rope_theta", None) or _get(fields, "rope_theta")
    kinds = {rope.pop(name) for name in ("type", "rope_type") if name in rope} or {"default"}
    require(
        kinds <= {"yarn"} or kinds <= set(_NO_SCALING),
        f"{section}.type must be yarn, default or none, got {', '.join(sorted(map(str, kinds)))}",
    )
    if kinds == {"yarn"}:
        return theta, _yarn(rope, section)
    require(not rope, f"{section} has {', '.join(sorted(rope))} without type yarn")
    return theta, None


def _yarn(rope: dict[str, Any], section: str) -> YarnConfig:
    def take(name: str) -> Any:
        require(name in rope, f"{section}.{name} is missing; YaRN needs it")
        return rope.pop(name)

    truncate = rope.pop("truncate", True)
    require(truncate is True, f"{section}.truncate must be true in this model, got {truncate!r}")
    # Both, because published programs disagree about one mscale without the other.
    yarn = YarnConfig(
        factor=take("factor"),
        original_max_position=take("original_max_position_embeddings"),
        beta_fast=rope.pop("beta_fast", 32.0),
        beta_slow=rope.pop("beta_slow", 1.0),
        mscale=take("mscale"),
        mscale_all_dim=take("mscale_all_dim"),
    )
    unknown = sorted(name for name, value in rope.items() if value is not None)
    require(not unknown, f"{section} has unknown fields: {', '.join(unknown)}")
    return yarn
