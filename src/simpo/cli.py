"""The `simpo` command. Imports nothing heavy until the arguments are parsed: torch loads only where it computes.

What the user can put right (a ValueError, a file that cannot be read or written) is printed in one line, without a
traceback (SIMPO_TRACEBACK=1 shows it), and the command exits with 2. An interrupted run exits with 130; one whose loss
is not finite, or that runs out of memory, with 1; a command that had to leave something out, with 3.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from simpo.recipe import Key, Recipe


class _OneLineErrors(TyperGroup):
    """What the user can put right -> one line and exit 2; Ctrl-C -> exit 130."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer ends quietly when the reader of a pipe has gone
        except (ValueError, OSError, NotImplementedError) as error:
            if os.environ.get("SIMPO_TRACEBACK"):
                raise
            _say_once(f"error: {error}", color="red")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.secho("interrupted", fg="yellow", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="simpo",
    cls=_OneLineErrors,
    help="Align language models with preference pairs by SimPO.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file; see `simpo keys` for what it may hold.")]


def main() -> None:
    """Entry point of the `simpo` script."""
    app(prog_name="simpo")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"simpo {version('simpo')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=_TAKES_OVERRIDES)
def train(context: typer.Context, recipe: RecipeFile) -> None:
    """Train. Any key can follow the recipe: --learning_rate 5e-7 --output_dir runs/first"""
    resolved = _load(recipe, context.args)
    resolved.require("dataset_mixer", "output_dir")
    from simpo.hosts.launcher import launched_by_accelerate
    from simpo.parallel.mesh import leave_world
    from simpo.run.stopping import Interrupted, NonFiniteError, OutOfMemory
    from simpo.trainer import Trainer

    try:
        if launched_by_accelerate():
            from simpo.hosts.hf import run_recipe

            run_recipe(resolved)
        else:
            Trainer(resolved).run()
    except Interrupted as stopped:
        _say_once(str(stopped), color="yellow")
        raise typer.Exit(130) from None
    except (NonFiniteError, OutOfMemory) as error:
        _say_once(f"error: {error}", color="red")
        raise typer.Exit(1) from None
    leave_world()


@app.command(context_settings=_TAKES_OVERRIDES)
def check(
    context: typer.Context,
    recipe: RecipeFile,
    full: Annotated[bool, typer.Option("--full", help="Print every key, as YAML.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Data-parallel processes of the run.")] = 1,
) -> None:
    """Check a recipe and print what it resolves to; needs no model, data, network or torch."""
    resolved = _load(recipe, context.args, processes=processes)
    from simpo.recipe.vocabulary import check_vocabulary

    vocabulary = check_vocabulary(resolved)
    typer.echo(resolved.to_yaml() if full else _key_lines(resolved))
    prefix = "# " if full else ""
    for line in [*_effective_lines(resolved, processes), *([vocabulary] if vocabulary else [])]:
        typer.echo(prefix + line)


@app.command(context_settings=_TAKES_OVERRIDES)
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs of the run. [default: one node's]")] = None,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", help="GiB of one GPU.")] = 80,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Machines. [default: as the GPUs say]")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of one machine. [default: 8]")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Plan for another model: llama-70b and others by name, or a .json or .yaml file."),
    ] = None,
    output: Annotated[str | None, typer.Option("--json", metavar="PATH", help="Write the plan as JSON too.")] = None,
) -> None:
    """Compute memory by part, pick a mesh and other sizes, say what is sent; reads no weights. Any key can follow."""
    resolved = _load(recipe, context.args, processes=1)
    from simpo.plan.report import describe_plan, save_plan
    from simpo.plan.search import Machines, plan_recipe

    machines = Machines.of(gpus=gpus, nodes=nodes, gpus_per_node=gpus_per_node, gpu_gib=gpu_memory)
    found = plan_recipe(resolved, machines, shape=shape)
    # Again, for the number of ranks that share a global_batch_size is known now.
    shared = _load(recipe, context.args, processes=found.mesh.data * resolved.cp * resolved.tp)
    if shared != resolved:
        found = plan_recipe(shared, machines, shape=shape)
    typer.echo(describe_plan(found, shared, recipe_name=recipe))
    if output is not None:
        save_plan(found, output)


@app.command(context_settings=_TAKES_OVERRIDES)
def audit(
    context: typer.Context,
    recipe: RecipeFile,
    examples: Annotated[
        int, typer.Option("--examples", min=0, max=10, help="Pairs to print, the trained text marked.")
    ] = 2,
    output: Annotated[str | None, typer.Option("--output", help="File for the ledger, instead of output_dir.")] = None,
) -> None:
    """Read and tokenise the data, and account for every row: kept, cut or dropped, and why."""
    resolved = _load(recipe, context.args)
    resolved.require("dataset_mixer")
    from rich.console import Console

    from simpo.data.prepare import prepare_pairs
    from simpo.model.load import load_tokenizer
    from simpo.run.session import check_token_ids

    prepared = prepare_pairs(resolved, load_tokenizer(resolved))
    check_token_ids(prepared, resolved)
    prepared.ledger.render(Console(), examples=examples)
    path = Path(output) if output else resolved.output_dir and Path(resolved.output_dir, "audit.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = prepared.save_ledger(path)
        typer.echo(f"ledger: {path}" + f"; every dropped row: {listed}" * bool(listed))


@app.command(name="eval", context_settings=_TAKES_OVERRIDES)
def evaluate(
    context: typer.Context,
    recipe_or_data: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_DATA", help="A recipe, or a file or folder of pairs.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Model to evaluate: a folder or a hub name. [default: the recipe's]")
    ] = None,
    compare: Annotated[str | None, typer.Option("--compare", help="A second model, on the same pairs.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="JSON file for the results.")] = None,
    generations: Annotated[int, typer.Option("--generations", min=0, help="Prompts to answer and show.")] = 0,
    max_pairs: Annotated[int | None, typer.Option("--max-pairs", min=1, help="At most this many pairs.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the data to use; test is what is held out.")] = "test",
) -> None:
    """Measure a model on held-out pairs: preference accuracy, margins, length bias. Any key can follow."""
    from simpo.evaluation.command import run_eval_command

    run_eval_command(
        recipe_or_data=recipe_or_data,
        model=model,
        baseline=compare,
        output=output,
        generations=generations,
        max_pairs=max_pairs,
        split=split,
        overrides=context.args,
    )


@app.command(context_settings=_TAKES_OVERRIDES)
def pair(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[str | None, typer.Option("--output", help="Folder. [default: pairs in output_dir]")] = None,
) -> None:
    """Make preference pairs of scored responses. Any key can follow: --method best_sigma --min_gap 0.3"""
    resolved = _load(recipe, context.args, stage="pair")
    from simpo.onpolicy.pair import account_of, run_pair

    _exit_by_account(account_of(run_pair(resolved, output=output)))


@app.command(context_settings=_TAKES_OVERRIDES)
def score(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="[default: scored.jsonl in output_dir]")
    ] = None,
) -> None:
    """Rate responses by rules, functions, models, a judge. Any key can follow: --input FILE --standardize true"""
    resolved = _load(recipe, context.args, stage="score")
    from simpo.onpolicy.score import run_score

    with _leaving_when_interrupted():
        path = run_score(resolved, output=output)
    _exit_by_account(path.with_suffix(".json"))


@app.command(context_settings=_TAKES_OVERRIDES)
def generate(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[
        str | None, typer.Option("--output", help="File to write. [default: responses.jsonl in output_dir]")
    ] = None,
) -> None:
    """Sample responses to prompts; given again, it goes on. Keys can follow: --num_samples 8 --temperature 0.7"""
    resolved = _load(recipe, context.args, stage="generate")
    from simpo.onpolicy.generate import run_generate

    with _leaving_when_interrupted():
        path = run_generate(resolved, output=output)
    _exit_by_account(path.with_suffix(".json"))


@app.command(context_settings=_TAKES_OVERRIDES)
def rounds(context: typer.Context, recipe: RecipeFile) -> None:
    """Generate, score, pair, train, evaluate, several times; given again, it goes on. Any key can follow: --rounds 3"""
    resolved = _load(recipe, context.args, stage="rounds")
    from simpo.onpolicy.rounds import StageFailed, run_rounds

    try:
        path = run_rounds(resolved)
    except StageFailed as failed:
        _say_once(f"error: {failed}", color="red")
        raise typer.Exit(failed.code) from None
    except KeyboardInterrupt:
        _say_once("interrupted; the same command goes on from here", color="yellow")
        raise typer.Exit(130) from None
    _exit_by_account(path)


@app.command(context_settings={"ignore_unknown_options": True})
def keys(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One key, by any of its names; or a command's, as generate.")
    ] = None,
) -> None:
    """Explain the keys of a recipe: meaning, allowed values, default."""
    from simpo.recipe import KEYS, STAGE_KEYS

    if name is not None:
        typer.echo(_explain_key(name.removeprefix("--").replace("-", "_")))
        return
    section = None
    for doc in (*KEYS.values(), *STAGE_KEYS.values()):
        if doc.section != section:
            typer.echo(f"\n{doc.section.upper()}")
            section = doc.section
        typer.echo(_key_text(doc))


@app.command()
def losses() -> None:
    """List the losses: equation, defaults, source."""
    from simpo.core.losses import LOSSES

    typer.echo("l: summed log-prob of a response; m = l/length; p = exp(m); w chosen, r rejected; M = m_w - m_r;")
    typer.echo("z = beta (M - gamma_beta_ratio); D: l_w - l_r less the same under the reference; sft = -m_w\n")
    for name, loss in LOSSES.items():
        shown = ", ".join(f"{key} {value}" for key, value in {**loss.defaults, "sft_weight": loss.sft_weight}.items())
        needs = "; needs a reference model" if loss.needs_reference else ""
        typer.echo(f"{name:<10} {loss.equation}\n{'':<10} {shown}\n{'':<10} {loss.source}{needs}\n")
    typer.echo(
        f"{'module:function':<10}\n{'':<10} a loss of your own; see `simpo keys loss_type` and `simpo keys loss_kwargs`"
    )


def _load(recipe: str, overrides: list[str], *, processes: int | None = None, stage: str = "") -> Recipe:
    """The recipe with its overrides; keys of `stage` may be given without its name in front."""
    from simpo.recipe import KEYS, STAGE_KEYS, load_recipe

    if recipe.startswith("-"):
        raise ValueError(f"the recipe comes before its overrides: simpo COMMAND RECIPE {recipe} ...")
    if stage:
        own = {f"--{key.partition('.')[2]}" for key in STAGE_KEYS if key.startswith(f"{stage}.")}
        own -= {f"--{key}" for key in KEYS}
        overrides = [
            f"--{stage}.{word[2:]}" if word.partition("=")[0].replace("-", "_").replace("__", "--", 1) in own else word
            for word in overrides
        ]
    return load_recipe(recipe, overrides, processes=processes)


def _exit_by_account(account: Path) -> None:
    """Exit 3 where the account of a finished command says that something was left out."""
    from simpo.onpolicy.journal import read_about

    left_out = read_about(account).get("left_out", {})
    if left_out:
        counts = ", ".join(f"{entry['count']} {reason}" for reason, entry in left_out.items())
        for reason, entry in left_out.items():
            example = entry["examples"][0]
            typer.secho(f"{reason}, as {example['row_id']}: {example['detail']}", fg="yellow", err=True)
        typer.secho(f"left out: {counts}; which and why is in {account}", fg="yellow", err=True)
        raise typer.Exit(3)


@contextlib.contextmanager
def _leaving_when_interrupted() -> Iterator[None]:
    """Ctrl-C or SIGTERM in a command whose file goes on -> its one line, and exit 130; want of memory -> exit 1."""
    from simpo.run.stopping import Interrupted, OutOfMemory

    try:
        yield
    except Interrupted as stopped:
        _say_once(str(stopped), color="yellow")
        raise typer.Exit(130) from None
    except OutOfMemory as error:
        _say_once(f"error: {error}", color="red")
        raise typer.Exit(1) from None


_FOR_THE_FIRST_S = 10.0


def _say_once(line: str, *, color: str) -> None:
    """A line on stderr: of several processes' equal lines the first process's; another process's own with its rank."""
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if _has_met_others():
        from simpo.parallel.mesh import is_said_by_main

        if is_said_by_main(line):
            return
    elif local_rank != "0":
        # The machine's first process most likely fails alike. It says so, and its launcher ends this one; leaving at
        # once would have the launcher end the first before it has said anything.
        time.sleep(_FOR_THE_FIRST_S)
    typer.secho(line if rank == "0" else f"rank {rank}: {line}", fg=color, err=True)


def _has_met_others() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _key_lines(recipe: Recipe) -> str:
    """The keys that matter: the important ones first, then those that differ from their defaults."""
    from simpo.recipe import KEYS, load_recipe

    values, defaults = recipe.to_dict(), load_recipe({"model_name_or_path": "any"}).to_dict()
    shown = [name for name, value in values.items() if KEYS[name].shown and value not in (None, {})]
    shown += [name for name, value in values.items() if not KEYS[name].shown and value != defaults[name]]
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {_plain(values[name])}" for name in shown if name not in recipe.unread_keys)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    text = {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _effective_lines(recipe: Recipe, processes: int) -> list[str]:
    """Loss and batch as they will act, notices, and what is still missing to train."""
    from simpo.recipe.checks import far_from_published

    each, accumulation = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    data = max(1, processes // (recipe.cp * recipe.tp))  # processes of one cp or tp group compute the same pairs
    many = f"{data} process{'es' * (data > 1)}" + " that see other pairs" * (data != processes)
    lines = [
        "",
        f"loss: {recipe.describe_loss()}",
        f"      {recipe.loss.equation}  [{recipe.loss.source}]",
        f"batch: {recipe.pairs_per_step(data)} pairs an optimizer step "
        f"({each} a micro-batch x {accumulation} accumulated x {many})",
    ]
    lines += [f"notice: {notice}" for notice in recipe.notices]
    lines += [f"warning: {line}" for line in far_from_published(recipe, recipe.pairs_per_step(data))]
    missing = [name for name in ("dataset_mixer", "output_dir") if not getattr(recipe, name)]
    lines.append(f"to train, still give: {', '.join(missing)}" if missing else "this recipe can be trained")
    return lines


def _key_text(doc: Key) -> str:
    aliases = f"\n      also: {', '.join(doc.aliases)}" if doc.aliases else ""
    return f"  {doc.name}\n      {doc.meaning}\n      allowed: {doc.allowed}\n      default: {doc.default}{aliases}"


def _explain_key(name: str) -> str:
    from simpo.recipe import KEYS, STAGE_KEYS, STAGES
    from simpo.recipe.aliases import ALIASES, INPUT_KEYS, KNOWN_ELSEWHERE, REFUSED
    from simpo.recipe.load import describe_unknown
    from simpo.recipe.scorers import SCORERS

    if name in STAGES:
        own = [_key_text(key) for key in STAGE_KEYS.values() if key.section == name]
        return "\n".join([*own, *(_scorer_text(kind) for kind in SCORERS if name == "score")])
    if name.partition(".")[0] == "score" and name.rpartition(".")[2] in SCORERS:
        return _scorer_text(name.rpartition(".")[2])
    if name in STAGE_KEYS:
        return _key_text(STAGE_KEYS[name])

    if name in ALIASES:
        target = ALIASES[name].target
        return f"  {name} is another name of {target}\n{_explain_key(target)}"
    if name in INPUT_KEYS:
        target, meaning = INPUT_KEYS[name]
        return f"  {name}\n      {meaning}\n{_key_text(KEYS[target])}"
    if name in KNOWN_ELSEWHERE:
        done = "refused" if name in REFUSED else "accepted, not used here"
        return f"  {name}: {done} ({KNOWN_ELSEWHERE[name]})"
    if name not in KEYS:
        raise ValueError(f"{describe_unknown(name)}; `simpo keys` lists all keys")
    return _key_text(KEYS[name])


def _scorer_text(kind: str) -> str:
    from simpo.recipe.scorers import SCORER_KEYS, SCORERS

    lines = [f"\n  a scorer of kind {kind}\n      {SCORERS[kind].__doc__}", *map(_key_text, SCORER_KEYS[kind])]
    return "\n".join(lines)
