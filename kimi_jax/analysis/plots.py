"""Figures of one run. Each takes a `RunLog` and returns a matplotlib `Figure`.

What was not recorded is left out, and a panel that has nothing to show says so.
"""

from typing import Any

import numpy as np

from kimi_jax.analysis import style
from kimi_jax.analysis.run_log import RunLog

GIB = 2**30
SMOOTHING_SHARE = 50  # curves are smoothed over one part in so many of the run


def loss(run: RunLog) -> Any:
    """Training loss, every step and smoothed, with held-out loss."""
    figure, (axis,) = style.figure()
    steps, values = run.series("loss/train")
    if len(steps):
        _noisy_line(axis, steps, values, style.BLUE, "training")
    else:
        style.missing(axis, "loss/train")
    held_out_steps, held_out = run.series("eval/loss")
    if len(held_out_steps):
        axis.plot(
            held_out_steps, held_out, "o-", color=style.ORANGE, markersize=4, label="held out"
        )
    style.label(axis, title="Loss", x="step", y="nats per token")
    style.legend(axis)
    return figure


def bits_per_byte(run: RunLog) -> Any:
    """Held-out bits per byte beside what counting bytes and what gzip reach."""
    figure, (axis,) = style.figure()
    steps, values = run.series("eval/bits_per_byte")
    if len(steps):
        axis.plot(steps, values, "o-", color=style.BLUE, markersize=4, label="model, held out")
        axis.annotate(
            f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(0, -14), color=style.BLUE,
            textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    else:
        style.missing(axis, "eval/bits_per_byte")
    for key, text, color in (
        ("unigram_bits_per_byte", "entropy of single bytes", style.GREY),
        ("gzip_bits_per_byte", "gzip -9", style.GREEN),
    ):
        value = run.summary.get(key)
        if value is not None and len(steps):
            style.reference_line(axis, value, f"{text}: {value:.3f}", color)
    if len(steps):
        axis.set_ylim(bottom=0)
    style.label(axis, title="Held-out bits per byte", x="step", y="bits per byte")
    return figure


def learning_rate(run: RunLog) -> Any:
    """The schedule as it was applied."""
    figure, (axis,) = style.figure(height=3.2)
    steps, values = run.series("optimizer/learning_rate")
    if len(steps):
        axis.plot(steps, values, color=style.BLUE, linewidth=1.8)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        style.missing(axis, "optimizer/learning_rate")
    style.label(axis, title="Learning rate", x="step", y="learning rate")
    return figure


def sizes(run: RunLog) -> Any:
    """Gradient norm and the root mean square of the updates."""
    figure, (top, bottom) = style.figure(2, height=5.6)
    steps, values = run.series("optimizer/gradient_norm")
    if len(steps):
        _noisy_line(top, steps, values, style.BLUE, "smoothed")
        if np.any(values > 0):
            _plain_log_scale(top)
    else:
        style.missing(top, "optimizer/gradient_norm")
    style.label(top, title="Gradient norm, before limiting", y="L2 norm")
    for name, text, color in (("muon", "Muon", style.BLUE), ("adamw", "AdamW", style.ORANGE)):
        steps, values = run.series(f"optimizer/update_rms_{name}")
        if len(steps):
            _noisy_line(bottom, steps, values, color, text)
    if bottom.lines:
        target = run.setting("optimizer.update_rms", 0.2)
        bottom.axhline(
            target, color=style.GREY, linestyle="--", linewidth=1.2, label=f"target, {target:g}"
        )
        bottom.set_ylim(bottom=0)
    else:
        style.missing(bottom, "optimizer/update_rms_muon, optimizer/update_rms_adamw")
    style.label(bottom, title="Size of updates, before the learning rate", x="step", y="RMS")
    style.legend(bottom)
    return figure


def max_logit_heatmap(run: RunLog) -> Any:
    """Largest attention logit of each head at the last record; a ring marks heads ever clipped."""
    steps, logits = run.arrays("max_logit")
    layers = logits.shape[1] if len(steps) else 8
    figure, (axis,) = style.figure(height=2.2 + 0.22 * min(layers, 40))
    if not len(steps) or not np.isfinite(logits[-1]).any():
        style.missing(axis, "max_logit of each layer and head")
        style.label(axis, title="Largest attention logit of each head")
        return figure
    threshold = run.setting("optimizer.qk_clip_threshold")
    image = _heat_map(axis, logits[-1], cmap="YlOrRd", vmin=min(0.0, np.nanmin(logits[-1])))
    text = "largest logit" if threshold is None else f"largest logit (clipped above {threshold:g})"
    figure.colorbar(image, ax=axis, label=text, pad=0.015)
    clipped_steps, clipped = run.arrays("clipped_ever")
    ever = clipped[-1] > 0 if len(clipped_steps) else np.zeros(logits.shape[1:], bool)
    rows, columns = np.nonzero(ever)
    axis.scatter(columns, rows, s=26, facecolors="none", edgecolors=style.INK, linewidths=1.0)
    title = f"Largest attention logit of each head, step {steps[-1]:.0f}"
    style.label(axis, title=title, x="head", y="layer")
    if ever.any():
        style.remark(axis, f"ring: clipped at least once, {ever.sum()} of {ever.size}")
    return figure


def max_logit_over_time(run: RunLog) -> Any:
    """Largest logit of each layer, and how many heads were clipped."""
    figure, (top, bottom) = style.figure(2, height=6.2, ratios=(3, 2))
    steps, logits = run.arrays("max_logit")
    overall_steps, overall = run.series("qk_clip/max_logit")
    if len(steps):
        _lines_by_layer(figure, top, steps, logits.max(axis=2))
    elif len(overall_steps):
        top.plot(overall_steps, overall, color=style.BLUE, label="all layers")
    else:
        style.missing(top, "qk_clip/max_logit")
    threshold = run.setting("optimizer.qk_clip_threshold")
    if threshold is not None and top.lines:
        style.reference_line(top, threshold, f"threshold {threshold:g}", style.RED)
    style.label(top, title="Largest attention logit of each layer", y="logit")
    for name, text, color in (
        ("qk_clip/heads_clipped_ever", "at least once so far", style.GREY),
        ("qk_clip/heads_clipped", "in this step", style.RED),
    ):
        steps, values = run.series(name)
        if len(steps):
            bottom.step(steps, values, color=color, where="post", linewidth=1.4, label=text)
    if not bottom.lines:
        style.missing(bottom, "qk_clip/heads_clipped")
    style.label(bottom, title="Heads clipped", x="step", y="heads")
    style.legend(bottom)
    return figure


def expert_usage(run: RunLog) -> Any:
    """Load of each expert relative to an even one, and the worst over time."""
    steps, loads = run.arrays("expert_load")
    layers = loads.shape[1] if len(steps) else 4
    height = 1.2 + 0.2 * min(layers, 40)
    figure, (top, bottom) = style.figure(
        2, height=height + 2.6, shared_x=False, ratios=(height, 2.2)
    )
    if len(steps):
        _load_map(figure, top, loads[-1], run.setting("model.num_dense_layers", 0))
    else:
        style.missing(top, "expert_load of each layer and expert")
    when = f", step {steps[-1]:.0f}" if len(steps) else ""
    style.label(top, title=f"Expert load relative to an even one{when}", x="expert", y="layer")
    steps, values = run.series("experts/max_violation")
    if len(steps):
        _noisy_line(bottom, steps, values, style.BLUE, "smoothed")
        bottom.set_ylim(bottom=0)
    else:
        style.missing(bottom, "experts/max_violation")
    style.label(
        bottom, title="Worst expert: load over an even one, minus 1", x="step", y="max violation"
    )
    return figure


def throughput(run: RunLog) -> Any:
    """Tokens a second, share of the measured peak, and memory."""
    figure, axes = style.figure(3, height=6.6)
    panels = (
        ("throughput/tokens_per_second", 1, "Tokens a second", "tokens/s", style.BLUE),
        ("throughput/share_of_peak", 100, "Model FLOP/s of the measured peak", "%", style.GREEN),
        ("memory/bytes_in_use", 1 / GIB, "Memory in use", "GiB", style.PURPLE),
    )
    for axis, (name, scale, title, unit, color) in zip(axes, panels, strict=True):
        steps, values = run.series(name)
        if np.isfinite(values).any():
            _noisy_line(axis, steps, values * scale, color, title)
            axis.set_ylim(bottom=0, top=1.15 * _high(values * scale))
            style.remark(axis, f"median {np.nanmedian(values) * scale:,.4g} {unit}")
        else:
            style.missing(axis, name)
        style.label(axis, title=title, y=unit)
    axes[-1].set_xlabel("step", color=style.INK)
    return figure


def _noisy_line(axis: Any, steps: np.ndarray, values: np.ndarray, color: str, text: str) -> None:
    window = len(steps) // SMOOTHING_SHARE
    if window < 2:
        axis.plot(steps, values, color=color, linewidth=1.6, label=text)
        return
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, style.smooth(values, window), color=color, linewidth=1.8, label=text)


def _high(values: np.ndarray) -> float:
    """A value that few exceed, so that one outlier does not flatten the curve."""
    finite = values[np.isfinite(values)]
    return max(float(np.percentile(finite, 99)), 1e-12)


def _plain_log_scale(axis: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _heat_map(axis: Any, values: np.ndarray, first_row: int = 0, **options: Any) -> Any:
    rows, columns = values.shape
    axis.grid(visible=False)
    edges = (-0.5, columns - 0.5, first_row + rows - 0.5, first_row - 0.5)
    image = axis.imshow(values, aspect="auto", interpolation="nearest", extent=edges, **options)
    axis.yaxis.get_major_locator().set_params(integer=True)
    return image


def _load_map(figure: Any, axis: Any, load: np.ndarray, first_layer: int) -> None:
    from matplotlib.colors import TwoSlopeNorm

    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    worst = max(float(np.nanmax(relative)), 1.5)
    image = _heat_map(
        axis, relative, first_layer, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, worst)
    )
    figure.colorbar(image, ax=axis, label="load / even load", pad=0.015)


def _lines_by_layer(figure: Any, axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    depth = Normalize(0, max(values.shape[1] - 1, 1))
    colors = colormaps["viridis"]
    for layer in range(values.shape[1]):
        axis.plot(steps, values[:, layer], color=colors(depth(layer)), linewidth=1.3)
    figure.colorbar(ScalarMappable(depth, colors), ax=axis, label="layer", pad=0.015)
