"""One process of a benchmark: `python -m peers.worker SPEC.json` prints one JSON line on stdout, nothing else.

A spec's `task` is "prepare" (pairs of every case to files, with the work they need and take), "run" (one side over one
case), "ceiling" (a large matrix product on the GPU) or "write_model" (random weights). Each runs alone, so that its
memory is its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from simpo.core.packing import TokenPair


def main(arguments: Sequence[str]) -> int:
    """Run the task of a spec file."""
    result = _result_channel()
    warnings.filterwarnings("ignore")  # the peers'; a person reads the table
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    task = _TASKS[spec.pop("task")]
    try:
        answer, code = task(**spec), 0
    except ValueError as error:
        answer, code = {"error": str(error)}, 2
    result.write(json.dumps(answer) + "\n")
    result.close()
    return code


def _result_channel() -> Any:
    """The real stdout; what anything else prints goes to stderr from now on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(
    *,
    model: str,
    cases: list[dict[str, Any]],
    sides: list[str],
    steps: int,
    warm_up_steps: int,
    accumulation: int,
    device: str,
    bf16: bool,
    data: str | None,
    scratch: str,
) -> dict[str, Any]:
    """Write each case's pairs, and work out its floor and what each side executes.

    Args:
        model: folder or shape.
        cases: fields of `Case`, with the micro-batch size that will be used.
        sides: whose operations to count.
        steps, accumulation: timed steps, micro-batches in each.
        warm_up_steps: steps whose pairs come first.
        device: "auto", "cpu" or "cuda".
        bf16: whether products will be computed in bf16: the head's chunks hold more rows then.
        data: folder of the named sets.
        scratch: folder for the pair files.
    Returns:
        The device, the model's size, and one entry a case: {"skipped": reason}, or its pairs' file, lengths and work.
    Raises:
        ValueError: no such device, or a model whose work no formula here knows.
    """
    from peers import cases as bench_cases
    from peers import flops
    from peers.models import build_config, num_parameters, tokenizer_folder
    from peers.sides import missing_package
    from simpo.core.packing import iterate_steps
    from simpo.model.load import pick_device

    picked = pick_device(device).type
    config, tokenizer = build_config(model), tokenizer_folder(model)
    shape = flops.model_shape(config)
    counter = _Counter(config, sides, bf16=bf16)
    entries = []
    for fields in cases:
        case = bench_cases.Case(**(fields | {"lengths": tuple(fields["lengths"]) if fields["lengths"] else None}))
        size = case.pairs_per_micro_batch
        per_step = size * accumulation
        try:
            pairs = bench_cases.build_pairs(
                case,
                per_step * steps,
                warm_up=per_step * warm_up_steps,
                vocab_size=config.get_text_config().vocab_size,
                tokenizer=tokenizer,
                data=data,
            )
        except bench_cases.CaseSkipped as error:
            entries.append({"skipped": str(error)})
            continue
        path = Path(scratch) / f"{case.slug}.pairs.json"
        bench_cases.save_pairs(pairs, path)
        batches = list(iterate_steps(pairs, pairs_per_step=size))
        first = accumulation * warm_up_steps  # the first timed micro-batch
        counted = batches[max(0, first - accumulation) : first]  # of the warm-up step that is counted when it runs
        timed = pairs[size * first :]
        works = [flops.pair_work(pair) for pair in timed]
        entries.append(
            {
                "skipped": None,
                "pairs_file": str(path),
                "lengths": bench_cases.describe_pairs(timed),
                "tokens_needed": sum(work.shape.tokens for work in works),
                "floor_flops": flops.floor_flops(shape, works),
                "work": {side: counter.work(side, shape, warm_up=counted, timed=batches[first:]) for side in sides},
                "missing": {side: missing_package(side) for side in sides},
            }
        )
    return {
        "device": picked,
        "gpu": _describe_gpu() if picked == "cuda" else {},
        "num_parameters": num_parameters(model),
        "tokenizer": tokenizer and tokenizer.name,
        "cases": entries,
    }


def _describe_gpu() -> dict[str, Any]:
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {"gpu": torch.cuda.get_device_name(), "gpu_memory_gib": round(memory, 1)}


class _Counter:
    """Counts a side's matrix products on meta tensors, each shape of micro-batch once."""

    # TRL's layout and head are those of the padded reference, which its counted warm-up step confirms.
    SAME_WORK: ClassVar = {"trl": "padded"}

    def __init__(self, config: Any, sides: list[str], *, bf16: bool) -> None:
        self.config = config
        self.bf16 = bf16
        self._models: dict[str, Any] = {}
        self._known: dict[Any, int] = {}

    def work(
        self, side: str, shape: Any, *, warm_up: list[list[TokenPair]], timed: list[list[TokenPair]]
    ) -> dict[str, Any] | None:
        """Operations and tokens of a side over the timed micro-batches; None where it is not installed."""
        from peers import flops
        from peers.sides import missing_package

        side = self.SAME_WORK.get(side, side)
        if missing_package(side) is not None:
            return None
        layout = flops.shared_layout if side == "simpo" else flops.padded_layout
        layouts = [layout(batch) for batch in timed]
        matmul = sum(self._matmul(side, batch) for batch in timed)
        attention = sum(flops.attention_flops(shape, work.attended) for work in layouts)
        return {
            "matmul_flops": matmul,
            "attention_flops": attention,
            "executed_flops": matmul + attention,
            "tokens_computed": sum(work.slots for work in layouts),
            "tokens_unpadded": sum(work.tokens for work in layouts),
            "warm_up_matmul_flops": sum(self._matmul(side, batch) for batch in warm_up),
        }

    def _matmul(self, side: str, batch: list[TokenPair]) -> int:
        from peers import flops

        works = [flops.pair_work(pair) for pair in batch]
        key = (side, tuple((work.shape, work.labels) for work in works))
        if key not in self._known:
            self._known[key] = flops.count_matmul_flops(self._step(side, batch))
        return self._known[key]

    def _step(self, side: str, batch: list[TokenPair]) -> Any:
        """Forward and backward of one micro-batch, as a function of nothing."""
        from peers import flops, sides

        if side not in self._models:
            self._models[side] = flops.build_on_meta(self.config, packed=side == "simpo", bf16=self.bf16)
        model = self._models[side]

        def step() -> None:
            with flops.on_meta():
                sides.forward_backward(side, model, batch)

        return step


# --- run -------------------------------------------------------------------------------------------------------------


def run(*, side: dict[str, Any], pairs_file: str) -> dict[str, Any]:
    """One side over one case's pairs; fields of `sides.Record`."""
    import torch

    from peers.cases import load_pairs
    from peers.sides import SideSpec, run_side

    spec = SideSpec(**side)
    record = dataclasses.asdict(run_side(spec, load_pairs(Path(pairs_file))))
    gpu = torch.cuda.get_device_name() if spec.device == "cuda" else None
    return record | {"gpu": gpu, "threads": torch.get_num_threads()}


# --- the GPU's ceiling, random weights --------------------------------------------------------------------------------


def measure_ceiling(*, size: int = 8192, repeats: int = 10) -> dict[str, Any]:
    """What the GPU reaches in one large bf16 product of random matrices."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    return {"matmul_tflops": round(2 * size**3 / seconds / 1e12, 1)}


def write_model(*, model: str, folder: str, device: str) -> dict[str, Any]:
    """A shape's random weights into a folder."""
    from peers.models import write_random_model

    write_random_model(model, Path(folder), device=device)
    return {"written": True}


_TASKS = {"prepare": prepare, "run": run, "ceiling": measure_ceiling, "write_model": write_model}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
