"""The report of a cleaning run: what went, why, and whether that was right."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from minillm.show import plot
from minillm.show.page import grid, save_page, table


def _percent(part: int | float, whole: int | float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _remaining_figure(result: dict[str, Any]) -> str:
    names = ["read", *(step["name"] for step in result["steps"])]
    left = [result["read"]["documents"], *(step["n_out"] for step in result["steps"])]
    tokens = [result["tokens"]["in"], *(step["tokens_out"] for step in result["steps"])]
    fig, ax = plot.figure(
        "What is left after each step",
        x="share of what was read (%)",
        y="",
        width=6.6,
        height=0.8 + 0.34 * len(names),
    )
    rows = range(len(names))
    for counts, shift, color, label in (
        (left, -0.19, plot.COLORS["blue"], "documents"),
        (tokens, 0.19, plot.COLORS["sky"], "words"),
    ):
        shares = [100 * n / max(1, counts[0]) for n in counts]
        ax.barh([row + shift for row in rows], shares, height=0.36, color=color, label=label)
    ax.set_yticks(list(rows), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return plot.svg(fig)


def truth_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each step of a cleaning report beside the planted truth: what it should have found, what it found, and what else.

    Args:
        result: what `pipeline.run.clean` returns.

    Returns:
        One record for each step that looks for a planted defect: `step`, `planted` (of those that reached it), `caught`,
        `recall`, `acted` (documents that it dropped or changed), `precision`, `other` and `sound`: how many of the documents
        on which it acted wrongly have another defect, and how many have none.
    """
    records = []
    for step in result["steps"]:
        planted, caught, wrong, wrong_sound = step["expected"]
        if not planted:
            continue
        records.append(
            {
                "step": step["name"],
                "planted": planted,
                "caught": caught,
                "recall": caught / planted,
                "acted": caught + wrong,
                "precision": caught / (caught + wrong) if caught + wrong else 1.0,
                "other": wrong - wrong_sound,
                "sound": wrong_sound,
            }
        )
    return records


def _truth_parts(result: dict[str, Any]) -> list[str]:
    records = truth_table(result)
    if not records:
        return []
    rows = [
        [
            html.escape(r["step"]),
            f"{r['planted']:,}",
            f"{r['caught']:,}",
            f"{r['recall']:.3f}",
            f"{r['acted']:,}",
            f"{r['precision']:.3f}",
            f"{r['other']:,}",
            f"{r['sound']:,}",
        ]
        for r in records
    ]
    head = ["step", "to find", "caught", "recall", "acted on", "precision", "something else", "sound"]
    parts = [
        "<h2>Against the truth</h2><p class=soft>The corpus knows what is wrong with its documents. To find: documents with what "
        "a step looks for, among those that reached it: planted, or repeated by the corpus itself. Caught: dropped or changed by "
        "it. The last two columns are what it acted on besides: documents with something else, and sound ones.</p>",
        grid(head, rows),
    ]
    restored = [
        [
            html.escape(s["name"]),
            f"{s['restored'][0]:,}",
            *(f"{f / 1e6 / s['restored'][0]:.3f}" for f in s["restored"][1:]),
        ]
        for s in result["steps"]
        if s["restored"][0]
    ]
    if restored:
        parts.append(
            "<p class=soft>Texts that a step changed and whose clean form is known: F1 of their words against it.</p>"
            + grid(["step", "texts", "F1 before", "F1 after"], restored)
        )
    spans = [
        [html.escape(kind), f"{n:,}", f"{gone:,}", _percent(gone, n)]
        for s in result["steps"]
        for kind, (n, gone) in sorted(s["spans"].items())
    ]
    if spans:
        parts.append(
            "<p class=soft>Personal data in the documents that were changed, by kind.</p>"
            + grid(["kind", "planted", "gone", ""], spans)
        )
    return [*parts, _fates(result)]


def _share(part: int, whole: int) -> str:
    """Percent as a whole number; what is less than one is said to be."""
    return f"{100 * part / whole:.0f}" if 200 * part >= whole else "&lt;1"


def _fates(result: dict[str, Any]) -> str:
    """What became of each kind of planted document, step by step."""
    steps = result["steps"]
    rows = []
    for label in sorted({label for step in steps for label in step["truth"]}, key=lambda x: (x == "", x)):
        n = next(step["truth"][label][0] for step in steps if label in step["truth"])
        cells, left = [], n
        for step in steps:
            _, gone, changed = step["truth"].get(label, (0, 0, 0))
            left -= gone
            text = _share(gone, n) if gone else ""
            text += f" <i>{_share(changed, n)}</i>" if changed else ""
            tint = min(85, round(85 * (gone + changed) / n))
            cells.append(f"<span style='background:rgb(0 114 178/{tint}%)' class=cell>{text or '·'}</span>")
        rows.append([html.escape(label) or "sound", f"{n:,}", *cells, f"{100 * left / n:.0f}"])
    names = [html.escape(step["name"]) for step in steps]
    return (
        "<p class=soft>What became of them: percent dropped at each step (<i>changed</i> in italics), and percent that is left."
        "</p>" + grid(["what it is", "n", *names, "left"], rows, kind="wide tight")
    )


def _sample_parts(result: dict[str, Any]) -> list[str]:
    parts = ["<h2>What was dropped</h2>"]
    changed = ["<h2>What was changed</h2>"]
    for step in result["steps"]:
        for reason, n in sorted(step["reasons"].items(), key=lambda pair: -pair[1]):
            parts.append(f"<h3>{html.escape(step['name'])}: {html.escape(reason)} ({n:,})</h3>")
            for _, text, detail in step["samples"].get(reason, []):
                parts.append(
                    f"<p class=soft>{html.escape(detail)}</p><blockquote>{html.escape(_printable(text))}</blockquote>"
                )
        for _, before, after in step["samples"].get("changed", []):
            if before == step["samples"]["changed"][0][1]:
                changed.append(f"<h3>{html.escape(step['name'])} ({step['changed']:,})</h3>")
            changed.append(
                f"<blockquote>{html.escape(_printable(before))}</blockquote><p class=soft>became</p>"
                f"<blockquote>{html.escape(_printable(after))}</blockquote>"
            )
    return (parts if len(parts) > 1 else []) + (changed if len(changed) > 1 else [])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def write_clean_report(path: str | Path, result: dict[str, Any]) -> None:
    """Write what a cleaning run did as one HTML page, atomically.

    Args:
        path: the HTML file.
        result: what `pipeline.run.clean` returns.
    """
    balance, steps, read = result["balance"], result["steps"], result["read"]
    title = "minillm clean: " + ", ".join(result["config"]["sources"])
    tokens = result["tokens"] or {"in": 0, "out": 0}
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<p class=soft>A report of minillm. What went in is what came out, was dropped, or could not be read; the books balance.</p>",
        table(
            [
                ("records met", f"{balance['in']:,}"),
                (
                    "documents that came out",
                    f"{balance['out']:,} ({_percent(balance['out'], balance['in'])})",
                ),
                ("documents dropped", f"{balance['dropped']:,}"),
                ("records that could not be read", f"{balance['unreadable']:,}"),
                (
                    "words in, out",
                    f"{tokens['in']:,} → {tokens['out']:,} ({_percent(tokens['out'], tokens['in'])})",
                ),
                ("time", f"{result['seconds']:.1f} s"),
            ]
        ),
    ]
    if steps:
        rows = [
            [
                html.escape(s["name"]),
                f"{s['n_in']:,}",
                f"{s['n_in'] - s['n_out']:,}",
                f"{s['changed']:,}",
                f"{s['n_out']:,}",
                f"{s['tokens_in']:,}",
                f"{s['tokens_out']:,}",
                f"{s['n_in'] / s['seconds']:,.0f}" if s["seconds"] else "–",
            ]
            for s in steps
        ]
        head = ["step", "in", "dropped", "changed", "out", "words in", "words out", "documents/s"]
        parts += [
            f"<h2>Step by step</h2><div class=figure>{_remaining_figure(result)}</div>",
            grid(head, rows),
            "<p class=soft>Words are words and Han characters. Documents/s are of one core, inside the step.</p>",
            *_truth_parts(result),
            *_sample_parts(result),
        ]
    if read["skipped"]:
        problems = "".join(f"<li>{html.escape(_printable(problem))}</li>" for problem in read["problems"])
        rows = [[html.escape(reason), f"{n:,}"] for reason, n in sorted(read["skipped"].items())]
        parts += [
            "<h2>What could not be read</h2>",
            grid(["reason", "records"], rows),
            f"<ul>{problems}</ul>",
        ]
    parts.append(f"<h2>Machine</h2>{table([(k, str(v)) for k, v in result['machine'].items()])}")
    parts.append(
        "<details><summary>The whole configuration</summary><pre>"
        f"{html.escape(json.dumps(result['config'], indent=1, ensure_ascii=False))}</pre></details>"
    )
    save_page(path, title, parts, kind="broad")
