"""What minillm makes, every bit of it, as SHA-256: two trees with the same bits do the same.

In each of two trees, on one machine: `OMP_NUM_THREADS=1 python tests/golden_bits.py > bits.json`; then diff.
Texts, ids and files are the same on every machine, and test_golden.py holds them against literals. `judges`,
`attention`, `numbers`, `sessions` and `training` are floating-point: the same to the bit on one machine.
"""

import contextlib
import gzip
import hashlib
import json
import sys
import traceback
from dataclasses import asdict, replace
from functools import cache
from itertools import chain, islice, product
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))  # this tree, not an installed one

import torch

from minillm.attention import Mask, attend
from minillm.batches import Loader
from minillm.corpus import Document, dice
from minillm.detect import machine_detector
from minillm.extract import decode_page, extract_density
from minillm.filter import identify_ngram, measure
from minillm.flash import attend_by_block, attend_fast, attend_naive, attend_tiled
from minillm.generate import (
    Sampler,
    Session,
    generate,
    generate_text,
    left_pad,
    log_likelihood,
    prefill,
    stream_text,
)
from minillm.harm import find_pii, toxicity_classifier
from minillm.hub import ModelFolder
from minillm.hub.own import save_model
from minillm.pipeline.run import clean
from minillm.pipeline.steps import CLEAN_RECIPES, clean_recipe, default_steps
from minillm.readers.documents import write_documents
from minillm.runs.exams import EXAMS
from minillm.runs.keeper import RunKeeper
from minillm.runs.recipes import RECIPES, recipe
from minillm.serving.fast import Prepared, prepare
from minillm.storage.checkpoints import load_checkpoint, save_checkpoint
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import load_tokenizer, train_bpe, train_sentencepiece
from minillm.train import TrainConfig, autocast, evaluate_loss, head_weight, linear_cross_entropy, train
from minillm.transformer import ModelConfig, Transformer
from minillm.world.defects import benchmark_item
from minillm.world.documents import questions
from minillm.world.pages import write_page
from minillm.world.reading import score_story
from minillm.world.stream import documents
from minillm.world.task import PARTS, CorpusConfig
from minillm.zoo import MODELS

SPOILED = CorpusConfig(defects=0.5)
EVERYTHING = CorpusConfig(seed=1, **dict.fromkeys(PARTS, 1.0))
TEXTS = (
    "One day, Lily saw 3 red apples.\n",
    "有一天，莉莉看到了3个红苹果。",
    "  naïve <|eos|>\t12+34=46 — 🙂 \ud800",
)
LLAMA = ModelConfig(
    vocab_size=512, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=128
)
KINDS = {
    "llama": LLAMA,
    "baichuan": replace(LLAMA, n_kv_heads=4, position="alibi", norm_head=True),
    "chatglm2": replace(
        LLAMA, rope_fraction=0.5, rope_interleaved=True, rope_scale=2.0, qkv_bias=True, tied=True,
    ),
    "chatglm": replace(
        LLAMA, n_kv_heads=4, norm="layer", mlp="gelu", position="rope2d", residual="glm",
        qkv_bias=True, out_bias=True, mlp_bias=True, glm_ids=(500, 501, 504),
    ),
}  # fmt: skip


def digest(value):
    """The SHA-256 of bytes, of a tensor with its shape and dtype, or of the JSON of what is made of them."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        value = f"{value.dtype} {tuple(value.shape)} ".encode() + data
    if not isinstance(value, bytes):
        value = json.dumps(value, default=digest).encode()
    return hashlib.sha256(value).hexdigest()


def files(folder):
    """The bytes of all files of a folder, those of a gzip file unpacked: zlib's versions differ."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in found.items()}


@cache
def model(kind):
    """A model of weights in 1/256ths, the same on every machine: normal random numbers are not."""
    made = Transformer(KINDS[kind])
    with torch.no_grad():
        for name, weight in made.named_parameters():
            r, gain = dice("golden", name), name.endswith("norm.weight")
            drawn = torch.tensor([int(256 * r()) / 256 - 0.5 for _ in range(weight.numel())])
            weight.copy_(drawn.view_as(weight) + gain)
    return made


@cache
def texts():
    return [document.text for document in documents(CorpusConfig(), n_documents=200)]


@cache
def tokenizer():
    return train_bpe(texts(), 512)


def prompts(kind):
    """An English and a Chinese prompt of different lengths, in the form in which a model reads prompts."""
    end = [501, 504] if kind == "chatglm" else []
    return [tokenizer().encode(text) + end for text in TEXTS[:2]]


def write_tokens(folder):
    eos = tokenizer().eos_id
    write_shards(tokenizer().encode_batch(texts()), folder, vocab_size=512, eos_id=eos, shard_tokens=8000)
    return TokenShards(folder, verify=True)


# What is the same on every machine


# The settings of cleaning in the order in which they were recorded, and what the steps have beside these.
CLEAN_SETTINGS = (
    *("extract", "repair", "language", "heuristics", "length", "machine", "pii", "toxicity"),
    *("near", "sentences", "decontaminate", "skip"),
)
BESIDE = ("name", "count", "seed")


def recorded(name):
    """A recipe of cleaning as it was recorded. One default is another since: the recipe "web" took 13 characters of Chinese
    that a document shares with a benchmark for a leak, where chapter 06 finds that 20 are needed."""
    steps = clean_recipe(name)
    if name == "web":
        assert steps.decontaminate.n_zh == 20
        steps = replace(steps, decontaminate=replace(steps.decontaminate, n_zh=13))
    return steps


def clean_settings(name):
    found = {step: asdict(recorded(name))[step] for step in CLEAN_SETTINGS}
    return {
        step: {name: value for name, value in settings.items() if name not in BESIDE}
        if step != "skip"
        else settings
        for step, settings in found.items()
    }


def recipes(folder):
    return {
        "run": {name: asdict(recipe(name)) for name in RECIPES},
        "clean": {name: clean_settings(name) for name in CLEAN_RECIPES},
        "steps": {name: [step.name for step in default_steps(clean_recipe(name))] for name in CLEAN_RECIPES},
        "models": {name: asdict(config) for name, config in MODELS.items()},
    }


def corpus(folder):
    made = {
        "default": documents(CorpusConfig(), n_documents=300),
        "heldout": documents(CorpusConfig(), n_documents=100, split="heldout", start=7),
        "everything": documents(EVERYTHING, n_documents=200),
        "spoiled": documents(SPOILED, n_documents=200),
        "benchmark": (benchmark_item(SPOILED, number) for number in range(20)),
    }
    for name, each in made.items():
        write_documents(each, folder / f"{name}.jsonl")
    return files(folder)


def exams(folder):
    def ask(config, kind, lang, split, n):
        found = questions(config, kind, lang, split, n)
        return [[each.prompt, each.answer, each.kind, each.lang, each.meta] for each in found]

    stories = [d for d in documents(CorpusConfig(), n_documents=60) if d.kind.startswith("stories")]
    return {
        "exams": [asdict(exam) for exam in EXAMS],
        "asked": [ask(CorpusConfig(), exam.kind, exam.lang, exam.split, 12) for exam in EXAMS],
        "of every part": {part: ask(EVERYTHING, part, "zh", "heldout", 5) for part in PARTS},
        "read back": [asdict(score_story(story.text, story.lang)) for story in stories],
    }


def pages(folder):
    made = [write_page(("golden", number)) for number in range(12)]
    read = [decode_page(page.data, page.declared) for page in made]
    return {
        "written": [page.data for page in made],
        "truth": [[page.text, page.traps] for page in made],
        "read": read,
        "main text": [extract_density(text) for text, _ in read],
    }


def cleaned(folder):
    found = {}
    with contextlib.chdir(folder):  # so that no document says where it lay
        web = (Document(decode_page(write_page(number).data)[0]) for number in range(60))
        write_documents(chain(documents(SPOILED, n_documents=240), web), "raw.jsonl")
        write_documents([benchmark_item(SPOILED, number) for number in range(8)], "benchmark.jsonl")
        for name in CLEAN_RECIPES:
            config = recorded(name)
            against = replace(config.decontaminate, against=("benchmark.jsonl",))
            steps = default_steps(replace(config, decontaminate=against), ["raw.jsonl"])
            report = clean("raw.jsonl", steps, name, keep_dropped=True, report=False, chunk_documents=100)
            accounts = [{**step, "seconds": 0} for step in report["steps"]]
            made = files(Path(name))
            found[f"{name}, kept"] = [data for file, data in made.items() if file.startswith("documents")]
            found[f"{name}, dropped"] = made["dropped.jsonl.gz"]
            found[f"{name}, accounts"] = [report["balance"], report["tokens"], accounts]
    return found


def tokenizers(folder):
    ours, theirs = tokenizer(), train_sentencepiece(texts(), 900)
    paths = {"bpe": ours.save(folder), "sentencepiece": theirs.save(folder / "tokenizer.model")}
    found = {f"{name}, file": path.read_bytes() for name, path in paths.items()}
    for name, path in paths.items():
        ids = [load_tokenizer(path).encode(text) for text in (*TEXTS, *texts()[:50])]
        found[f"{name}, ids"] = ids
        found[f"{name}, decoded"] = [load_tokenizer(path).decode(each[1:], show_special=True) for each in ids]
    return found


def shards(folder):
    tokens = write_tokens(folder / "tokens")
    found = files(folder)
    for packing in ("documents", "rows", "concat"):
        settings = {"batch_size": 4, "seq_len": 48, "packing": packing, "window": 8}
        loaders = [Loader(tokens, **settings, rank=rank, world_size=2) for rank in range(2)]
        batches = [[vars(batch) for batch in islice(loader, 0, 200, 20)] for loader in loaders]
        found[f"{packing}, batches"] = [batches, loaders[0].state_dict()]
    return found


def checkpoints(folder):
    weights = {name: weight.detach() for name, weight in model("llama").state_dict().items()}
    for kind in KINDS:
        save_model(folder / kind, model(kind))
    path = save_checkpoint(folder, 7, tensors={"model": weights}, state={"step": 7, "name": "试"})
    found = files(folder)
    found["loaded"] = {kind: ModelFolder.open(folder / kind).model().state_dict() for kind in KINDS}
    return {**found, "resumed": load_checkpoint(path)}


def published(folder):
    for kind in KINDS:
        save_model(folder / kind / "ours", model(kind))
        tokenizer().save(folder / kind / "ours")
        ModelFolder.open(folder / kind / "ours").convert(folder / kind / "theirs")
        ModelFolder.open(folder / kind / "theirs").convert(folder / kind / "back", dtype=torch.bfloat16)
    found = {kind: files(folder / kind) for kind in KINDS}
    return {
        **found,
        "loaded": [ModelFolder.open(folder / kind / "theirs").model().state_dict() for kind in KINDS],
    }


def spoken(folder):
    llama, n = model("llama"), {"max_new_tokens": 48}
    mixed = Sampler(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    greedy = {kind: generate(model(kind), prompts(kind), **n) for kind in KINDS}
    few = generate(llama, prompts("llama"), max_new_tokens=20)  # too few to prepare the weights for them
    assert greedy["llama"] == generate(Prepared(llama), prompts("llama"), **n)
    assert few == [row[:20] for row in greedy["llama"]]
    found = {"greedy": greedy, "sampled": generate(llama, prompts("llama"), **n, sampler=mixed, seed=3)}
    for name, sampler in {"greedy": None, "sampled": mixed}.items():
        how = {**n, "sampler": sampler, "stop": ("le",)}
        pieces = [list(stream_text(llama, tokenizer(), text, seed=3, **how)) for text in TEXTS]
        whole = generate_text(llama, tokenizer(), TEXTS, seed=[3] * len(TEXTS), **how)
        assert ["".join(each) for each in pieces] == whole
        found[f"{name}, streamed"] = pieces
    return found


# What is the same to the bit on one machine only


def judges(folder):
    """What the classifiers of the corpus think of some documents."""
    some = [document.text for document in documents(SPOILED, n_documents=60)]
    return {
        "measures": [measure(text) for text in some],
        "language": [identify_ngram(text) for text in some],
        "machine": [machine_detector()(text) for text in some],
        "toxicity": [toxicity_classifier()(text) for text in some],
        "personal": [[[span.start, span.end, span.kind] for span in find_pii(text)] for text in some],
    }


def attention(folder):
    """Output and gradients of what computes attention on a CPU, with a prefix, documents and slopes."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 8, requires_grad=True) for heads in (4, 2, 2))
    rows = torch.arange(40).expand(2, -1)
    masks = {"causal": Mask(), "documents": Mask(documents=rows // 16), "prefix": Mask(prefix=rows[:, 9])}
    ways = {
        "plain": attend,
        "block": attend_by_block,
        "naive": attend_naive,
        "tiled": attend_tiled,
        "fast": attend_fast,
    }
    found = {}
    for (way, function), (name, mask) in product(ways.items(), masks.items()):
        for slopes in (None, 2.0 ** -torch.arange(1, 5)):
            out = function(q, k, v, mask, slopes=slopes)
            gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
            found.setdefault(f"{way}, {name}", []).append([out, *gradients])
    return found


def numbers(folder):
    """Loss, logits and gradients of each kind of model, and three steps of the AdamW that trains."""
    found = {}
    for kind, precision in (*((kind, "float32") for kind in KINDS), ("llama", "bfloat16")):
        tokens = torch.tensor([ids[-8:] for ids in prompts(kind)])
        with autocast(torch.device("cpu"), precision):
            logits = model(kind)(tokens)
            hidden, head = model(kind).hidden(tokens), head_weight(model(kind))
            loss = linear_cross_entropy(hidden, head, tokens.roll(-1, 1))
        gradients = torch.autograd.grad(loss, list(model(kind).parameters()))
        found[f"{kind}, {precision}"] = [loss, logits, gradients]
    weight = model("llama").head.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        weight.sin().sum().backward()
        optimizer.step()
    return {**found, "AdamW": [weight, optimizer.state_dict()["state"]]}


def sessions(folder):
    """The logits of decoding, through the model itself and through prepared weights."""
    found = {"log-likelihood": log_likelihood(model("llama"), prompts("llama"), [[7, 8, 9], [10]])}
    for kind in KINDS:
        for n_steps in (1, 24):
            ids, real = left_pad(prompts(kind), 0, 512)
            real = torch.nn.functional.pad(real, (0, 3), value=True)
            cache = model(kind).make_cache(*real.shape)
            with torch.inference_mode():
                logits = [prefill(model(kind), ids, real[:, :-3], cache)]
                fast = prepare(model(kind), n_steps)
                session = (
                    fast.session(cache, real) if isinstance(fast, Prepared) else Session(fast, cache, real)
                )
                logits += [session.step(torch.tensor([n, 9])).clone() for n in range(3)]
            found[f"{kind}, {n_steps}"] = logits
    return found


def training(folder):
    """Fifty steps of a small model from random weights, and the checkpoint at their end."""
    tokens, lines = write_tokens(folder / "tokens"), []
    data = {"batch_size": 4, "seq_len": 48}
    config = TrainConfig(
        steps=50, **data, accumulation=2, max_lr=1e-2, warmup_steps=5, eval_every=25, compile="off"
    )
    torch.manual_seed(0)
    trained = Transformer(LLAMA)
    begin = {name: weight.clone() for name, weight in trained.state_dict().items()}

    def held_out(model):
        batches = Loader(tokens, **data, seed=1).epoch_batches()
        return {"held_out_nats": evaluate_loss(model, batches, max_batches=4)}

    keeper = RunKeeper(folder / "run", eval_fn=held_out, on_step=lines.append, progress=False)
    result = train(trained, Loader(tokens, **data), config, keeper=keeper)
    groups, state = load_checkpoint(folder / "run" / "checkpoints" / "step-00000050")
    clocks = {"seconds": 0, "interval": 0}
    return {
        "loss": [line.loss_nats for line in lines],
        "norm": [line.grad_norm for line in lines],
        "rate": [line.lr for line in lines],
        "held out": [line["held_out_nats"] for line in result.metrics if "held_out_nats" in line],
        "first weights": begin,
        "last weights": trained.state_dict(),
        "checkpoint": [groups, {**state, **clocks}],
    }


EXACT = (recipes, corpus, exams, pages, cleaned, tokenizers, shards, checkpoints, published, spoken)
ROUNDED = (judges, attention, numbers, sessions, training)


def hashes(part, folder):
    """The digests of what a part makes in an empty folder."""
    return {name: digest(value) for name, value in part(folder).items()}


def bits():
    """Everything: `part: name` and its SHA-256."""
    torch.set_num_threads(1)
    found = {}
    for part in (*EXACT, *ROUNDED):
        with TemporaryDirectory() as folder:
            try:
                made = hashes(part, Path(folder))
            except Exception as error:  # the other parts are worth knowing all the same
                traceback.print_exc()
                made = {"failed": str(error)}
        found |= {f"{part.__name__}: {name}": each for name, each in made.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(bits(), indent=1))
