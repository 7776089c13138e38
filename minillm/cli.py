"""The command line: `minillm speedrun | pretrain | corpus | clean | generate | tokenizer | convert | info`. Bad input exits with 2 and one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minillm import __version__
from minillm.checkpoint import MiniLLMError

if TYPE_CHECKING:
    from minillm.recipes import RunConfig
    from minillm.transformer import ModelConfig
    from minillm.zero import EngineConfig

__all__ = ["main"]

HELP = f"""minillm {__version__}: build a language model piece by piece, then train it.

  minillm speedrun             raw text -> tokenizer -> model -> report, in minutes
  minillm pretrain             the same up to the trained model
  minillm corpus               write the project's own corpus, with planted defects
  minillm clean IN             raw text -> clean text, and a report of what went and why
  minillm generate PROMPT      continue a prompt, or talk, with a trained model
  minillm tokenizer COMMAND    train a vocabulary; encode and decode text with it
  minillm convert FOLDER OUT   a published model into ours, or ours into a published format
  minillm info NAME            parameters, memory and FLOPs of a recipe, a run or a published model
  minillm info --attention     which attention kernel is taken, and why
  minillm info --plan          what a model needs on how many GPUs, by ZeRO stage

`minillm COMMAND --help` shows every setting with its default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArgs:
    """Where and how to run."""

    name: str | None = None
    """The run's folder in `runs`; by default the recipe's name."""
    runs: Path = Path("runs")
    """The folder that holds runs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto takes bfloat16 where the hardware is fast at it."""
    restart: bool = False
    """Begin anew, and throw away what the run's folder holds."""
    quiet: bool = False
    """No progress bars."""


def _parse(kind: Any, **options: Any) -> Any:
    """`tyro.cli`, except that a value which a dataclass refuses is an error of ours: one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, ValueError):
            cause = cause.__context__
        if isinstance(cause, ValueError):
            raise cause from None
        sys.stderr.write(printed.getvalue())
        raise


def _parse_run(
    command: str, description: str, argv: Sequence[str]
) -> tuple[RunArgs, RunConfig, EngineConfig]:
    """Two passes: the recipe first, since it gives every other setting its default."""
    from minillm.recipes import RunConfig, recipe
    from minillm.zero import EngineConfig

    name, argv = "tiny", ["--data.sources" if word == "--data" else word for word in argv]
    for index, word in enumerate(argv):
        if word == "--recipe" and index + 1 < len(argv):
            name = argv[index + 1]
        elif word.startswith("--recipe="):
            name = word.partition("=")[2]
    chosen = recipe(name)

    fields = [
        ("run", Annotated[RunArgs, tyro.conf.arg(name="")], dataclasses.field(default_factory=RunArgs)),
        (
            "config",
            Annotated[RunConfig, tyro.conf.arg(name="")],
            dataclasses.field(default_factory=lambda: chosen),
        ),
    ]
    fields.insert(
        1,
        (
            "engine",
            Annotated[EngineConfig, tyro.conf.arg(name="")],
            dataclasses.field(default=EngineConfig()),
        ),
    )
    every = dataclasses.make_dataclass("Args", fields)
    args: Any = _parse(every, prog=f"minillm {command}", description=description, args=argv)
    return args.run, args.config, args.engine


def _run(command: str, argv: Sequence[str]) -> int:
    descriptions = {
        "speedrun": "Corpus, tokenizer, shards, pretraining, scores and a report.html, in RUNS/NAME. Ctrl-C saves; the same "
        "command resumes. Then try `minillm generate`.",
        "pretrain": "Corpus, tokenizer, shards and pretraining, in RUNS/NAME. Ctrl-C saves; the same command resumes.",
    }
    run, config, engine = _parse_run(command, descriptions[command], argv)
    from minillm.runtime import pick_device, pick_dtype, process_group
    from minillm.speedrun import pretrain, speedrun

    device = pick_device(run.device)
    dtype = str(pick_dtype(run.dtype, device)).removeprefix("torch.")
    folder = run.runs / (run.name or config.recipe)
    start = time.monotonic()
    work: Callable[..., Any] = speedrun if command == "speedrun" else pretrain
    settings = {"dtype": dtype, "restart": run.restart, "say": _say, "progress": not run.quiet}
    borrowed = engine.engine in ("fsdp2", "deepspeed")  # they want a group of processes, if only of one
    with process_group(device, timeout_s=engine.timeout_s, always=borrowed) as world:
        outcome = work(config, folder, device=device, engine=engine, world=world, **settings)
        world.wait()  # the first one may have more to do
    if world.rank > 0:
        return 0
    minutes = (time.monotonic() - start) / 60
    if command == "speedrun":
        training, results = outcome["training"], outcome["results"]
        _say(
            f"\nheld-out loss {training['held_out_nats']:.3f} nats a token, {training['bits_per_byte']:.3f} bits a byte; "
            f"training {training['tokens_per_s']:,.0f} tokens/s, decoding {results['decode_tokens_per_s']:,.0f} tokens/s"
        )
        _say(f"{minutes:.1f} minutes. Report: {outcome['report']}")
    _say(f'Talk to it: minillm generate --model {folder} "One day, "')
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Continue a prompt with a trained model; without a prompt, read prompts from the terminal, a line each."""

    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = None
    """The text to continue."""
    model: Path = Path("runs/tiny")
    """A run's folder, or a model's: ours, or as LLaMA, ChatGLM and Baichuan were published."""
    max_new_tokens: int = 200
    """Stop after so many tokens, if the model does not stop before."""
    temperature: float = 0.7
    """0 is greedy; higher is more varied."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there become less likely."""
    n: int = 1
    """How many continuations."""
    seed: int | None = None
    """The same seed gives the same text; by default each call differs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "ice_text.model")


def _load(folder: Path, device: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a run, or of a folder that holds a model itself, in any format."""
    published = any((folder / name).exists() for name in ("config.json", "params.json"))
    if (folder / "model" / "config.json").exists() or not published:
        from minillm.speedrun import load_run

        return load_run(folder, device)
    from minillm.zoo import OWN_TOKENIZER, load_folder

    if not any((folder / name).exists() for name in (*TOKENIZERS, OWN_TOKENIZER)):
        raise ValueError(
            f"{folder} holds a model and no tokenizer ({', '.join(TOKENIZERS)}): put one beside it"
        )
    return load_folder(folder, device=device)


def _generate(argv: Sequence[str]) -> int:
    args = _parse(GenerateArgs, prog="minillm generate", args=list(argv))
    from minillm.generate import Sampler, stream_text
    from minillm.runtime import pick_device, tune_matmul

    sampler = Sampler(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    if args.n < 1 or args.max_new_tokens < 1:
        raise ValueError(f"n and max_new_tokens must be at least 1, got {args.n} and {args.max_new_tokens}")
    tune_matmul()
    model, tokenizer = _load(args.model, pick_device(args.device))
    model.eval()

    def answer(prompt: str, seed: int | None) -> None:
        room = model.config.max_seq_len - len(tokenizer.encode(prompt))
        if room < 1:
            raise ValueError(
                f"the prompt fills the model's context of {model.config.max_seq_len} tokens: shorten it"
            )
        print(prompt, end="", flush=True)
        limit = min(args.max_new_tokens, room)
        for piece in stream_text(model, tokenizer, prompt, max_new_tokens=limit, sampler=sampler, seed=seed):
            print(piece, end="", flush=True)
        print()

    if args.prompt is not None:
        if not args.prompt:
            raise ValueError("the prompt is empty: give at least one character to continue")
        for index in range(args.n):
            answer(args.prompt, None if args.seed is None else args.seed + index)
        return 0
    if sys.stdin.isatty():
        print(f"{args.model}: type the beginning of a text; an empty line or Ctrl-D ends.")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not prompt:
            return 0
        answer(prompt, args.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrain:
    """Learn a vocabulary from text, and say how well it compresses."""

    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files (txt, jsonl, parquet; gz, zst), folders, `stdlib:`; none for the own corpus."""
    out: Path = Path("tokenizer.json")
    """Where it is written."""
    vocab_size: int = 4096
    """Tokens, bytes and special ones included."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """Ours from chapter 04, or SentencePiece's BPE."""
    max_characters: int = 10_000_000
    """Read at most so much text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerEncode:
    """Turn text into token ids, a line each."""

    text: Annotated[str | None, tyro.conf.Positional] = None
    """The text; by default standard input, line by line."""
    tokenizer: Path = Path("tokenizer.json")
    """A tokenizer's file, or a run's folder."""
    pieces: bool = False
    """Show the pieces instead of the ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerDecode:
    """Turn token ids back into text."""

    ids: tyro.conf.Positional[tuple[int, ...]] = ()
    """The ids; by default standard input, a line of ids each."""
    tokenizer: Path = Path("tokenizer.json")
    """A tokenizer's file, or a run's folder."""


def _load_tokenizer(path: Path) -> Any:
    from minillm.tokenizer import load_tokenizer

    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _tokenizer(argv: Sequence[str]) -> int:
    commands = {"train": TokenizerTrain, "encode": TokenizerEncode, "decode": TokenizerDecode}
    if not argv or argv[0] not in commands:
        wanted = bool(argv) and argv[0] in ("-h", "--help")
        text = "minillm tokenizer train | encode | decode    (each with --help)"
        print(text if wanted else f"minillm: error: {text}", file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    args: Any = _parse(commands[argv[0]], prog=f"minillm tokenizer {argv[0]}", args=list(argv[1:]))
    if argv[0] == "train":
        return _tokenizer_train(args)
    tokenizer = _load_tokenizer(args.tokenizer)
    if argv[0] == "encode":
        for text in [args.text] if args.text is not None else (line.rstrip("\n") for line in sys.stdin):
            ids = tokenizer.encode(text)
            print("|".join(tokenizer.decode([i]) for i in ids) if args.pieces else " ".join(map(str, ids)))
        return 0
    for ids in [list(args.ids)] if args.ids else (line.split() for line in sys.stdin):
        try:
            numbers = [int(i) for i in ids]
        except ValueError:
            raise ValueError(f"token ids are whole numbers, got {' '.join(map(str, ids))!r}") from None
        if bad := [i for i in numbers if not 0 <= i < tokenizer.vocab_size]:
            raise ValueError(f"token id {bad[0]} is not in 0..{tokenizer.vocab_size - 1}")
        print(tokenizer.decode(numbers))
    return 0


def _tokenizer_train(args: TokenizerTrain) -> int:
    from minillm.corpus import CorpusConfig, generate, read_documents
    from minillm.tokenizer import compression, train_bpe, train_sentencepiece

    texts, characters = [], 0
    for document in read_documents(list(args.files)) if args.files else generate(CorpusConfig()):
        texts.append(document.text)
        characters += len(document.text)
        if characters >= args.max_characters:
            break
    if not texts:
        raise MiniLLMError(f"{', '.join(args.files)}: no text to learn from")
    start = time.monotonic()
    if args.kind == "bpe":
        tokenizer = train_bpe(texts, args.vocab_size, progress=True)
    else:
        tokenizer = train_sentencepiece(texts, args.vocab_size)
    tokenizer.save(args.out)
    rate = compression(tokenizer, texts[:2000])
    print(
        f"{args.out}: {tokenizer.vocab_size:,} tokens from {characters:,} characters in {time.monotonic() - start:.1f} s; "
        f"{rate.tokens_per_char:.3f} tokens a character, {rate.tokens_per_byte:.3f} a byte"
    )
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    """A published model (LLaMA, ChatGLM, Baichuan; Meta's files) into our format, or one of ours into its family's."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The model's folder, or a run's."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder."""
    dtype: Literal["as stored", "float32", "bfloat16", "float16"] = "as stored"
    """Of the weights."""


def _convert(argv: Sequence[str]) -> int:
    args = _parse(ConvertArgs, prog="minillm convert", args=list(argv))
    import torch

    from minillm.zoo import convert_folder, load_shape

    dtype = None if args.dtype == "as stored" else getattr(torch, args.dtype)
    out = convert_folder(args.folder, args.out, dtype=dtype)
    from minillm.transformer import count_parameters

    print(f"{out}: {count_parameters(load_shape(out)).total:,} parameters")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoArgs:
    """Parameters, memory and FLOPs of a recipe, of a trained run, or of a published model."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """A recipe (tiny, small, m125, m350, b1, b7), a model of the zoo (llama2-70b, …), or the folder of a run or a model."""
    plan: bool = False
    """What a training step needs on each GPU, by number of GPUs and ZeRO stage; without a name for LLaMA-2's 7B, 13B and 70B."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """How many GPUs the plan looks at."""
    gpu_gb: float = 80.0
    """The memory of one GPU, in GB."""
    seq_len: int | None = None
    """Tokens of context; by default the model's."""
    batch_size: int = 1
    """Rows, for the cache and the activations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionArgs:
    """Which attention backend a model would take here, for each kind of mask, and why (chapter 09)."""

    attention: bool = True
    """What this page is about."""
    device: str = "auto"
    """auto, cpu, cuda or mps; need not be on this machine."""
    seq_len: int = 2048
    """Tokens T, as many keys."""
    batch_size: int = 8
    """Rows B."""
    n_heads: int = 32
    """Query heads H."""
    head_dim: int = 128
    """Head width Dh."""


def _info_attention(argv: Sequence[str]) -> int:
    args = _parse(AttentionArgs, prog="minillm info", args=list(argv))
    import torch

    from minillm.attention import Mask
    from minillm.flash import INSTALLED, choose_backend
    from minillm.runtime import pick_device

    kind = pick_device("auto").type if args.device == "auto" else args.device
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {args.device!r}")
    B, T = args.batch_size, args.seq_len
    if min(B, T, args.n_heads, args.head_dim) < 1:
        raise ValueError("seq_len, batch_size, n_heads and head_dim must be at least 1")
    ids, real = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)
    cases: dict[str, tuple[Mask, int, bool, bool]] = {  # mask, queries, ALiBi, gradients
        "causal": (Mask(), T, False, True),
        "prefix": (Mask(prefix=torch.ones(B, dtype=torch.long)), T, False, True),
        "documents": (Mask(documents=ids), T, False, True),
        "padding": (Mask(keys=real), T, False, True),
        "ALiBi, training": (Mask(), T, True, True),
        "ALiBi, reading": (Mask(), T, True, False),
        "one new token": (Mask(), 1, False, False),
    }
    here = " and ".join(
        f"{name.replace('_', '-')} {'is' if there else 'is not'} installed"
        for name, there in INSTALLED.items()
    )
    print(f"attention on {kind}, {B} x {T:,} tokens, {args.n_heads} heads of {args.head_dim}; {here}")
    modern = True
    if kind == "cuda" and torch.cuda.is_available():
        modern = torch.cuda.get_device_properties(0).major >= 8
    for dtype in (
        (torch.bfloat16, torch.float16, torch.float32) if kind == "cuda" else (torch.float32, torch.bfloat16)
    ):
        print(str(dtype).removeprefix("torch."))
        for name, (mask, queries, alibi, gradients) in cases.items():
            shape = (B, args.n_heads, queries, args.head_dim)
            choice = choose_backend(
                kind, dtype, mask, shape=shape, n_keys=T, alibi=alibi, gradients=gradients, modern=modern
            )
            print(f"  {name:16} {choice.backend:10} {choice.why}")
    return 0


def _model_config(name: str) -> ModelConfig:
    from minillm.recipes import RECIPES, recipe
    from minillm.zoo import MODELS, load_shape

    if name in RECIPES:
        return recipe(name).model
    if name in MODELS:
        return MODELS[name]
    folder = Path(name)
    path = next((p for p in (folder / "model" / "config.json", folder / "config.json") if p.exists()), None)
    if path is None:
        raise ValueError(
            f"{name!r} is neither a recipe ({', '.join(RECIPES)}), nor a published model "
            f"({', '.join(MODELS)}), nor the folder of a run or model"
        )
    return load_shape(path.parent)


def _plan(args: InfoArgs, models: dict[str, ModelConfig]) -> int:
    """Tables of what fits where, and what they count."""
    from minillm.transformer import count_parameters
    from minillm.zero import step_bytes

    if not args.gpus or min(args.gpus) < 1 or not args.gpu_gb > 0:
        raise ValueError(f"gpus and gpu_gb must be at least 1 and above 0, got {args.gpus} and {args.gpu_gb}")
    for name, model in models.items():
        seq_len, total = args.seq_len or model.max_seq_len, count_parameters(model).total
        print(f"{name}: {total:,} parameters, {args.batch_size} x {seq_len:,} tokens on each GPU, bfloat16")
        print(f"GB on each GPU; * fits into {args.gpu_gb:g}")
        print(f"{'GPUs':>6}", *(f"{f'stage {stage}':>10} " for stage in range(4)))
        options = {"rows": args.batch_size, "seq_len": seq_len}
        activations = step_bytes(model, stage=0, world_size=1, **options)["activations"]
        for n in args.gpus:
            needs = []
            for stage in range(4):
                parts = step_bytes(model, stage=stage, world_size=n, **options)
                needs.append(sum(parts.values()) / 1e9)
            print(f"{n:6}", *(f"{need:10.1f}{'*' if need <= args.gpu_gb else ' '}" for need in needs))
        whole = 4 * total / 1e9
        print(
            f"of which activations {activations / 1e9:.1f}; at the start each has the whole model in float32, ",
            end="",
        )
        print(f"{whole:.1f}{'' if whole <= args.gpu_gb else ': too much'}\n")
    print("Without what the loss, the libraries and fragmentation take: leave a tenth free.")
    return 0


def _size(n_bytes: int | float) -> str:
    """Bytes in GiB, or in MiB where they are fewer than one."""
    return f"{n_bytes / 2**30:.3f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def _info(argv: Sequence[str]) -> int:
    if "--attention" in argv:
        return _info_attention(argv)
    args = _parse(InfoArgs, prog="minillm info", args=list(argv))
    from minillm.transformer import count_parameters, flops_per_token, kv_cache_bytes

    if args.batch_size < 1 or (args.seq_len is not None and args.seq_len < 1):
        raise ValueError(
            f"seq_len and batch_size must be at least 1, got {args.seq_len} and {args.batch_size}"
        )
    if args.plan:
        names = [args.name] if args.name else ["llama2-7b", "llama2-13b", "llama2-70b"]
        return _plan(args, {name: _model_config(name) for name in names})
    if args.name is None:
        raise ValueError(
            "info needs a name: of a recipe, a published model such as llama2-7b, or the folder of a run or model"
        )
    model = _model_config(args.name)
    seq_len = args.seq_len or model.max_seq_len
    count = count_parameters(model)
    print(f"{args.name}: {count.total:,} parameters")
    for field in dataclasses.fields(count):
        print(f"  {field.name.replace('_', ' '):12} {getattr(count, field.name):>18,}")
    print("shape")
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            print(f"  {field.name:12} {value!s:>18}")
    print("memory")
    for bits in (32, 16, 8, 4):
        print(f"  weights, {bits:2} bit {_size(count.total * bits / 8):>20}")
    print(f"  training in mixed precision, 16 bytes a parameter: {_size(16 * count.total)}, and activations")
    cache = kv_cache_bytes(model, batch_size=args.batch_size, n_tokens=seq_len)
    print(f"  KV cache, 16 bit, {args.batch_size} x {seq_len:,} tokens: {_size(cache)}")
    print("compute")
    forward = flops_per_token(model, seq_len)
    print(f"  forward  {forward / 1e9:12.4f} GFLOP a token at {seq_len:,} tokens")
    print(f"  training {3 * forward / 1e9:12.4f} GFLOP a token")
    return 0


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

    from minillm.clean import with_repetitions
    from minillm.corpus import CorpusConfig, Document, benchmark_item, generate, write_documents

    defects = dataclasses.field(default_factory=lambda: CorpusConfig(defects=0.3))
    fields = [
        ("run", Annotated[CorpusArgs, tyro.conf.arg(name="")], dataclasses.field(default_factory=CorpusArgs)),
        ("config", Annotated[CorpusConfig, tyro.conf.arg(name="")], defects),
    ]
    both = dataclasses.make_dataclass("Args", fields)
    parsed: Any = _parse(both, prog="minillm corpus", description=CorpusArgs.__doc__, args=list(argv))
    args, config = parsed.run, parsed.config
    if args.documents < 1:
        raise ValueError(f"documents must be at least 1, got {args.documents}")
    last_item = 0

    def documents() -> Any:
        nonlocal last_item
        made = generate(config, n_documents=args.documents, split=args.split)
        bar = tqdm(
            made, total=args.documents, unit="doc", disable=args.quiet, leave=False, desc=str(args.out)
        )
        for document in with_repetitions(bar):
            last_item = max(last_item, document.meta.get("item", 0))
            yield document

    n = write_documents(documents(), args.out)
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
    """What to clean, and where to put it."""

    sources: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files (txt, jsonl, parquet; gz, zst), folders, patterns with *, `stdlib:`, `hf:owner/name`."""
    out: Path = Path("clean")
    """A folder: the clean text goes into its `documents`."""
    recipe: Literal["web", "own"] = "web"
    """What every setting of the steps has as its default: web for text from anywhere, own for the project's own corpus."""
    report: bool = True
    """Write report.html beside report.json."""
    keep_dropped: bool = False
    """Keep what was dropped, with step and reason, in dropped.jsonl.gz."""
    on_error: Literal["skip", "raise"] = "skip"
    """skip counts what cannot be read, names it with file and line, and goes on; raise stops at it."""
    workers: int = 0
    """Processes; 0 for one a core. What comes out does not depend on it."""
    chunk_documents: int = 1000
    """So many documents are a unit of work: what a kill costs, and what a worker holds in memory."""
    seconds_per_document: float = 60.0
    """A step that works longer on one document drops it."""
    max_chars: int = 1_000_000
    """Longer records are not read; longer text files are cut."""
    text_field: str = "text"
    """The field or column of the text."""
    restart: bool = False
    """Begin anew, and throw away what --out holds of another cleaning run."""
    quiet: bool = False
    """No progress bars."""


def _clean(argv: Sequence[str]) -> int:
    from minillm.clean import CleanConfig, clean, clean_recipe, default_steps

    words = list(argv)
    named = [word.partition("=")[2] for word in words if word.startswith("--recipe=")]
    named += [after for word, after in zip(words, words[1:]) if word == "--recipe"]
    chosen = clean_recipe(named[-1] if named else "web")
    fields = [
        ("run", Annotated[CleanArgs, tyro.conf.arg(name="")], dataclasses.field(default_factory=CleanArgs)),
        (
            "config",
            Annotated[CleanConfig, tyro.conf.arg(name="")],
            dataclasses.field(default_factory=lambda: chosen),
        ),
    ]
    both = dataclasses.make_dataclass("Args", fields)
    description = (
        "Lead text through the steps of chapters 02 and 03: extract, repair, language, heuristics, length, machine, pii, "
        "toxicity, exact, near, sentences, decontaminate. --skip NAME… leaves steps out. A run that was stopped or killed is "
        "taken up by the same command. Then: minillm speedrun --data OUT/documents"
    )
    parsed: Any = _parse(both, prog="minillm clean", description=description, args=words)
    args = parsed.run
    if not args.sources:
        raise ValueError(
            "nothing to clean: name files or folders, or write a corpus first: minillm corpus --out raw.jsonl"
        )
    if args.workers < 0:
        raise ValueError(f"workers must not be negative, got {args.workers}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    steps = default_steps(parsed.config, args.sources)
    try:
        result = clean(
            args.sources,
            steps,
            args.out,
            workers=args.workers or cores,
            on_error=args.on_error,
            keep_dropped=args.keep_dropped,
            report=args.report,
            restart=args.restart,
            chunk_documents=args.chunk_documents,
            seconds_per_document=args.seconds_per_document,
            max_chars=args.max_chars,
            text_field=args.text_field,
            progress=not args.quiet,
            say=_say,
        )
    except KeyboardInterrupt:
        print("minillm: interrupted; the same command resumes", file=sys.stderr)
        return 130
    _say_clean(args.out, result)
    return 0


def _say_clean(out: Path, result: dict[str, Any]) -> None:
    from minillm.report import truth_table

    _say(f"{'step':14} {'in':>10} {'dropped':>10} {'changed':>10} {'out':>10}  reasons")
    for step in result["steps"]:
        ranked = sorted(step["reasons"].items(), key=lambda pair: (-pair[1], pair[0]))
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in ranked[:3])
        numbers = (step["n_in"], step["n_in"] - step["n_out"], step["changed"], step["n_out"])
        _say(f"{step['name']:14} " + " ".join(f"{n:10,}" for n in numbers) + f"  {reasons}")
    if truth := truth_table(result):
        _say(
            f"\n{'step':14} {'to find':>8} {'caught':>8} {'recall':>8} {'acted on':>9} {'precision':>9} {'sound':>7}"
            "  (against the truth; sound: had no defect at all)"
        )
        for row in truth:
            counts = f"{row['planted']:8,} {row['caught']:8,} {row['recall']:8.3f} {row['acted']:9,} {row['precision']:9.3f} {row['sound']:7,}"
            _say(f"{row['step']:14} {counts}")
    for problem in result["read"]["problems"][:5]:
        _say(f"not read: {problem}")
    books, rate = result["balance"], result["balance"]["in"] / max(result["seconds"], 1e-9)
    _say(
        f"\n{books['in']:,} in = {books['out']:,} out + {books['dropped']:,} dropped + {books['unreadable']:,} unreadable; "
        f"{result['seconds']:.1f} s, {rate:,.0f} documents/s"
    )
    _say(f"Clean text: {out / 'documents'}. Report: {out / 'report.html'}")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "speedrun": lambda argv: _run("speedrun", argv),
    "pretrain": lambda argv: _run("pretrain", argv),
    "corpus": _corpus,
    "clean": _clean,
    "generate": _generate,
    "tokenizer": _tokenizer,
    "convert": _convert,
    "info": _info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(f"minillm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"minillm: error: no command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        from minillm.runtime import set_up_logging

        set_up_logging()
        return COMMANDS[argv[0]](argv[1:])
    except BrokenPipeError:  # the reader of a pipe, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MiniLLMError, ValueError, OSError) as error:
        print(f"minillm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minillm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from minillm.train import Interrupted

        if isinstance(error, Interrupted):
            print(f"minillm: {error}", file=sys.stderr)
            return 128 + getattr(signal, error.signal_name, signal.SIGINT)
        raise


if __name__ == "__main__":
    sys.exit(main())
