"""A run's `report.html`: one file with its plots, scores and samples inside."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from minillm.show import plot
from minillm.show.page import save_page, table


def _loss_figure(metrics: list[dict[str, Any]]) -> str:
    fig, ax = plot.figure("Loss", x="tokens seen (thousands)", y="loss (nats per token)", width=6.4)
    train = [r for r in metrics if "loss_nats" in r]
    ax.plot(
        [r["tokens"] / 1e3 for r in train],
        [r["loss_nats"] for r in train],
        color=plot.COLORS["sky"],
        lw=1,
        label="training",
    )
    held = [r for r in metrics if "held_out_nats" in r]
    if held:
        ax.plot(
            [r["tokens"] / 1e3 for r in held],
            [r["held_out_nats"] for r in held],
            color=plot.COLORS["blue"],
            marker="o",
            ms=4,
            label="held out",
        )
    ax.set_ylim(bottom=0)
    ax.legend()
    return plot.svg(fig)


def _rate_figure(metrics: list[dict[str, Any]]) -> str:
    fig, axes = plot.panels(
        "Learning rate", "Speed", x="step", y=["learning rate (1e-3)", "tokens/s"], width=6.4, height=2.4
    )
    train = [r for r in metrics if "loss_nats" in r]
    axes[0].plot([r["step"] for r in train], [1e3 * r["lr"] for r in train], color=plot.COLORS["green"])
    axes[1].plot([r["step"] for r in train], [r["tokens_per_s"] for r in train], color=plot.COLORS["purple"])
    for ax in axes:
        ax.set_ylim(bottom=0)
    return plot.svg(fig)


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: list[tuple[str, str]],
    scores: list[dict[str, Any]],
    samples: list[tuple[str, str, str]],
    metrics: list[dict[str, Any]],
    stages: list[tuple[str, str, float]],
    config: dict[str, Any],
    machine: dict[str, Any],
) -> None:
    """Write the report, atomically.

    Args:
        path: the HTML file.
        title: the heading.
        summary: names and values for the first table.
        scores: records with `name`, `correct`, `n`, `accuracy`.
        samples: (what it is, prompt, continuation).
        metrics: records of `metrics.jsonl`.
        stages: (name, what it did, seconds).
        config: the resolved configuration.
        machine: what `base.machine.describe_machine` says.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", "<p class=soft>A report of minillm.</p>", table(summary)]
    if metrics:
        parts += [f"<h2>Training</h2><div class=figure>{_loss_figure(metrics)}</div>"]
        parts += [f"<div class=figure>{_rate_figure(metrics)}</div>"]
    if scores:
        rows = "".join(
            f"<tr><td>{html.escape(s['name'])}</td><td class=n>{s['correct']} of {s['n']}</td>"
            f"<td class=n>{100 * s['accuracy']:.0f} %</td>"
            f"<td><div class=bar><i style='width:{100 * s['accuracy']:.0f}%'></i></div></td></tr>"
            for s in scores
        )
        parts.append(
            "<h2>What it can do</h2><p class=soft>Exact answers to questions, greedy decoding. Held out: no training document "
            f"has these operands, or this story.</p><div class=wide><table>{rows}</table></div>"
        )
    if samples:
        parts.append("<h2>What it says</h2>")
        for what, prompt, text in samples:
            parts.append(
                f"<p class=soft>{html.escape(what)}</p><blockquote><b>{html.escape(prompt)}</b>{html.escape(text)}</blockquote>"
            )
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=soft>{html.escape(what)}</td><td class=n>{seconds:.1f} s</td></tr>"
        for name, what, seconds in stages
    )
    parts.append(f"<h2>Where the time went</h2><div class=wide><table>{rows}</table></div>")
    parts.append(f"<h2>Machine</h2>{table([(k, str(v)) for k, v in machine.items()])}")
    parts.append(
        "<details><summary>The whole configuration</summary><pre>"
        f"{html.escape(json.dumps(config, indent=1, ensure_ascii=False))}</pre></details>"
    )
    save_page(path, title, parts)
