"""A training step on this CPU against its matrix products alone, and alone against beside busy processes.

    python benchmarks/step.py --model MODEL --cases chat,hh --data PAIRS --busy 2

The products of one step are noted as they are called (shapes, layouts, dtypes) and repeated on other numbers: nothing
can train faster than they take. Step and products alternate; medians. One process, nothing else should run.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(REPO / "benchmarks"), str(REPO / "src")) if folder not in sys.path]

import simpo  # noqa: E402, F401  before torch: its settings of the environment

import torch  # isort: skip  # noqa: E402
from peers.cases import build_pairs, find_cases  # noqa: E402
from peers.models import small_model_folder  # noqa: E402
from peers.sides import SideSpec, build_recipe, pairs_as_dataset  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from simpo.data.cache import PreparedData  # noqa: E402
from simpo.data.ledger import Ledger, SplitLedger  # noqa: E402
from simpo.data.loader import StepPlan  # noqa: E402
from simpo.display import Display  # noqa: E402
from simpo.trainer import Trainer  # noqa: E402

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}  # attention's are not unavoidable in this form


class Products(TorchDispatchMode):
    """Notes the layout of every matrix product's operands."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]]] = []
        self.operands: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            self.calls.append((function, [(x.shape, x.stride(), x.dtype) for x in args if isinstance(x, Tensor)]))
        return function(*args, **(kwargs or {}))

    def flops(self) -> float:
        return sum(2.0 * a[0].numel() * b[0][-1] for _, (*_, a, b) in self.calls)

    def repeat(self) -> None:
        """Each product again; operands of one layout share their memory, which the first call fills."""
        for function, operands in self.calls:
            keys = [(place, *operand) for place, operand in enumerate(operands)]
            for key in keys:
                if key not in self.operands:
                    _, shape, stride, dtype = key
                    self.operands[key] = torch.empty_strided(shape, stride, dtype=dtype).normal_()
            function(*(self.operands[key] for key in keys))


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def burn() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, so many processes loop."""
    processes = [multiprocessing.get_context("spawn").Process(target=burn, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(2 if count else 0)
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def build(case: Any, args: argparse.Namespace, scratch: str) -> tuple[Trainer, StepPlan]:
    """The trainer of `bench.py`'s own side, and a step of the case's first pairs."""
    spec = SideSpec(
        side="simpo",
        model=str(args.model),
        device="cpu",
        bf16=args.dtype == "bf16",
        threads=args.threads,
        pairs_per_micro_batch=args.pairs,
        accumulation=1,
        steps=1,
        warm_up_steps=1,
        scratch=scratch,
    )
    torch.set_num_threads(args.threads)
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    pairs = build_pairs(case, args.pairs, vocab_size=vocabulary, tokenizer=args.model, data=args.data)
    ledger = Ledger(splits={"train": SplitLedger(input=len(pairs), kept=len(pairs))})
    data = PreparedData(pairs_as_dataset(pairs), None, ledger)
    trainer = Trainer(build_recipe(spec), display=Display(quiet=True), data=data)
    labels = sum(len(pair.chosen_ids) - pair.chosen_start for pair in pairs)
    return trainer, StepPlan(0, 0, len(pairs), labels, (tuple(range(len(pairs))),))


def measure(case: Any, args: argparse.Namespace) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, plan = build(case, args, scratch)
        products = Products()
        with products:
            trainer.train_step(plan)
        for _ in range(3):
            trainer.train_step(plan)
        products.repeat()
        steps, alone = [], []
        for _ in range(args.rounds):
            steps.append(seconds(lambda: trainer.train_step(plan)))
            alone.append(seconds(products.repeat))
        with busy(args.busy):
            beside = [seconds(lambda: trainer.train_step(plan)) for _ in range(args.rounds if args.busy else 0)]
    step, product = statistics.median(steps), statistics.median(alone)
    neighbours = f"{statistics.median(beside):.2f} | {statistics.median(beside) / step:.2f}" if beside else "| "
    return (
        f"| {case.name} | {step:.2f} ({min(steps):.2f} to {max(steps):.2f}) | {product:.2f} | "
        f"{products.flops() / product / 1e9:.0f} | {step / product:.2f} | {neighbours} |"
    )


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="its folder; default the one that make model fetches")
    parser.add_argument("--cases", default="chat,hh,longprompt", help="as bench.py takes them")
    parser.add_argument("--data", default="../shared/data", help="folder that holds the real cases' sets")
    parser.add_argument("--pairs", type=int, default=4, help="of the step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--busy", type=int, default=0, help="processes that loop beside it")
    args = parser.parse_args()
    args.model = args.model or small_model_folder()
    print("| case | step s | products s | their GFLOP/s | step / products | step s beside busy ones | beside / alone |")
    print("|---|---|---|---|---|---|---|")
    for case in find_cases(args.cases):
        print(measure(case, args), flush=True)


if __name__ == "__main__":
    main()
