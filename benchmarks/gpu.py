"""What this project wants measured where a CUDA GPU is at hand.

    python benchmarks/gpu.py parity                       # first: is what it computes right? exit code 1 if not
    python benchmarks/gpu.py ladder --model llama-1b      # a step: padded, packed, shared, chunked head, lean, compiled
    python benchmarks/gpu.py memory --model llama-8b      # peak of a step: checkpointing, offload, padded; predicted
    python benchmarks/gpu.py head                         # the log-prob head beside a dense one
    python benchmarks/gpu.py attention                    # beside FlexAttention and beside torch's own, block by block

A rehearsal without a GPU: any of them with --device cpu --model tiny. Each command ends before 9 minutes are over
(`--minutes`), keeps what it has measured, and prints a plain table. It needs torch 2.11, transformers 5.17 or newer and
numpy, and no installation: it runs from the checkout. Exit codes: 0 all is well, 1 something is wrong (named), 2 it
cannot run here, 3 the time was over first.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
REPO = Path(__file__).resolve().parents[1]
if str(REPO / "src") not in sys.path:
    sys.path.insert(0, str(REPO / "src"))

MODELS = "tiny, smollm2-135m, llama-1b, llama-3b, llama-8b"
LONGEST = 9.0  # minutes
# What is measured unless the command says otherwise; the small ones are for rehearsals.
CASES = {"cuda": "ragged-200/350/350,1000/300/300,4096/256/256", "cpu": "ragged-12/8/9,20/6/6"}
CASE = {"cuda": "200/350/350", "cpu": "12/8/9"}
TOKENS = {"cuda": "2048,4096,8192,16384,32768", "cpu": "64,128"}
CEILING_SIZE = {"cuda": 8192, "cpu": 256}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    common.add_argument("--minutes", type=float, default=8.0, help=f"stop by then; at most {LONGEST:g}")
    common.add_argument("--output", help="folder for the JSON file; default benchmarks/results/<GPU's name>")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=help)

    one = command("parity", "losses and gradients against the plain padded reference")
    one.add_argument("--model", default="full", choices=("full", "tiny"), help="size of the models that are compared")
    one.add_argument("--only", help="kernels, and architectures by the names that the table shows; comma-separated")

    one = command("ladder", "a training step, rung by rung")
    add_model(one, "llama-1b")
    one.add_argument("--compute", choices=("bf16", "fp32"), default="bf16")
    one.add_argument("--rungs", default="all", help="padded, packed, shared, head, lean, compiled; or all")
    one.add_argument("--cases", help=f"prompt/chosen/rejected tokens; default {CASES['cuda']}")
    one.add_argument("--lengths", help='JSON file of token counts: {"name": [[prompt, chosen, rejected], ...]}')
    one.add_argument("--pairs", type=positive, default=4, help="pairs in a micro-batch")
    one.add_argument("--micro-batches", type=positive, default=3, help="different ones of a case, in turn")
    one.add_argument("--rounds", type=positive, default=12, help="at most; fewer when the time is over")

    one = command("memory", "peak memory of a training step")
    add_model(one, "llama-8b")
    one.add_argument("--case", help=f"what the pairs are like; default {CASE['cuda']}")
    one.add_argument("--tokens", help=f"packed tokens of the micro-batches; default {TOKENS['cuda']}")
    one.add_argument("--modes", help="comma-separated parts of the modes' names; default all")

    one = command("head", "the log-prob head")
    one.add_argument("--model", default="llama-8b", help=f"whose head: {MODELS}")
    one.add_argument("--rows", type=positive, default=8192)
    one.add_argument("--chunks", default="default,512,1024,2048,4096", help="rows of a chunk; default = the package's")
    one.add_argument("--repeats", type=positive, default=10)

    one = command("attention", "packed attention and its rivals")
    one.add_argument("--model", default="llama-8b", help=f"whose heads: {MODELS}")
    one.add_argument("--softcap", type=float, help="soft-cap of the scores, as Gemma-2's 50")
    one.add_argument("--cases", help="as for ladder")
    one.add_argument("--lengths", help="as for ladder")
    one.add_argument("--pairs", type=positive, default=4)
    one.add_argument("--repeats", type=positive, default=20)
    return parser


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """The options that say what is trained."""
    parser.add_argument("--model", default=default, help=f"a shape with random weights: {MODELS}")
    parser.add_argument("--weights", choices=("auto", "fp32", "bf16"), default="auto", help="auto: fp32 if they fit")
    parser.add_argument(
        "--optimizer",
        choices=("auto", "adamw", "adamw_bf16", "none"),
        default="auto",
        help="auto: adamw on fp32 weights, adamw_bf16 on bf16 ones, none (no update) where that is too big",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def whole_numbers(name: str, text: str, *, word: str | None = None) -> list[Any]:
    """Comma-separated numbers of at least 1; `word` stands for None."""
    found: list[int | None] = []
    for part in (part.strip() for part in text.split(",")):
        if word is not None and part == word:
            found.append(None)
        elif part.isdigit() and int(part) > 0:
            found.append(int(part))
        else:
            also = f", or {word}" if word else ""
            raise ValueError(f"{name}: {part!r} must be a whole number of at least 1{also}")
    return found


def main(arguments: Sequence[str] | None = None, *, began: float | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(arguments)
    try:
        return run(args, arguments, began)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, arguments: Sequence[str], began: float | None) -> int:
    """Pick the device, open the report, call the command."""
    if not 0 < args.minutes <= LONGEST:
        raise ValueError(f"minutes: {args.minutes:g} must be above 0 and at most {LONGEST:g}")
    if args.command == "parity":  # read when CUDA starts: with it matrix products give the same bits again
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gpu.device import Deadline, folder_name, pick_meter
    from gpu.report import Report, shown_command

    meter = pick_meter(args.device)
    deadline = Deadline(args.minutes, began=began)
    gpu = meter.describe()["gpu"]
    default = REPO / "benchmarks" / "results" / folder_name(gpu) if gpu else Path("runs/gpu-rehearsal")
    folder = Path(args.output) if args.output else default
    work, conditions = COMMANDS[args.command](args, meter)
    parts = (args.command, conditions.get("model"), "softcap" if conditions.get("softcap") else None)
    name = "-".join(filter(None, parts))
    report = Report(name, folder, command=shown_command(arguments), meter=meter, conditions=conditions)
    fine = work(report, meter, deadline)
    return 1 if not fine else 0 if report.results["complete"] else 3


def prepare_parity(args: argparse.Namespace, meter: Any) -> tuple[Any, dict[str, Any]]:
    """Check the names, and say what will be run under which conditions; so do the others below."""
    from gpu.parity import KERNELS, PARAMETER_RATIO, RATIO, architectures, run_parity

    tiny = args.model == "tiny"
    only = [name.strip() for name in args.only.split(",")] if args.only else None
    known = [KERNELS, *architectures(tiny=tiny)]
    for name in only or ():
        if name not in known:
            raise ValueError(f"only: {name!r} must be one of {', '.join(known)}")
    conditions = {"size": args.model, "ratio": RATIO, "parameter ratio": PARAMETER_RATIO}
    return lambda *context: run_parity(*context, tiny=tiny, only=only), conditions


def prepare_ladder(args: argparse.Namespace, meter: Any) -> tuple[Any, dict[str, Any]]:
    """See `prepare_parity`."""
    from gpu.ladder import find_rungs, run_ladder
    from gpu.workload import find_cases

    plan, conditions = plan_of(args, meter)
    if plan.weights == "bf16" and args.compute == "fp32":
        raise ValueError("compute: fp32 needs --weights fp32")
    rungs, cases = find_rungs(args.rungs), find_cases(cases_of(args), args.lengths)
    if not rungs or not cases:
        raise ValueError("rungs, cases: at least one of each is needed")
    conditions |= {"compute": args.compute, "pairs a micro-batch": args.pairs, "micro-batches": args.micro_batches}

    def work(*context: Any) -> bool:
        return run_ladder(
            *context,
            model=args.model,
            plan=plan,
            compute=args.compute,
            rungs=rungs,
            cases=cases,
            pairs=args.pairs,
            micro_batches=args.micro_batches,
            rounds=args.rounds,
            ceiling_size=CEILING_SIZE[args.device],
        )

    return work, conditions


def prepare_memory(args: argparse.Namespace, meter: Any) -> tuple[Any, dict[str, Any]]:
    """See `prepare_parity`."""
    from gpu.memory import MODES, run_memory
    from gpu.workload import find_cases

    plan, conditions = plan_of(args, meter)
    parts = [part.strip() for part in args.modes.split(",")] if args.modes else [""]
    modes = [mode for mode in MODES if any(part in mode.name for part in parts)]
    cases = find_cases(args.case or CASE[args.device], None)
    if not modes or len(cases) != 1:
        raise ValueError(f"modes, case: one case, and modes of {'; '.join(mode.name for mode in MODES)}")
    tokens = sorted(whole_numbers("tokens", args.tokens or TOKENS[args.device]))

    def work(*context: Any) -> bool:
        return run_memory(*context, model=args.model, plan=plan, case=cases[0], tokens=tokens, modes=modes)

    return work, conditions | {"pairs": cases[0].name}


def plan_of(args: argparse.Namespace, meter: Any) -> tuple[Any, dict[str, Any]]:
    """The weights, their optimizer, and what to say of them."""
    from gpu.workload import build_config, plan_weights

    from simpo.bench.flops import model_shape

    config = build_config(args.model)
    shape = model_shape(config)
    embeddings = shape.head_weights * (1 if config.tie_word_embeddings else 2)
    parameters = shape.block_weights + embeddings  # norms aside
    plan = plan_weights(parameters, meter.total_bytes(), weights=args.weights, optimizer=args.optimizer)
    updated = {"none": "none: forward and backward only"}.get(plan.optimizer, f"{plan.optimizer} at learning rate 0")
    return plan, {
        "model": args.model,
        "parameters": float(parameters),
        "weights": f"{plan.weights} ({plan.why})",
        "optimizer": updated,
    }


def prepare_head(args: argparse.Namespace, meter: Any) -> tuple[Any, dict[str, Any]]:
    """See `prepare_parity`."""
    from gpu.head import run_head
    from gpu.workload import build_config

    from simpo.core.logprobs import CHUNK_BYTES_CUDA

    config = build_config(args.model)
    chunks = whole_numbers("chunks", args.chunks, word="default")

    def work(*context: Any) -> bool:
        return run_head(
            *context,
            num_rows=args.rows,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            chunks=chunks,
            repeats=args.repeats,
        )

    shape = f"{args.rows} rows, {config.hidden_size} -> {config.vocab_size}"
    return work, {"model": args.model, "head": shape, "CHUNK_BYTES_CUDA": CHUNK_BYTES_CUDA}


def prepare_attention(args: argparse.Namespace, meter: Any) -> tuple[Any, dict[str, Any]]:
    """See `prepare_parity`."""
    from gpu.attention import run_attention
    from gpu.workload import build_config, find_cases

    config = build_config(args.model)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cases = find_cases(cases_of(args), args.lengths)

    def work(*context: Any) -> bool:
        return run_attention(
            *context,
            cases=cases,
            pairs=args.pairs,
            heads=heads,
            softcap=args.softcap,
            repeats=args.repeats,
        )

    return work, {
        "model": args.model,
        "heads": "{}/{}x{}".format(*heads),
        "softcap": args.softcap,
        "dtype": "bf16",
        "pairs a micro-batch": args.pairs,
    }


def cases_of(args: argparse.Namespace) -> str:
    """The cases of `--cases`, or the usual ones; none of these where there is a file of lengths."""
    return args.cases or ("" if args.lengths else CASES[args.device])


COMMANDS = {
    "parity": prepare_parity,
    "ladder": prepare_ladder,
    "memory": prepare_memory,
    "head": prepare_head,
    "attention": prepare_attention,
}

if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
