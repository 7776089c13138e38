"""The book's page of benchmarks: figures and tables from data/results, made anew by every build.

`book/benchmarks.md` names the parts: a line `%MEASURED training%` becomes what `training` returns.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minillm.show import plot

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
SIDES = ("minillm", "plain PyTorch", "transformers", "litgpt", "x-transformers")
COLOR = dict(zip(SIDES, (plot.COLORS[n] for n in ("blue", "orange", "green", "purple", "grey"))))


def stored(name: str) -> dict[str, Any]:
    """A result file, or nothing where it has not been made yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def beside(*kinds: str) -> dict[str, dict[str, Any]]:
    """The measurements beside the peers that are of these kinds."""
    results = stored("beside-cpu").get("results", {})
    return {name: result for name, result in results.items() if result["work"]["kind"] in kinds}


def not_yet(command: str) -> str:
    return f"*Not measured yet: `{command}` does it.*"


def drawn(fig: Any, alt: str) -> str:
    """A figure as Markdown that Sphinx lets through as it is."""
    text = re.sub(r"\n\s*", "\n", plot.svg(fig)).replace("\n\n", "\n")
    return f'```{{raw}} html\n<div class="measured" role="img" aria-label="{alt}">\n{text}\n</div>\n```'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, [":---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars(title: str, groups: dict[str, dict[str, float]], label: str) -> str:
    """Horizontal bars, a group for each measurement and one for each side, the first group on top."""
    sides = [side for side in SIDES if any(side in group for group in groups.values())]
    step = len(sides) + 1.2
    fig, ax = plot.figure(title, x=label, y="", width=7.2, height=0.7 + 0.17 * step * len(groups))
    for i, side in enumerate(sides):
        points = [(n * step + i, group[side]) for n, group in enumerate(groups.values()) if side in group]
        ax.barh([y for y, _ in points], [x for _, x in points], height=0.9, color=COLOR[side], label=side)
    ax.set_yticks([n * step + (len(sides) - 1) / 2 for n in range(len(groups))], list(groups))
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=len(sides), frameon=False, fontsize=9)
    return drawn(fig, f"{title}: {label}")


# ---- the parts of the page ------------------------------------------------------------------------------------------


def machine() -> str:
    """Where, when and with what."""
    record = stored("beside-cpu")
    if not record:
        return not_yet("make bench")
    about, versions = record["machine"], record.get("versions", {})
    days = sorted({result["measured"][:10] for result in record["results"].values()})
    libraries = [f"torch {about['torch']}"] + [
        f"{name} {number}" for name, number in versions.items() if name != "minillm"
    ]
    lines = [
        f"{about['cpu']}, {about['cpu_cores']} cores, of which each side uses {about['torch_threads']}; Python {about['python']}, "
        f"{', '.join(libraries)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    ]
    if record.get("missing"):
        lines.append(
            "Not measured: " + "; ".join(f"{n} ({why})" for n, why in record["missing"].items()) + "."
        )
    return " ".join(lines)


def speeds(title: str, *kinds: str) -> str:
    """Speeds of these kinds of work: a figure relative to transformers, and a table of minillm's and its ratios."""
    results = beside(*kinds)
    if not results:
        return not_yet("make bench")
    relative = {
        name: {
            side: rate / result["tokens_per_s"]["transformers"]
            for side, rate in result["tokens_per_s"].items()
        }
        for name, result in results.items()
        if "transformers" in result["tokens_per_s"]
    }
    rows = [
        [name, f"{result['tokens_per_s']['minillm']:,.0f}"]
        + [f"{result['ratio'][side]:.2f}" if side in result["ratio"] else "–" for side in SIDES[1:]]
        for name, result in results.items()
    ]
    head = ["work", "minillm, tokens/s", *(f"× {side}" for side in SIDES[1:])]
    return bars(title, relative, "speed (transformers = 1)") + "\n\n" + table(head, rows)


def anatomy() -> str:
    """Where the time of a training step goes, on every side."""
    results = {
        name: result for name, result in beside("train").items() if "transformers" in result.get("parts", {})
    }
    if not results:
        return not_yet("make bench")
    parts = ("linear layers", "attention", "optimizer", "the rest")
    sides = [side for side in SIDES if any(side in result["parts"] for result in results.values())]
    step = len(sides) + 1.2
    fig, ax = plot.figure("Where a training step's time goes", x="time (transformers = 1)", y="", width=7.2, height=0.8 + 0.17 * step * len(results))  # fmt: skip
    places, names = [], []
    for n, result in enumerate(results.values()):
        for i, side in enumerate(side for side in sides if side in result["parts"]):
            left = 0.0
            time = result["tokens_per_s"]["transformers"] / result["tokens_per_s"][side]
            for part, color in zip(parts, ("blue", "orange", "green", "grey")):
                width = time * result["parts"][side][part]
                ax.barh(n * step + i, width, left=left, height=0.9, color=plot.COLORS[color], label=part if n == i == 0 else None)  # fmt: skip
                left += width
            places.append(n * step + i)
            names.append(side)
    ax.set_yticks(places, names, fontsize=8)
    for n, name in enumerate(results):
        ax.text(0.01, n * step - 0.65, name.removeprefix("train "), fontsize=9, va="bottom")
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=len(parts), frameon=False, fontsize=9)
    rows = [
        [name, *(f"{result['parts']['minillm'][part]:.0%}" for part in parts)]
        for name, result in results.items()
    ]
    told = table(["minillm's step", *parts], rows)
    return drawn(fig, "Where a training step's time goes, on every side") + "\n\n" + told


def memory() -> str:
    """The highest memory of a process that trains a few steps."""
    results = beside("memory")
    if not results:
        return not_yet("make bench")
    rows = [
        [name.removeprefix("memory ")]
        + [
            f"{result['peak_bytes'][side] / 2**20:,.0f}" if side in result["peak_bytes"] else "–"
            for side in SIDES
        ]
        for name, result in results.items()
    ]
    return table(["highest resident memory, MiB", *SIDES], rows)


def everyday() -> str:
    """Imports and tokenizers."""
    results = stored("everyday-cpu").get("results", {})
    if not results:
        return not_yet("make bench")
    rows = []
    if "imports" in results:
        rows += [[f"import: {name}", f"{s:.2f}", ""] for name, s in results["imports"]["seconds"].items()]
    for part in ("train", "encode"):
        times = results.get("tokenizer", {}).get(part, {})
        for name, run in times.items():
            against = f"{run['median_s'] / times['sentencepiece']['median_s']:.2f}"
            rows.append([f"tokenizer, {part}: {name}", f"{run['median_s']:.2f}", against])
    return table(["", "processor seconds", "÷ sentencepiece"], rows)


def loading() -> str:
    """Loading of a checkpoint."""
    record = stored("loading")
    if not record:
        return not_yet("python -m benchmarks.loading")
    rows = []
    for name, sides in record["results"].items():
        for side, runs in sides.items():
            seconds = statistics.median(run["load_and_use_s"] for run in runs)
            share = statistics.median(run["peak_bytes"] / run["weight_bytes"] for run in runs)
            rows.append([name, side, f"{seconds:.2f}", f"{share:.2f}"])
    return table(["checkpoint", "by", "seconds until every weight was used", "peak memory ÷ weights"], rows)


def found(record: dict[str, Any], name: str) -> list[float | None]:
    """The least recall at a similarity of 0.9, and the least precision, over all sizes; None where nothing is removed."""
    runs = [run for run, *_ in record["runs"][name].values()]
    return [
        min((run[key] for run in runs if key in run), default=None) for key in ("recall_at_0.9", "precision")
    ]


def duplicates() -> str:
    """Near-duplicate removal."""
    record = stored("dedup-speed")
    if not record:
        return not_yet("python -m benchmarks.dedup")
    sizes = sorted({int(n) for s in record["summary"].values() for n in s["documents_per_s"]})
    rows = [
        [
            name,
            *("–" if share is None else f"{share:.3f}" for share in found(record, name)),
            *(
                f"{s['documents_per_s'][str(n)]:,.0f}" if str(n) in s["documents_per_s"] else "–"
                for n in sizes
            ),
        ]
        for name, s in record["summary"].items()
    ]
    return table(["documents/s", "recall", "precision", *(f"of {n:,}" for n in sizes)], rows)


def gpu() -> str:
    """Every GPU that was measured."""
    parts = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for name, result in record["results"].items():
            told = {
                "tokens/s": f"{result['tokens_per_s']:,.0f}" if "tokens_per_s" in result else "–",
                "MFU": f"{result['mfu']:.0%}" if result.get("mfu") else "–",
                "GiB": f"{result['peak_bytes'] / 2**30:.1f}" if result.get("peak_bytes") else "–",
            }
            flops = next((result[k] for k in ("bf16_flops_per_s", "both_flops_per_s") if k in result), None)
            rows.append([name, *told.values(), f"{flops / 1e12:,.0f}" if flops else "–"])
        about = record["machine"]
        parts.append(
            f"**{about.get('gpu', about['device'])}**, torch {about['torch']}\n\n"
            + table(["work", "tokens/s", "MFU", "peak GiB", "TFLOP/s"], rows)
        )
    return "\n\n".join(parts) or "*No GPU has been measured yet.*"


# ---- goals ----------------------------------------------------------------------------------------------------------


def fastest(result: dict[str, Any]) -> float:
    """How many times as fast as the fastest peer minillm is."""
    return min(result["ratio"].values())


def goals() -> str:
    """What was aimed at, what was measured, and whether it is reached."""
    rows: list[tuple[str, float, float, bool]] = []  # what, measured, goal, more is better
    for name, result in beside("train", "decode", "prefill").items():
        kind = result["work"]["kind"]
        if kind != "prefill" and result["ratio"]:
            rows.append(
                (f"{name}: speed ÷ fastest peer", fastest(result), 1.05 if kind == "train" else 1.0, True)
            )
        if kind != "train" and "transformers" in result["ratio"]:
            goal = 1.5 if kind == "decode" else 1.1
            rows.append((f"{name}: speed ÷ transformers", result["ratio"]["transformers"], goal, True))
    for name, share in matmul_shares().items():
        rows.append((name, share, 0.85, True))
    for name, result in beside("memory").items():
        peers = [n for side, n in result["peak_bytes"].items() if side != "minillm"]
        rows.append(
            (f"{name}: memory ÷ leanest peer", result["peak_bytes"]["minillm"] / min(peers), 1.0, False)
        )
    small = stored("everyday-cpu").get("results", {})
    if "imports" in small:
        rows.append(("import minillm ÷ import torch", small["imports"]["ratio"]["minillm"], 1.2, False))
    if "tokenizer" in small:
        train, encode = (
            {n: r["median_s"] for n, r in small["tokenizer"][p].items()} for p in ("train", "encode")
        )
        rows.append(
            (
                "tokenizer training, time ÷ sentencepiece",
                train["minillm"] / train["sentencepiece"],
                3.0,
                False,
            )
        )
        rows.append(
            ("encoding, speed ÷ sentencepiece", encode["sentencepiece"] / encode["minillm"], 1.0, True)
        )
    for name, sides in stored("loading").get("results", {}).items():
        pairs = list(zip(sides["minillm"], sides["transformers"]))
        time = statistics.median(a["load_and_use_s"] / b["load_and_use_s"] for a, b in pairs)
        peak = statistics.median(a["peak_bytes"] / a["weight_bytes"] for a, _ in pairs)
        rows.append((f"loading {name}: time ÷ transformers", time, 1.0, False))
        rows.append((f"loading {name}: peak memory ÷ weights", peak, 1.1, False))
    race = stored("dedup-speed")
    speeds = {
        name: side["documents_per_s"].get("100000", 0.0)
        for name, side in race.get("summary", {}).items()
        if all(share is not None and share >= 0.99 for share in found(race, name))
    }
    if peers := [rate for name, rate in speeds.items() if not name.startswith("minillm")]:
        ratio = speeds.get("minillm", 0.0) / max(peers)
        rows.append(("near-duplicates of 100,000: speed ÷ fastest peer that finds them", ratio, 1.0, True))
    for path in sorted(RESULTS.glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows += [
            (f"{record['machine'].get('gpu', 'GPU')}, {what}", value, goal, True)
            for what, value, goal in gpu_goals(record["results"])
        ]
    if not rows:
        return not_yet("make bench")
    rated = table(
        ["", "measured", "goal", "reached"],
        [
            [what, f"{value:.2f}", f"{'≥' if more else '≤'}\N{NO-BREAK SPACE}{goal:g}", "yes" if (value >= goal if more else value <= goal) else "**no**"]
            for what, value, goal, more in rows
        ],
    )  # fmt: skip
    return f":::{{container}} narrow\n{rated}\n:::"


def gpu_goals(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """What was aimed at on a GPU, as far as it was measured: what, measured, goal."""
    for size, goal in (("125M", 0.45), ("350M", 0.50), ("1.3B", 0.55)):
        if mfu := results.get(f"train {size} compiled", {}).get("mfu"):
            yield f"train {size} compiled: FLOP/s ÷ the card's peak (MFU)", mfu, goal
    ours, library = (results.get(f"attention {name}", {}) for name in ("triton", "sdpa"))
    for passes in ("forward", "both"):
        key = f"{passes}_flops_per_s"
        if key in ours and key in library:
            yield (
                f"our Triton kernel ÷ torch's, {passes.replace('both', 'both passes')}",
                ours[key] / library[key],
                0.7,
            )
    read, copied = results.get("decode 7B batch 1", {}), results.get("matmul", {})
    if "bytes_per_s" in read and "copy_bytes_per_s" in copied:
        yield (
            "decode 7B bfloat16: bytes read ÷ the bandwidth of a copy",
            read["bytes_per_s"] / copied["copy_bytes_per_s"],
            0.7,
        )


def matmul_shares() -> dict[str, float]:
    """The share of this machine's rate of large matrix products that training reaches: of torch's, and of ours."""
    from minillm.transformer import ModelConfig, flops_per_token

    shares = {}
    for name, result in beside("train").items():
        if rates := result.get("matmul_flops_per_s"):
            flops = flops_per_token(ModelConfig(**result["shape"]), result["work"]["seq_len"], backward=True)
            speed, what = result["tokens_per_s"]["minillm"] * flops, f"{name}: FLOP/s ÷ a large product's in"
            peers = [rate for side, rate in rates.items() if side != "minillm"]
            if result["work"]["dtype"] != "float32" or not peers:
                shares[f"{what} torch"] = speed / statistics.median(rates.values())
                continue
            shares[f"{what} torch"] = speed / statistics.median(peers)
            shares[f"{what} minillm"] = speed / rates["minillm"]  # maybe by another library
    return shares


PARTS: dict[str, Callable[[], str]] = {
    "machine": machine,
    "goals": goals,
    "training": lambda: speeds("Training", "train"),
    "decoding": lambda: speeds("Decoding and prefill", "decode", "prefill"),
    "anatomy": anatomy,
    "memory": memory,
    "everyday": everyday,
    "loading": loading,
    "duplicates": duplicates,
    "gpu": gpu,
}


def fill(text: str) -> str:
    """The page with its parts filled in."""
    return re.sub(r"(?m)^%MEASURED (\w+)%$", lambda match: PARTS[match[1]](), text)
