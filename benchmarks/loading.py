"""Loading time and peak memory of a published checkpoint, beside transformers, into data/results/loading.json.

python -m benchmarks.loading          # one or two minutes; makes a checkpoint of about 330 MB and removes it

Each measurement is a process of its own, in turns: minillm, transformers, minillm, … Time goes from the call to the end of one
forward pass that uses every weight, so that what is mapped has been read. Memory is the highest resident memory above that
before the call. Files are in the page cache.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine
from minillm.hub.published import save_published
from minillm.transformer import ModelConfig, Transformer, count_parameters

RESULTS = Path(__file__).parent.parent / "data" / "results" / "loading.json"
SHAPE = ModelConfig(
    vocab_size=32000,
    dim=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    hidden_dim=2048,
    max_seq_len=512,
    tied=False,
)
ROUNDS = 5
PROCESS = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
if hasattr(os, "sched_setaffinity"):  # loaders that start threads of their own stay on the one core too
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
who, folder, dtype = sys.argv[1:]
dtype = None if dtype == "stored" else getattr(torch, dtype)
tokens = torch.zeros(1, 8, dtype=torch.long)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
if who == "minillm":
    from minillm.hub import ModelFolder
    from minillm.transformer import ModelConfig, Transformer
    shape = dict(vocab_size=9, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=8, max_seq_len=8)
    load, warm = lambda: ModelFolder.open(folder).model(dtype=dtype), Transformer(ModelConfig(**shape))
    use = lambda model: model(tokens)
else:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    shape = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    load, warm = lambda: LlamaForCausalLM.from_pretrained(folder, dtype=dtype or "auto"), LlamaForCausalLM(LlamaConfig(**shape))
    use = lambda model: model(tokens).logits
with torch.no_grad():
    use(warm)  # what the first call imports is not what loading costs
    before, start = status("VmRSS"), time.perf_counter()
    model = load()
    loaded = time.perf_counter() - start
    use(model)
    for weight in model.parameters():
        weight.sum()
    seconds = time.perf_counter() - start
print(json.dumps({
    "load_s": loaded, "load_and_use_s": seconds, "peak_bytes": status("VmHWM") - before,
    "weight_bytes": sum(w.nbytes for w in model.parameters()),
}))
"""


def measure(who: str, folder: Path, dtype: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, who, str(folder), dtype], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    import transformers

    results = {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        for stored, dtype in (
            (torch.float16, "stored"),
            (torch.float16, "float32"),
            (torch.float32, "stored"),
        ):
            folder = Path(name) / f"{stored}-{dtype}"
            save_published(Transformer(SHAPE).to(stored), folder, max_shard_bytes=100 << 20)
            samples: dict[str, list] = {"minillm": [], "transformers": []}
            for _ in range(ROUNDS):
                for who, kept in samples.items():
                    kept.append(measure(who, folder, dtype))
            key = f"{str(stored).removeprefix('torch.')} to {dtype}".replace("to stored", "as stored")
            results[key] = samples
            for measured in ("load_and_use_s", "peak_bytes"):
                ours, theirs = (statistics.median(s[measured] for s in kept) for kept in samples.values())
                print(f"{key:22} {measured:15} minillm / transformers {ours / theirs:.2f}", flush=True)
            peak = statistics.median(s["peak_bytes"] / s["weight_bytes"] for s in samples["minillm"])
            print(f"{key:22} peak memory {peak:.3f} of the weights", flush=True)
    record = {
        "command": "python -m benchmarks.loading",
        "machine": {**describe_machine(), "transformers": transformers.__version__},
        "parameters": count_parameters(SHAPE).total,
        "results": results,
    }
    with atomic_write(RESULTS) as file:
        json.dump(record, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
