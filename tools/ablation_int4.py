"""Quantisation-aware training against rounding afterwards."""

import argparse
import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np
from ablation_sweep import Sweep, final_loss, vary
from ablation_table import row, rule

from kimi_jax.analysis import compare, style
from kimi_jax.analysis.run_log import RunLog
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import OptimizerName
from kimi_jax.configs.quantization import QuantizationConfig

_ROUNDED = "eval/rounded_loss"
_SHOWN_BEFORE = 0.9  # share of the tokens before the switch that are not drawn


def compare_int4(
    base: ExperimentConfig, out: pathlib.Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures what INT4 costs when it is trained with (QAT) and when it is not (PTQ).

    For each seed one run without it, whose last weights are measured as they are and rounded, and
    one run with the same tokens that rounds from `quantization.start_step` on.
    """
    sweep = Sweep(base, out / "runs")
    sweep.steps_planned = 2 * base.training.num_steps * len(options.seeds)
    rows = []
    for seed in options.seeds:
        qat = vary(
            base, optimizer=OptimizerName.MUON_CLIP, peak=base.optimizer.schedule.peak, seed=seed
        )
        plain = dataclasses.replace(qat, quantization=QuantizationConfig())
        logs = {
            "bfloat16": sweep.run(f"plain-seed{seed}", plain, rounded=qat.quantization),
            "QAT": sweep.run(f"qat-seed{seed}", qat),
        }
        rows.append({"seed": seed} | describe(*logs.values()))
        if seed == options.seeds[0]:
            draw(logs, base, out)
    ptq, qat = (np.mean([line[name] for line in rows]) for name in ("ptq_lost", "qat_lost"))
    return {
        "tokens": base.training.num_steps * base.batch_tokens,
        "steps_before_int4": base.quantization.start_step,
        "tokens_before_int4": base.quantization.start_step * base.batch_tokens,
        "seeds": rows,
        "mean": {"ptq_lost": float(ptq), "qat_lost": float(qat), "ratio": float(qat / ptq)},
    }


def describe(plain: RunLog, qat: RunLog) -> dict[str, float]:
    """Returns held-out losses, what either way to INT4 loses, and the ratio of that.

    `steps_in_common` are the first ones whose training losses are the same, bit for bit.
    """
    _, rounded = plain.series(_ROUNDED)
    losses = {"bfloat16": final_loss(plain), "ptq": float(rounded[-1]), "qat": final_loss(qat)}
    ptq_lost, qat_lost = (losses[name] - losses["bfloat16"] for name in ("ptq", "qat"))
    common = itertools.takewhile(
        lambda pair: pair[0] == pair[1],
        zip(plain.series("loss/train")[1], qat.series("loss/train")[1], strict=False),
    )
    return losses | {
        "ptq_lost": ptq_lost,
        "qat_lost": qat_lost,
        "ratio": qat_lost / ptq_lost,
        "steps_in_common": len(list(common)),
    }


def draw(logs: dict[str, RunLog], config: ExperimentConfig, out: pathlib.Path) -> None:
    """Draws held-out loss from shortly before the switch on, and where rounding would end."""
    _, rounded = logs["bfloat16"].series(_ROUNDED)
    switch = config.quantization.start_step
    figure = compare.curves(
        logs,
        metric="eval/loss",
        title="Held-out loss",
        vertical={"INT4 begins": switch * config.batch_tokens},
    )
    (axis,) = figure.axes
    end = config.training.num_steps * config.batch_tokens
    axis.plot(end, rounded[-1], "o", color=style.PALETTE[0], label="bfloat16, rounded at the end")
    style.legend(axis)
    steps, losses = logs["QAT"].series("eval/loss")
    shown = np.append(losses[steps + 1 >= switch], rounded[-1])
    axis.set_xlim(left=_SHOWN_BEFORE * switch * config.batch_tokens)
    axis.set_ylim(top=float(np.max(shown)) + float(np.ptp(shown)))
    figure.savefig(out / "int4.png")


def int4_table(results: dict) -> str:
    """Writes the comparison as Markdown."""
    lines = [
        f"{results['tokens']:,} tokens, QAT after {results['tokens_before_int4']:,} of them; "
        "held-out loss in nats per token.",
        "",
        *row("seed", "bfloat16", "PTQ", "QAT", "PTQ - bfloat16", "QAT - bfloat16", "ratio"),
        *rule(7),
    ]
    for seed in results["seeds"]:
        losses = [f"{seed[name]:.4f}" for name in ("bfloat16", "ptq", "qat")]
        lines += row(seed["seed"], *losses, *_lost(seed))
    lines += row("mean", "", "", "", *_lost(results["mean"]))
    return "\n".join(lines) + "\n"


def _lost(values: dict[str, float]) -> list[str]:
    lost = [f"{values[name]:+.4f}" for name in ("ptq_lost", "qat_lost")]
    return [*lost, f"{values['ratio']:.2f}"]
