"""Runs small experiments side by side and compares them.

    python tools/run_ablation.py optimizers    MuonClip against AdamW
    python tools/run_ablation.py stability     QK-clip against none, at a high learning rate
    python tools/run_ablation.py int4          INT4 experts: trained so, or rounded afterwards

The runs are those of experiments/configs/ablations, varied. --tokens is the budget of one run;
schedules stretch with it. Every run has its own folder under --out, and finished ones are not
repeated, so that the same command goes on where it was stopped. At the end --out holds
results.json, table.md and the figures.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ablation_int4 import compare_int4, int4_table
from ablation_sweep import Sweep, final_loss, vary, with_steps
from ablation_table import row, rule

from experiments.configs.ablations import int4, optimizers, stability
from kimi_jax.analysis import compare
from kimi_jax.analysis.run_log import RunLog
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import OptimizerName
from kimi_jax.core.errors import KimiError
from kimi_jax.parallel.mesh import simulate_devices

# Peak learning rates, factors of 2; a sweep whose best is at an end goes on beyond that end.
_RATES = {
    OptimizerName.ADAMW: (2e-3, 4e-3, 8e-3, 16e-3),
    OptimizerName.MUON_CLIP: (4e-3, 8e-3, 16e-3, 32e-3),
}
_MOST_RATES = 8
_SHARES = (0.4, 0.52, 0.65, 1.0)  # 52 %: arXiv 2502.16982, section 3.2
_SPIKE_WINDOW = 10  # steps that the training loss is averaged over before spikes are looked for


def compare_optimizers(
    base: ExperimentConfig, out: pathlib.Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures the share of AdamW's tokens with which MuonClip reaches AdamW's final loss.

    The learning rates are swept with the first seed at the full budget. MuonClip's shorter runs
    take the best rate of the full one and a whole schedule each, since a run in the middle of its
    schedule cannot be compared with one that has decayed.
    """
    sweep = Sweep(base, out / "runs")
    rates = {
        OptimizerName.ADAMW: options.adamw_rates,
        OptimizerName.MUON_CLIP: options.muon_clip_rates,
    }
    full = base.training.num_steps
    swept = sum(len(of_one) for of_one in rates.values() if len(of_one) > 1)
    per_seed = sum(round(full * share) for share in (1.0, *options.shares))
    sweep.steps_planned = full * swept + per_seed * len(options.seeds)
    by_rate = {
        name: sweep_rates(sweep, base, name, options.seeds[0], of_one)
        for name, of_one in rates.items()
    }
    best = {name: min(losses, key=losses.get) for name, losses in by_rate.items()}
    rows = []
    for seed in options.seeds:
        logs = run_best(sweep, base, best, seed, options.shares)
        adamw, *muon_clip = map(final_loss, logs.values())
        losses = dict(zip(options.shares, muon_clip, strict=True))
        needed = share_needed(losses, adamw)
        rows.append({"seed": seed, "adamw": adamw, "muon_clip": losses, "share_needed": needed})
        if seed == options.seeds[0]:
            line = {"AdamW's last": adamw}
            figure = compare.curves(
                logs, metric="eval/loss", title="Held-out loss", horizontal=line
            )
            figure.savefig(out / "optimizers.png")
    return {
        "tokens": full * base.batch_tokens,
        "by_rate": {n.value: losses for n, losses in by_rate.items() if len(losses) > 1},
        "best_rate": {name.value: rate for name, rate in best.items()},
        "seeds": rows,
    }


def run_best(
    sweep: Sweep,
    base: ExperimentConfig,
    best: dict[OptimizerName, float],
    seed: int,
    shares: Sequence[float],
) -> dict[str, RunLog]:
    """Runs AdamW, and then MuonClip with each share of its tokens, at their best rates."""
    rate = best[OptimizerName.ADAMW]
    logs = {"AdamW": sweep.run(*_variant(base, OptimizerName.ADAMW, rate, seed))}
    rate = best[OptimizerName.MUON_CLIP]
    for share in shares:
        variant = _variant(base, OptimizerName.MUON_CLIP, rate, seed, share)
        logs[f"MuonClip, {share:.0%} of the tokens"] = sweep.run(*variant)
    return logs


def sweep_rates(
    sweep: Sweep,
    base: ExperimentConfig,
    optimizer: OptimizerName,
    seed: int,
    rates: Sequence[float],
) -> dict[float, float]:
    """Returns the final held-out loss by learning rate; goes on while the best is at an end.

    A single rate is not tried, since there is nothing to choose.
    """
    if len(rates) == 1:
        return {rates[0]: math.nan}
    losses: dict[float, float] = {}
    waiting = list(rates)
    while waiting:
        rate = waiting.pop(0)
        losses[rate] = final_loss(sweep.run(*_variant(base, optimizer, rate, seed)))
        if not waiting and len(losses) < _MOST_RATES:
            best = min(losses, key=losses.get)
            beyond = {min(losses): 0.5, max(losses): 2.0}
            waiting = [best * beyond[best]] if best in beyond else []
            sweep.steps_planned += len(waiting) * base.training.num_steps
    return dict(sorted(losses.items()))


def _variant(
    base: ExperimentConfig, optimizer: OptimizerName, peak: float, seed: int, share: float = 1.0
) -> tuple[str, ExperimentConfig]:
    name = f"{optimizer.value}-{peak:g}-seed{seed}-{round(100 * share)}percent"
    return name, vary(base, optimizer=optimizer, peak=peak, seed=seed, share=share)


def share_needed(loss_by_share: dict[float, float], target: float) -> float | None:
    """Interpolates, over the logarithm of tokens, the share at which the loss reaches `target`.

    Returns:
      The share; the smallest that was run where even that is at the target; None where none is.
    """
    before = None
    for share, loss in sorted(loss_by_share.items()):
        if loss <= target:
            if before is None:
                return share
            fraction = (before[1] - target) / (before[1] - loss)
            return math.exp(math.log(before[0]) + fraction * math.log(share / before[0]))
        before = (share, loss)
    return None


def compare_stability(
    base: ExperimentConfig, out: pathlib.Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures the largest logit and the loss with QK-clip and without it."""
    sweep = Sweep(base, out / "runs")
    sweep.steps_planned = 2 * base.training.num_steps * len(options.seeds)
    tau, peak = base.optimizer.qk_clip_threshold, base.optimizer.schedule.peak
    rows = []
    for seed in options.seeds:
        clipped = vary(base, optimizer=OptimizerName.MUON_CLIP, peak=peak, seed=seed)
        unclipped = dataclasses.replace(clipped.optimizer, qk_clip_threshold=None)
        logs = {
            "plain Muon": sweep.run(
                f"plain-seed{seed}", dataclasses.replace(clipped, optimizer=unclipped)
            ),
            "QK-clip": sweep.run(f"clip-seed{seed}", clipped),
        }
        for kind, log in logs.items():
            rows.append({"seed": seed, "run": kind} | describe_stability(log, tau))
        if seed == options.seeds[0]:
            draw_stability(logs, tau, out)
    tokens = base.training.num_steps * base.batch_tokens
    return {"tokens": tokens, "tau": tau, "peak": peak, "runs": rows}


def draw_stability(logs: dict[str, RunLog], tau: float, out: pathlib.Path) -> None:
    """Draws the largest logit and the training loss of both runs."""
    steps = compare.Across.STEPS
    compare.curves(
        logs,
        metric="qk_clip/max_logit",
        across=steps,
        title="Largest attention logit",
        unit="logit",
        horizontal={"tau": tau},
    ).savefig(out / "stability_logits.png")
    compare.curves(logs, across=steps).savefig(out / "stability_loss.png")


def describe_stability(log: RunLog, tau: float) -> dict[str, float]:
    """Returns what one run says about logits and spikes.

    A step's maximum is that of weights which the step before it clipped, by what it had measured
    itself. What passes tau is therefore the work of one update and of another batch, and the next
    clip takes it back. `overshoot` is the largest such excess as a share of tau, `median_logit` the
    median of the maxima since tau was first passed. `spike` is the largest rise of the training
    loss, averaged over 10 steps, above its lowest value so far, in nats.
    """
    _, logits = log.series("qk_clip/max_logit")
    _, losses = log.series("loss/train")
    window = np.ones(_SPIKE_WINDOW) / _SPIKE_WINDOW
    smooth = np.convolve(losses, window, mode="valid")
    above = logits > tau
    since = logits[np.argmax(above) :] if above.any() else logits
    return {
        "max_logit": float(np.max(logits)),
        "median_logit": float(np.median(since)),
        "overshoot": float(np.max(logits) / tau - 1),
        "steps_above_tau": float(np.mean(above)),
        "spike": float(np.max(smooth - np.minimum.accumulate(smooth))),
        "eval_loss": final_loss(log),
    }


def optimizers_table(results: dict) -> str:
    """Writes the sweep and the comparison as Markdown."""
    lines = [f"{results['tokens']:,} tokens at full budget; held-out loss in nats per token.", ""]
    rates = sorted({rate for losses in results["by_rate"].values() for rate in losses})
    lines += row("learning rate", *(f"{rate:g}" for rate in rates)) + rule(len(rates) + 1)
    for name, losses in results["by_rate"].items():
        lines += row(name, *(f"{losses[r]:.4f}" if r in losses else "" for r in rates))
    shares = list(results["seeds"][0]["muon_clip"])
    headings = [f"MuonClip {share:.0%}" for share in shares]
    lines += ["", *row("seed", "AdamW 100%", *headings, "share needed"), *rule(len(shares) + 3)]
    for seed in results["seeds"]:
        losses = [f"{loss:.4f}" for loss in seed["muon_clip"].values()]
        needed = seed["share_needed"]
        bound = "at most " if needed == min(seed["muon_clip"]) else ""
        text = "not reached" if needed is None else f"{bound}{needed:.1%}"
        lines += row(seed["seed"], f"{seed['adamw']:.4f}", *losses, text)
    return "\n".join(lines) + "\n"


def stability_table(results: dict) -> str:
    """Writes the runs with and without the clip as Markdown."""
    names = [name for name in results["runs"][0] if name not in ("seed", "run")]
    lines = [
        f"{results['tokens']:,} tokens, learning rate {results['peak']:g}, tau {results['tau']:g}."
    ]
    lines += ["", *row("seed", "run", *names), *rule(len(names) + 2)]
    for run in results["runs"]:
        lines += row(run["seed"], run["run"], *(f"{run[name]:.4g}" for name in names))
    return "\n".join(lines) + "\n"


def _add_rates(parser: argparse.ArgumentParser) -> None:
    """Adds what the comparison of optimizers tries."""
    for name, rates in _RATES.items():
        parser.add_argument(
            f"--{name.value}_rates",
            type=float,
            nargs="+",
            default=rates,
            help="peak learning rates to choose from; a single one is not swept",
        )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=_SHARES, help="of AdamW's tokens, for MuonClip"
    )


_QUESTIONS = {
    "optimizers": (optimizers, compare_optimizers, optimizers_table),
    "int4": (int4, compare_int4, int4_table),
    "stability": (stability, compare_stability, stability_table),
}


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=_QUESTIONS)
    parser.add_argument("--tokens", type=int, help="of one run; by default what its config says")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    _add_rates(parser)
    parser.add_argument("--out", type=pathlib.Path, help="by default runs/ablations/QUESTION")
    options = parser.parse_args()
    config_file, measure, table = _QUESTIONS[options.question]
    base = config_file.experiment()
    if options.tokens:
        base = with_steps(base, max(1, round(options.tokens / base.batch_tokens)))
    out = options.out or pathlib.Path("runs/ablations") / options.question
    out.mkdir(parents=True, exist_ok=True)
    simulate_devices(1)
    # Most programs of a sweep are those of the run before.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))
    try:
        results = measure(base, out, options)
    except KimiError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
