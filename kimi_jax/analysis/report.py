"""Writes the report of a run: a page with pictures, a table and a sample, and the same as Markdown.

Everything in it comes from the files in the work directory, so a report can be made at any time,
of a finished run or of one that goes on.
"""

import html
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from kimi_jax.analysis import plots
from kimi_jax.analysis.run_log import RunLog, read_run

FOLDER = "report"
PAGE = "index.html"

# name of the file, heading, function
FIGURES = (
    ("loss", "Loss", plots.loss),
    ("bits_per_byte", "Held-out bits per byte", plots.bits_per_byte),
    ("learning_rate", "Learning rate", plots.learning_rate),
    ("sizes", "Gradient norm and size of updates", plots.sizes),
    ("max_logit_heatmap", "Attention logits by head", plots.max_logit_heatmap),
    ("max_logit_over_time", "Attention logits over time", plots.max_logit_over_time),
    ("expert_usage", "Use of experts", plots.expert_usage),
    ("throughput", "Throughput and memory", plots.throughput),
)


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `index.html`, `report.md` and the pictures into `workdir/report`.

    Args:
      workdir: folder of the run.

    Returns:
      Path of `index.html`.

    Raises:
      DataError: the folder does not exist or a file in it is malformed.
    """
    run = read_run(workdir)
    folder = run.workdir / FOLDER
    folder.mkdir(exist_ok=True)
    for name, _, draw in FIGURES:
        draw(run).savefig(folder / f"{name}.png", facecolor="white")
    (folder / "report.md").write_text(_markdown(run), encoding="utf-8")
    page = folder / PAGE
    page.write_text(_page(run), encoding="utf-8")
    return page


def summary_rows(run: RunLog) -> list[tuple[str, str]]:
    """Name and value of what the report's table shows, in its order."""
    known = {key: value for key, value in run.summary.items() if value is not None}
    rows = [(text, shape(known.pop(key))) for key, text, shape in _SUMMARY if key in known]
    known.pop("sample", None)
    return rows + [(key.replace("_", " "), _plain(value)) for key, value in known.items()]


def _bits(value: int | float) -> str:
    return f"{value:.4f}"


def _count(value: int | float) -> str:
    return f"{value:,.0f}"


def _duration(seconds: int | float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} (h:mm:ss)"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return value if isinstance(value, str) else json.dumps(value)


# key in summary.json, row of the table, format
_SUMMARY = (
    ("bits_per_byte", "held-out bits per byte", _bits),
    ("unigram_bits_per_byte", "entropy of single bytes, bits per byte", _bits),
    ("gzip_bits_per_byte", "gzip -9, bits per byte", _bits),
    ("parameters", "parameters", _count),
    ("active_parameters", "parameters active per token", _count),
    ("tokens", "training tokens", _count),
    ("seconds", "training time", _duration),
    ("devices", "devices", _plain),
)


def _sample(run: RunLog) -> tuple[str, str] | None:
    sample = run.summary.get("sample")
    return (sample.get("prompt", ""), sample.get("text", "")) if sample else None


def _markdown(run: RunLog) -> str:
    lines = [f"# {run.workdir.resolve().name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in summary_rows(run)]
    for name, heading, _ in FIGURES:
        lines += ["", f"## {heading}", "", f"![{heading}]({name}.png)"]
    sample = _sample(run)
    if sample:
        lines += ["", "## Sample", "", "The prompt, then what the model wrote:", ""]
        lines += ["    " + line for line in "".join(sample).splitlines()]
    lines += ["", "## Configuration", "", "```json", json.dumps(run.config, indent=2), "```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _page(run: RunLog) -> str:
    title = html.escape(run.workdir.resolve().name)
    body = [f"<h1>{title}</h1>", _table(summary_rows(run))]
    for name, heading, _ in FIGURES:
        body += [f"<h2>{heading}</h2>", f'<img src="{name}.png" alt="{heading}">']
    sample = _sample(run)
    if sample:
        prompt, text = (html.escape(part) for part in sample)
        body += ["<h2>Sample</h2>", f"<pre><b>{prompt}</b>{text}</pre>"]
    config = html.escape(json.dumps(run.config, indent=2))
    body += ["<h2>Configuration</h2>", f"<pre>{config}</pre>"]
    return _DOCUMENT.format(title=title, style=_STYLE, body="\n".join(body))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return "<table>\n" + "\n".join(cells) + "\n</table>"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 900px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid #e5e7eb; text-align: left; }
th { font-weight: normal; } td { font-variant-numeric: tabular-nums; text-align: right; }
pre { background: #f3f4f6; padding: 1rem; overflow-x: auto; white-space: pre-wrap; }
"""

_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
