"""`minillm corpus` and `minillm clean`: raw text in, clean text out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from minillm.cli.parsing import parse, parse_parts, say, value_of
from minillm.pipeline.phases import is_step
from minillm.pipeline.run import CleanJob, run_job
from minillm.pipeline.steps import ORDER, CleanSteps, clean_recipe, default_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusArgs:
    """Write the project's own corpus as JSON lines; what is wrong with a document stands in its meta."""

    out: Path = Path("raw.jsonl")
    """The file; gzip if its name ends in .gz."""
    documents: int = 20_000
    """How many."""
    split: Literal["train", "heldout"] = "train"
    """heldout: documents whose meanings no document of train has; without defects."""
    benchmark: Path | None = None
    """Write the corpus's benchmark too: half of its items have leaked into the corpus."""
    quiet: bool = False
    """No progress bars."""


def _corpus(argv: Sequence[str]) -> int:
    from tqdm.auto import tqdm

    from minillm.corpus import Document
    from minillm.readers.documents import write_documents
    from minillm.world.defects import benchmark_item
    from minillm.world.stream import documents
    from minillm.world.task import CorpusConfig
    from minillm.world.truth import with_repetitions

    args, config = parse_parts(
        [CorpusArgs(), CorpusConfig(defects=0.3)],
        prog="minillm corpus",
        description=CorpusArgs.__doc__,
        args=list(argv),
    )
    if args.documents < 1:
        raise ValueError(f"documents must be at least 1, got {args.documents}")
    last_item = 0

    def written() -> Any:
        nonlocal last_item
        made = documents(config, n_documents=args.documents, split=args.split)
        bar = tqdm(
            made, total=args.documents, unit="doc", disable=args.quiet, leave=False, desc=str(args.out)
        )
        for document in with_repetitions(bar):
            last_item = max(last_item, document.meta.get("item", 0))
            yield document

    n = write_documents(written(), args.out)
    print(f"{args.out}: {n:,} documents, {100 * config.defects:.0f} % of them with a planted defect")
    if args.benchmark is not None:
        items: list[Document] = [benchmark_item(config, number) for number in range(last_item + 2)]
        write_documents(items, args.benchmark)
        print(
            f"{args.benchmark}: {len(items):,} items; those with even numbers may have leaked, the others never"
        )
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanArgs:
    """The words of `minillm clean`: a job, its steps, and what only the command line asks."""

    job: Annotated[CleanJob, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: CleanJob(workers=0)
    )
    recipe: Literal["web", "own"] = "web"
    """What every setting of the steps has as its default: web for text from anywhere, own for the project's own corpus."""
    quiet: bool = False
    """No progress bars."""
    steps: Annotated[CleanSteps, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CleanSteps)


def _clean(argv: Sequence[str]) -> int:
    words = list(argv)
    chosen = CleanArgs(steps=clean_recipe(value_of("--recipe", words, "web")))
    description = (
        f"Lead text through the steps of chapters 02 to 06: {', '.join(ORDER)}. --skip NAME… leaves steps out. A run that was "
        "stopped or killed is taken up by the same command. Then: minillm speedrun --data OUT/documents"
    )
    args = parse(
        CleanArgs,
        prog="minillm clean",
        description=description,
        args=words,
        default=chosen,
        registry=_registry(),
    )
    if not args.job.sources:
        raise ValueError(
            "nothing to clean: name files or folders, or write a corpus first: minillm corpus --out raw.jsonl"
        )
    steps = default_steps(args.steps, args.job.sources)
    try:
        result = run_job(args.job, steps, progress=not args.quiet, say=say)
    except KeyboardInterrupt:
        print("minillm: interrupted; the same command resumes", file=sys.stderr)
        return 130
    _say_clean(args.job.out, result)
    return 0


def _registry() -> ConstructorRegistry:
    """How the command line reads a step of a chapter: its fields are options, but for its name and for functions."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def _(info: StructTypeInfo) -> StructConstructorSpec | None:
        step, kinds = info.default, get_type_hints(info.type) if dataclasses.is_dataclass(info.type) else {}
        if "name" not in kinds or not is_step(step):
            return None
        docs = docstring_parser.parse(info.type.__doc__ or "")
        told = {param.arg_name: param.description for param in docs.params}
        fields = tuple(
            StructFieldSpec(name, kind, getattr(step, name), told.get(name))
            for name, kind in kinds.items()
            if name != "name" and "Callable" not in str(kind)
        )

        def build(**given: Any) -> Any:
            return dataclasses.replace(step, **given)

        build.__doc__ = docs.short_description
        return StructConstructorSpec(build, fields)

    return registry


def _say_clean(out: Path, result: dict[str, Any]) -> None:
    from minillm.show.cleaning import truth_table

    say(f"{'step':14} {'in':>10} {'dropped':>10} {'changed':>10} {'out':>10}  reasons")
    for step in result["steps"]:
        ranked = sorted(step["reasons"].items(), key=lambda pair: (-pair[1], pair[0]))
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in ranked[:3])
        numbers = (step["n_in"], step["n_in"] - step["n_out"], step["changed"], step["n_out"])
        say(f"{step['name']:14} " + " ".join(f"{n:10,}" for n in numbers) + f"  {reasons}")
    if truth := truth_table(result):
        say(
            f"\n{'step':14} {'to find':>8} {'caught':>8} {'recall':>8} {'acted on':>9} {'precision':>9} {'sound':>7}"
            "  (against the truth; sound: had no defect at all)"
        )
        for row in truth:
            counts = f"{row['planted']:8,} {row['caught']:8,} {row['recall']:8.3f} {row['acted']:9,} {row['precision']:9.3f} {row['sound']:7,}"
            say(f"{row['step']:14} {counts}")
    for problem in result["read"]["problems"][:5]:
        say(f"not read: {problem}")
    books, rate = result["balance"], result["balance"]["in"] / max(result["seconds"], 1e-9)
    say(
        f"\n{books['in']:,} in = {books['out']:,} out + {books['dropped']:,} dropped + {books['unreadable']:,} unreadable; "
        f"{result['seconds']:.1f} s, {rate:,.0f} documents/s"
    )
    say(f"Clean text: {out / 'documents'}. Report: {out / 'report.html'}")
