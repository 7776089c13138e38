"""One side of the comparison, in a process of its own. Reads a line of JSON, does it, answers with one.

    {"do": "hello", "threads": 1}
    {"do": "prepare", "work": {"kind": "train", ...}, "file": "…/tiny.pt"}
    {"do": "measure"}

It runs in the side's own environment, which need not have minillm: only the standard library and torch are imported here.
"""

import contextlib
import ctypes
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SIDES = {
    "minillm": ("benchmarks.sides.ours", "Ours"),
    "plain PyTorch": ("benchmarks.sides.plain", "Plain"),
    "transformers": ("benchmarks.sides.with_transformers", "WithTransformers"),
    "litgpt": ("benchmarks.sides.with_litgpt", "WithLitgpt"),
    "x-transformers": ("benchmarks.sides.with_x_transformers", "WithXTransformers"),
}

# The parts of a training step, and how the operations of each are called.
PARTS = {
    "linear layers": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product_flash", "minillm::blocks"),
    "optimizer": ("Optimizer.step",),
}


def keep_freed_memory() -> None:
    """What `minillm.kernels.matmul.tune_allocator` does, for every side, so that the allocator decides nothing."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
                mallopt(option, value)


class Worker:
    """The side's library, and the work it has prepared."""

    def __init__(self, side: str):
        module, name = SIDES[side]
        self.side = getattr(import_module(module), name)()
        self.work: Callable[[], Any] | None = None

    def hello(self, threads: int) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        return {"versions": self.side.versions(), "same_weights": self.side.same_weights}

    def weights(self, shape: dict[str, int], file: str) -> dict[str, Any]:
        """Write the weights and tokens that all sides use (asked of minillm only)."""
        import torch

        torch.manual_seed(0)
        state = self.side.fresh(shape).state_dict()
        tokens = torch.randint(1, shape["vocab_size"], (16, shape["max_seq_len"] + 1))
        torch.save({"shape": shape, "state": state, "tokens": tokens}, file)
        return {"parameters": sum(t.numel() for t in state.values())}

    def matmul(self, dtype: str, n: int = 1024, rounds: int = 9) -> dict[str, Any]:
        """Operations a processor second of a product of square matrices: what training is held against."""
        import torch

        a, b = (torch.randn(n, n, dtype=getattr(torch, dtype)) for _ in range(2))
        times = []
        for _ in range(rounds + 1):
            start = time.process_time()
            a @ b
            times.append(time.process_time() - start)
        return {"flops_per_s": 2 * n**3 / statistics.median(times[1:])}

    def prepare(self, work: dict[str, Any], file: str) -> dict[str, Any]:
        import torch

        self.work = None
        torch.manual_seed(0)
        data = torch.load(file, weights_only=True)
        tokens, device = data["tokens"], torch.device(work.get("device", "cpu"))
        before = rss_bytes()
        model = self.side.model(data["shape"], data["state"]).to(device)
        del data
        n_parameters = sum(p.numel() for p in model.parameters())
        if work["kind"] in ("train", "memory"):
            rows = tokens[: work["batch"], : work["seq_len"] + 1].to(device)
            x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            self.work = self.side.trainer(model.train(), x, y, work["dtype"], work["compiled"])
        else:
            model = model.to(getattr(torch, work["dtype"])).eval()
            prompt = tokens[: work["batch"], : work["prompt"]].to(device).contiguous()
            if work["kind"] == "decode":
                self.work = self.side.decoder(model, prompt, work["new_tokens"], work["compiled"])
            else:
                prefill = self.side.prefiller(model, prompt)
                self.work = lambda: [round(v, 4) for v in prefill()[0, :8].float().tolist()]
        results = [self.work() for _ in range(1 + work.get("warm_up", 1))]
        result = results[:2] if work["kind"] in ("train", "memory") else results[0]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"result": result, "parameters": n_parameters, "rss_before": before, "peak_rss": peak}

    def measure(self) -> dict[str, Any]:
        assert self.work is not None, "prepare comes first"
        cpu, wall = time.process_time(), time.perf_counter()
        self.work()
        return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    def parts(self) -> dict[str, float]:
        """Where the processor's time goes in what is prepared, by torch's profiler, which makes small operations dearer."""
        from torch.profiler import ProfilerActivity, profile

        assert self.work is not None, "prepare comes first"
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.work()
        events = seen.key_averages()
        shares = {
            part: sum(event.cpu_time_total for event in events if event.key.startswith(names))
            for part, names in PARTS.items()
        }
        total = sum(event.self_cpu_time_total for event in events)
        shares = {part: time / total for part, time in shares.items()}
        return shares | {"the rest": 1 - sum(shares.values())}


def rss_bytes() -> int:
    """Memory in use now (0 where the system does not say)."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not come between
    os.dup2(2, 1)
    keep_freed_memory()
    worker = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if worker is None:
                worker = Worker(sys.argv[1])
            answer = getattr(worker, order.pop("do"))(**order)
        except NotImplementedError as error:
            answer = {"missing": str(error) or "the library does not have it"}
        except Exception as error:  # the other sides go on; the reason is reported
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
