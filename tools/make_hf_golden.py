"""Writes tests/golden/hf: what Hugging Face's DeepseekV3ForCausalLM computes for tiny models.

Usage, from the root of the repository, in an environment with the extra `golden`:

    python tools/make_hf_golden.py

Each case of `CASES` becomes one .npz with the configuration, every weight, the inputs, and what the
reference makes of them: logits, loss, all gradients, chosen experts. README.md beside the files
says what each entry means.

The reference runs twice. In float32 it is the released code as it stands. In float64 its own casts
to float32 (norms, router, softmax, rotary angles) are lifted too. The files keep the float64
results, and how far the float32 results are from them.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers.models.deepseek_v3 import modeling_deepseek_v3

NUM_SEQUENCES = 2
SEQUENCE_LENGTH = 24
LAST_POSITION = 100  # of the second sequence, whose positions have gaps; far beyond YaRN's 32
# Experts whose scores are closer than this could be exchanged by rounding alone.
MIN_MARGIN = 5e-4
MAX_SEEDS = 200

# Every width is a different number, so that no two axes can be mixed up unnoticed.
TINY_K2 = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 9,
    "qk_rope_head_dim": 16,
    "v_head_dim": 7,
    "intermediate_size": 22,
    "moe_intermediate_size": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}


def yarn(**changes: float) -> dict[str, Any]:
    """Context extension as K2 has it, but for the changes, from a native context of 32 tokens."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 50_000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        **changes,
    }
    extended = int(rope["factor"] * rope["original_max_position_embeddings"])
    return {"rope_parameters": rope, "max_position_embeddings": extended}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn_k2": yarn(),
    "yarn_k2_5": {**yarn(beta_fast=32.0, factor=64.0), "rms_norm_eps": 1e-5},
    # Four experts in a group, so that the best two are not the whole group. No published model has
    # unequal mscales; here they make the multiplier of cos and sin differ from 1.
    "groups": {
        **yarn(rope_theta=10_000.0, beta_fast=32.0, factor=40.0, mscale=1.0, mscale_all_dim=0.6),
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 1,
    },
    "no_query_latent": {
        "q_lora_rank": None,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
    },
    "two_shared_experts": {"n_shared_experts": 2, "first_k_dense_replace": 0},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the reference computes.

    Attributes:
      logits: [B, T, V].
      loss: mean cross-entropy of the next token.
      gradients: of the loss, by the parameter's name.
      chosen: ids of each token's experts in rising order, [W, K], by layer.
      margin: smallest distance between a chosen score and the best one not chosen.
      moved_by_bias: part of the tokens whose experts are not those with the highest scores.
    """

    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    chosen: dict[int, np.ndarray]
    margin: float
    moved_by_bias: float


def build(case: str) -> modeling_deepseek_v3.DeepseekV3ForCausalLM:
    """The reference of a case, eager, with the configured epsilon in all of its norms."""
    config = transformers.DeepseekV3Config(
        **{**TINY_K2, **CASES[case]},
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = modeling_deepseek_v3.DeepseekV3ForCausalLM(config)
    # The reference leaves the norms of the latents at 1e-6 whatever the configuration says; the
    # released models were trained and are served with the configured one.
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = config.rms_norm_eps
    return model.train()


def random_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws a weight that float16 holds exactly.

    Embedding and latents are small, so that an epsilon of 1e-5 shows; everything else is large
    enough for scores, logits and gates far from zero.
    """
    noise = rng.standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        return (0.2 * noise).astype(np.float16)
    if name.endswith("norm.weight"):
        return (1 + 0.2 * noise).astype(np.float16)
    if name.endswith("embed_tokens.weight"):
        return (0.03 * noise).astype(np.float16)
    weight = 1.5 / math.sqrt(shape[-1]) * noise
    if name.endswith("q_a_proj.weight"):
        weight *= 0.03
    if name.endswith("kv_a_proj_with_mqa.weight"):
        weight[: TINY_K2["kv_lora_rank"]] *= 0.03
    return weight.astype(np.float16)


def random_weights(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws every weight of the model, by its name in the state dict."""
    return {
        name: random_weight(name, tuple(value.shape), rng)
        for name, value in model.state_dict().items()
    }


def random_inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and positions: one sequence from 0 without gaps, one with gaps."""
    shape = (NUM_SEQUENCES, SEQUENCE_LENGTH)
    tokens = rng.integers(0, TINY_K2["vocab_size"], shape).astype(np.int32)
    with_gaps = np.sort(rng.choice(LAST_POSITION, SEQUENCE_LENGTH, replace=False))
    positions = np.stack([np.arange(SEQUENCE_LENGTH), with_gaps]).astype(np.int32)
    return tokens, positions


def score_margin(scores: torch.Tensor, bias: torch.Tensor, config: Any) -> float:
    """Smallest distance, over tokens, between the last chosen and the first rejected.

    Args:
      scores: [W, E], before the bias.
      bias: [E].
      config: of the reference.

    Returns:
      The smaller one of the margins between groups and between experts.
    """
    biased = (scores + bias).unflatten(-1, (config.n_group, -1))
    group_scores = biased.topk(2, dim=-1).values.sum(-1)
    margins = []
    if config.topk_group < config.n_group:
        best = group_scores.sort(dim=-1, descending=True).values
        margins.append(best[:, config.topk_group - 1] - best[:, config.topk_group])
    rejected = group_scores.argsort(dim=-1, descending=True)[:, config.topk_group :]
    open_to_token = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, rejected, False)
    biased = biased.masked_fill(~open_to_token.unsqueeze(-1), -math.inf).flatten(1)
    best = biased.sort(dim=-1, descending=True).values
    margins.append(best[:, config.num_experts_per_tok - 1] - best[:, config.num_experts_per_tok])
    return min(float(margin.min()) for margin in margins)


def watch_routers(model: torch.nn.Module) -> Iterator[Callable[[], tuple]]:
    """Yields, per expert layer, a function that tells (layer, logits, chosen) of the last run."""
    for layer, block in enumerate(model.model.layers):
        if not hasattr(block.mlp, "gate"):
            continue
        seen = []
        block.mlp.gate.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        yield lambda layer=layer, seen=seen: (layer, seen[-1][0], seen[-1][2])


@contextlib.contextmanager
def float32_means(dtype: torch.dtype) -> Iterator[None]:
    """Makes the casts to float32 that the reference's code spells out casts to `dtype`."""
    with (
        mock.patch.object(torch, "float32", dtype),
        mock.patch.object(torch, "float", dtype),
        mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.to(dtype)),
    ):
        yield


def run(
    case: str,
    weights: dict[str, np.ndarray],
    inputs: tuple[np.ndarray, np.ndarray],
    dtype: torch.dtype,
) -> Outcome:
    """Runs the reference forward and backward in one precision."""
    with float32_means(dtype):
        model = build(case)
    model = model.to(dtype)
    model.load_state_dict({k: torch.from_numpy(v).to(dtype) for k, v in weights.items()})
    tokens, positions = (torch.from_numpy(value).long() for value in inputs)
    length = tokens.shape[1]
    # An explicit mask: without one, gaps in the positions would be taken for packed sequences.
    mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
    routers = list(watch_routers(model))
    with float32_means(dtype):
        logits = model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask.expand(len(tokens), 1, length, length),
            use_cache=False,
        ).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return Outcome(
        logits=logits.detach().numpy(),
        loss=float(loss.detach()),
        gradients={name: value.grad.numpy().copy() for name, value in model.named_parameters()},
        **inspect_routing(model, [router() for router in routers]),
    )


def inspect_routing(model: torch.nn.Module, routings: list[tuple]) -> dict[str, Any]:
    """The routing fields of `Outcome`."""
    chosen, margins, moved = {}, [], []
    for layer, router_logits, experts in routings:
        scores = router_logits.detach().sigmoid()
        bias = model.model.layers[layer].mlp.gate.e_score_correction_bias
        margins.append(score_margin(scores, bias, model.config))
        chosen[layer] = experts.sort(dim=-1).values.numpy().astype(np.int32)
        unbiased = scores.topk(experts.shape[-1], dim=-1).indices.sort(dim=-1).values.numpy()
        moved.append((unbiased != chosen[layer]).any(-1).mean())
    return {"chosen": chosen, "margin": min(margins), "moved_by_bias": float(np.mean(moved))}


def worst_distance(outcome: Outcome, reference: Outcome) -> float:
    """Largest difference in logits, loss and gradients, each relative to its largest value."""

    def distance(value: Any, exact: Any) -> float:
        return float(np.max(np.abs(value - exact)) / np.max(np.abs(exact)))

    return max(
        distance(outcome.logits, reference.logits),
        distance(outcome.loss, reference.loss),
        *(distance(outcome.gradients[k], v) for k, v in reference.gradients.items()),
    )


def make_case(case: str, first_seed: int) -> dict[str, np.ndarray]:
    """Computes the entries of one file, with the first seed whose routing rounding cannot change.

    Raises:
      RuntimeError: no seed has a clear routing, or the two precisions route differently.
    """
    for seed in range(first_seed, first_seed + MAX_SEEDS):
        rng = np.random.default_rng(seed)
        model = build(case)
        weights = random_weights(model, rng)
        inputs = random_inputs(rng)
        exact = run(case, weights, inputs, torch.float64)
        if exact.margin >= MIN_MARGIN:
            break
    else:
        raise RuntimeError(f"{case}: no seed gives scores that are {MIN_MARGIN} apart")
    single = run(case, weights, inputs, torch.float32)
    for layer, chosen in exact.chosen.items():
        if not np.array_equal(chosen, single.chosen[layer]):
            raise RuntimeError(f"{case}: float32 and float64 route differently in layer {layer}")
    metadata = {
        "config": model.config.to_dict(),
        "provenance": provenance(seed),
        "float32_distance": worst_distance(single, exact),
        "margin": exact.margin,
        "moved_by_bias": exact.moved_by_bias,
    }
    print(case, {key: metadata[key] for key in ("float32_distance", "margin", "moved_by_bias")})
    return {
        "metadata": np.array(json.dumps(metadata, sort_keys=True)),
        "tokens": inputs[0],
        "positions": inputs[1],
        "logits": exact.logits,
        "loss": np.array(exact.loss),
        **{f"weights/{name}": value for name, value in weights.items()},
        **{f"gradients/{k}": v.astype(np.float32) for k, v in exact.gradients.items()},
        **{f"chosen/{layer}": value.astype(np.int8) for layer, value in exact.chosen.items()},
    }


def provenance(seed: int) -> dict[str, Any]:
    """How a file came to be."""
    return {
        "command": "python tools/make_hf_golden.py",
        "date": datetime.date.today().isoformat(),
        "numpy": np.__version__,
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Writes every case, or the ones named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden/hf"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    for case in options.cases:
        np.savez_compressed(options.out / f"{case}.npz", **make_case(case, options.seed))


if __name__ == "__main__":
    main()
