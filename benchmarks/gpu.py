"""What this project wants measured where a CUDA GPU is at hand, in one command.

    python benchmarks/gpu.py                     # all of PARTS below, in 12 minutes at most
    python benchmarks/gpu.py --minutes 9 --output DIR --wheels DIR
    python benchmarks/gpu.py --parts ladder-8b,memory
    python benchmarks/gpu.py table DIR           # table.md again, from the JSON files of a folder
    python benchmarks/gpu.py ladder --model llama-1b --cases 1000/300/300    # one command alone; see PARTS, --help

Every part is a process of its own and writes one JSON file as it goes; table.md is made of these files after each. A
rehearsal without a GPU, a minute or two: --device cpu --model tiny. It needs torch 2.11, transformers 5.17 or newer and
numpy, and no installation: it runs from the checkout. Exit codes: 0 all is well, 1 something is wrong (of the whole
plan: parity does not hold, or was not seen to its end), 2 it cannot run here, 3 the time was over first (of the whole
plan: parity holds, another part did not end well), 4 an error.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(REPO / "benchmarks"), str(REPO / "src")) if folder not in sys.path]

from gpu.parts import Part, install_wheels, make_table, run_parts, write_whole  # noqa: E402  needs the path

FULL = "--model llama-8b --weights bf16 --optimizer adamw_bf16"
CHAT = "--cases ragged-200/350/350"
LEAST = "checkpoints,offload,optimizer-offload"
# In this order, since the first decide whether the others mean anything. Together 12 minutes; a process takes 10 to 15
# seconds of its limit to start. What a part leaves of its time the next ones have. Small: words for a rehearsal.
PARTS = (
    #    name   limit s, least s  command                                                       small
    Part("kernels", 55, 20, "parity --only kernels"),  # does varlen_attn run, bottom-right, at every head size?
    Part("parity", 165, 60, "parity --only 'llama 9/3 heads,mistral window,gemma2 soft-caps'", "--only 'llama tied'"),
    Part("attention", 80, 40, f"attention --model llama-8b {CHAT} --pairs 4,20", "--pairs 2,4 --repeats 2"),
    Part("ladder-1b", 135, 60, f"ladder --model llama-1b {CHAT} --pairs 20", "--pairs 4 --rounds 4"),
    Part("ladder-8b", 135, 60, f"ladder {FULL} {CHAT} --pairs 8", "--pairs 4 --rounds 4"),
    Part(
        "memory",
        80,
        40,
        f"memory {FULL} --tokens 4096,16384 --modes checkpoints,offload,optimizer-offload",
        "--tokens 64,128",
    ),
    Part("train", 70, 30, "train"),  # simpo train itself: resumed bit by bit, and with each option
)

MODELS = "tiny, smollm2-135m, llama-1b, llama-3b, llama-8b"
LONGEST = 9.0  # minutes of one command
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
    common.add_argument("--name", help="of the JSON file; default the command's, with the model's")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("tiny",), help="for a rehearsal: tiny models everywhere")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything")
    parser.add_argument("--output", help="folder for the results; default benchmarks/results/<GPU's name>")
    parser.add_argument("--parts", help="some of " + ", ".join(part.name for part in PARTS))
    parser.add_argument("--wheels", help="folder of wheels to use instead of what is installed")
    commands = parser.add_subparsers(dest="command", metavar="command")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=help)

    one = command("parity", "losses and gradients against the plain padded reference")
    one.add_argument("--model", default="full", choices=("full", "tiny"), help="size of the models that are compared")
    one.add_argument("--only", help="kernels, and architectures by the names that the table shows; comma-separated")

    one = command("ladder", "a training step, rung by rung, and a profile of the fastest")
    add_model(one, "llama-1b")
    one.add_argument("--compute", choices=("bf16", "fp32"), default="bf16")
    one.add_argument(
        "--rungs", default="all", help="padded, packed, shared, head, low-memory, compiled, checkpoints; or all"
    )
    one.add_argument("--cases", help=f"prompt/chosen/rejected tokens; default {CASES['cuda']}")
    one.add_argument("--lengths", help='JSON file of token counts: {"name": [[prompt, chosen, rejected], ...]}')
    one.add_argument(
        "--pairs", type=positive, default=4, help="pairs of a step; more micro-batches where they do not fit"
    )
    one.add_argument("--steps", type=positive, default=3, help="different ones of a case, in turn")
    one.add_argument("--rounds", type=positive, default=12, help="at most; fewer when the time is over")

    one = command("memory", "peak memory of a training step")
    add_model(one, "llama-8b")
    one.add_argument("--case", help=f"what the pairs are like; default {CASE['cuda']}")
    one.add_argument("--tokens", help=f"packed tokens of the micro-batches; default {TOKENS['cuda']}")
    one.add_argument(
        "--modes", help="packed, checkpoints, padded, padded-checkpoints, offload, optimizer-offload; default all"
    )

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
    one.add_argument("--pairs", default="4", help="of a micro-batch; several numbers, comma-separated, in turn")
    one.add_argument("--repeats", type=positive, default=20)

    one = command("train", "simpo train on a small random model: resumed, and with each option")
    one.add_argument("--model", default="full", choices=("full", "tiny"))

    one = commands.add_parser("table", help="table.md again, from the JSON files of a folder")
    one.add_argument("folder")
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
    """Run everything, or one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(arguments)
    try:
        if args.command is None:
            return run_all(args, began)
        if args.command == "table":
            write_whole(Path(args.folder) / "table.md", make_table(Path(args.folder), [part.name for part in PARTS]))
            return 0
        return run(args, arguments, began)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 4


def run_all(args: argparse.Namespace, began: float | None) -> int:
    """The whole plan, or the parts that were asked for."""
    names = [name.strip() for name in args.parts.split(",")] if args.parts else [part.name for part in PARTS]
    for name in names:
        if name not in {part.name for part in PARTS}:
            raise ValueError(f"parts: {name!r} must be one of {', '.join(part.name for part in PARTS)}")
    if not 1 <= args.minutes <= 60:
        raise ValueError(f"minutes: {args.minutes:g} must be from 1 to 60")
    environment, remarks = {"PYTHONUNBUFFERED": "1"}, []
    if args.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    if args.wheels:
        try:
            carried, remark = install_wheels(Path(args.wheels))
            environment |= carried
        except ValueError as error:  # what is installed can still be measured
            remark = f"{error}; going on with what is installed"
            print(remark, flush=True)
        remarks.append(remark)

    folder = Path(args.output) if args.output else results_folder(args.device)
    parts = [part for part in PARTS if part.name in names]
    return run_parts(
        parts,
        folder,
        minutes=args.minutes,
        command_of=lambda part, seconds: command_of(args, folder, part, seconds),
        environment=environment,
        remarks=remarks,
        say=lambda line: print(line, flush=True),
        began=began,
    )


def command_of(args: argparse.Namespace, folder: Path, part: Part, seconds: float) -> list[str]:
    """The command of a part that has so much time."""
    words = shlex.split(part.words)
    words += ["--name", part.name, "--output", str(folder), "--minutes", f"{min(LONGEST, seconds / 60):.3f}"]
    if args.device == "cpu":
        words += [*shlex.split(part.small), "--device", "cpu"]
        words += ["--cases", CASE["cpu"]] if "--cases" in words else []
    words += ["--model", args.model] if args.model else []
    return [sys.executable, str(Path(__file__).resolve()), *words]


def results_folder(device: str) -> Path:
    """Where results go unless the command says otherwise; asks the driver, since CUDA belongs to the parts."""
    if device == "cpu":
        return Path("runs/gpu-rehearsal")
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    return REPO / "benchmarks" / "results" / folder_name(said.split("\n")[0] or "cuda")


def run(args: argparse.Namespace, arguments: Sequence[str], began: float | None) -> int:
    """Pick the device, open the report, call the command."""
    if not 0 < args.minutes <= LONGEST:
        raise ValueError(f"minutes: {args.minutes:g} must be above 0 and at most {LONGEST:g}")
    if args.command in ("parity", "train"):  # read when CUDA starts: with it matrix products give the same bits again
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gpu.device import Deadline, pick_meter
    from gpu.report import Report, shown_command

    import simpo.model.compile

    if args.device == "cpu":  # a rehearsal: what the compiler reads is the same, and it writes no code
        simpo.model.compile.BACKEND = "aot_eager"
    meter = pick_meter(args.device)
    deadline = Deadline(args.minutes, began=began)
    gpu = meter.describe()["gpu"]
    default = REPO / "benchmarks" / "results" / folder_name(gpu) if gpu else results_folder("cpu")
    folder = Path(args.output) if args.output else default
    work, conditions, form = COMMANDS[args.command](args, meter)
    parts = (args.command, conditions.get("model"), "softcap" if conditions.get("softcap") else None)
    name = args.name or "-".join(filter(None, parts))
    report = Report(name, folder, **form, command=shown_command(arguments), meter=meter, conditions=conditions)
    fine = work(report, meter, deadline)
    return 1 if not fine else 0 if report.results["complete"] else 3


def folder_name(gpu: str) -> str:
    """A GPU's name as that of a folder."""
    return "".join(c if c.isalnum() else "-" for c in gpu.lower()).strip("-")


Prepared = tuple[Any, dict[str, Any], dict[str, Any]]


def prepare_parity(args: argparse.Namespace, meter: Any) -> Prepared:
    """Check the options; what will be run, under which conditions, and the table's form. So do the others below."""
    from gpu.parity import COLUMNS, KERNELS, PARAMETER_RATIO, RATIO, architectures, run_parity

    tiny = args.model == "tiny"
    only = [name.strip() for name in args.only.split(",")] if args.only else None
    known = [KERNELS, *architectures(tiny=tiny)]
    for name in only or ():
        if name not in known:
            raise ValueError(f"only: {name!r} must be one of {', '.join(known)}")
    conditions = {"size": args.model, "ratio": RATIO, "parameter ratio": PARAMETER_RATIO}
    form = {"columns": COLUMNS, "shown": lambda row: row["ok"] is not True or "twice" in row["what"]}
    return lambda *context: run_parity(*context, tiny=tiny, only=only), conditions, form


def prepare_ladder(args: argparse.Namespace, meter: Any) -> Prepared:
    """See `prepare_parity`."""
    from gpu.ladder import COLUMNS, find_rungs, run_ladder
    from gpu.workload import find_cases

    plan, conditions = plan_of(args, meter)
    if plan.weights == "bf16" and args.compute == "fp32":
        raise ValueError("compute: fp32 needs --weights fp32")
    rungs, cases = find_rungs(args.rungs), find_cases(cases_of(args), args.lengths)
    if not rungs or not cases:
        raise ValueError("rungs, cases: at least one of each is needed")
    conditions |= {"compute": args.compute, "pairs a step": args.pairs, "steps": args.steps}

    def work(*context: Any) -> bool:
        return run_ladder(
            *context,
            model=args.model,
            plan=plan,
            compute=args.compute,
            rungs=rungs,
            cases=cases,
            pairs=args.pairs,
            steps=args.steps,
            rounds=args.rounds,
            ceiling_size=CEILING_SIZE[args.device],
        )

    return work, conditions, {"columns": COLUMNS}


def prepare_memory(args: argparse.Namespace, meter: Any) -> Prepared:
    """See `prepare_parity`."""
    from gpu.memory import COLUMNS, MODES, run_memory
    from gpu.workload import find_cases

    plan, conditions = plan_of(args, meter)
    possible = [mode for mode in MODES if plan.optimizer == "adamw_bf16" or not mode.optimizer_offload]
    wanted = [name.strip() for name in args.modes.split(",")] if args.modes else [mode.name for mode in possible]
    modes = [mode for mode in possible if mode.name in wanted]
    cases = find_cases(args.case or CASE[args.device], None)
    if len(modes) != len(wanted) or len(cases) != 1:
        raise ValueError(f"modes, case: one case, and modes of {', '.join(mode.name for mode in possible)}")
    tokens = sorted(whole_numbers("tokens", args.tokens or TOKENS[args.device]))

    def work(*context: Any) -> bool:
        return run_memory(*context, model=args.model, plan=plan, case=cases[0], tokens=tokens, modes=modes)

    return work, conditions | {"pairs": cases[0].name}, {"columns": COLUMNS}


def plan_of(args: argparse.Namespace, meter: Any) -> tuple[Any, dict[str, Any]]:
    """The weights, their optimizer, and what to say of them."""
    from gpu.workload import build_config, plan_weights
    from peers.flops import model_shape

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


def prepare_head(args: argparse.Namespace, meter: Any) -> Prepared:
    """See `prepare_parity`."""
    from gpu.head import COLUMNS, run_head
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
    return work, {"model": args.model, "head": shape, "CHUNK_BYTES_CUDA": CHUNK_BYTES_CUDA}, {"columns": COLUMNS}


def prepare_attention(args: argparse.Namespace, meter: Any) -> Prepared:
    """See `prepare_parity`."""
    from gpu.attention import COLUMNS, run_attention
    from gpu.workload import build_config, find_cases

    config = build_config(args.model)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cases, pairs = find_cases(cases_of(args), args.lengths), whole_numbers("pairs", args.pairs)

    def work(*context: Any) -> bool:
        return run_attention(
            *context,
            cases=cases,
            pairs=pairs,
            heads=heads,
            softcap=args.softcap,
            repeats=args.repeats,
        )

    conditions = {"model": args.model, "heads": "{}/{}x{}".format(*heads), "softcap": args.softcap, "dtype": "bf16"}
    return work, conditions, {"columns": COLUMNS}


def prepare_train(args: argparse.Namespace, meter: Any) -> Prepared:
    """See `prepare_parity`."""
    from gpu.train import COLUMNS, run_train

    return lambda *context: run_train(*context, tiny=args.model == "tiny"), {"size": args.model}, {"columns": COLUMNS}


def cases_of(args: argparse.Namespace) -> str:
    """The cases of `--cases`, or the usual ones; none of these where there is a file of lengths."""
    return args.cases or ("" if args.lengths else CASES[args.device])


COMMANDS = {
    "parity": prepare_parity,
    "ladder": prepare_ladder,
    "memory": prepare_memory,
    "head": prepare_head,
    "attention": prepare_attention,
    "train": prepare_train,
}

if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
