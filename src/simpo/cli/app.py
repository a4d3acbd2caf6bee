"""The command line itself: how a command reads its recipe, what its errors look like, and with what it exits.

What the user can put right (a ValueError, a file that cannot be read or written) is printed in one line, without a
traceback (SIMPO_TRACEBACK=1 shows it), and the command exits with 2. An interrupted run exits with 130; one that its
guard stopped, with 4; one whose loss is not finite, or that runs out of memory, with 1; a command that had to leave
something out, with 3.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from simpo.errors import LEFT_OUT, explain, is_disk_full

if TYPE_CHECKING:
    from simpo.recipe import Recipe


class _OneLineErrors(TyperGroup):
    """What the user can put right -> one line and exit 2; Ctrl-C -> exit 130. --key=~/x is in the home folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        home = os.path.expanduser("~")  # a shell looks at the beginning of a word alone
        at_home = re.compile(r"^(--[\w.-]+=)?~(?=/|$)")
        return super().parse_args(ctx, [at_home.sub(lambda found: (found[1] or "") + home, word) for word in args])

    def invoke(self, ctx: typer.Context) -> Any:
        if "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
            ctx.color = False
        try:
            return super().invoke(ctx)
        except Exception as error:
            is_users = isinstance(error, ValueError | OSError | NotImplementedError) or is_disk_full(error)
            memory = None if is_users else _wanted_memory(error)
            if not (is_users or memory) or os.environ.get("SIMPO_TRACEBACK"):
                raise
            say_once(f"error: {memory or explain(error)}", color="red")
            raise typer.Exit(1 if memory else 2) from None
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(130) from None


def _wanted_memory(error: Exception) -> str | None:
    """Of an error that says so, that memory ran out."""
    if not isinstance(error, RuntimeError) or "torch" not in sys.modules:
        return None
    from simpo.run.stopping import OutOfMemory, missing_memory

    if isinstance(error, OutOfMemory):
        return str(error)
    missing = missing_memory(error)
    return None if missing is None else f"out of memory ({missing}); SIMPO_TRACEBACK=1 shows where"


class _Command(TyperCommand):
    """Completes the keys of a recipe, after `--`, where it takes them. --max_pairs is --max-pairs, as with keys."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for option in self.params for name in option.opts}
        for i, word in enumerate(args):
            name, equals, value = word.partition("=")
            if name not in own and (dashed := name.replace("_", "-")) in own:
                args[i] = dashed + equals + value
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        found = super().shell_complete(ctx, incomplete)
        if self.context_settings.get("allow_extra_args") and incomplete.startswith("--"):
            from simpo.recipe import KEYS, STAGE_KEYS

            names = [*KEYS, *(key.partition(".")[2] for key in STAGE_KEYS if key.startswith(f"{self.name}."))]
            begun = incomplete[2:].replace("-", "_")
            # As click's CompletionItem, which typer keeps in another place in each of its versions.
            found += [SimpleNamespace(value=f"--{n}", type="plain", help=None) for n in names if n.startswith(begun)]
        return found


class _App(typer.Typer):
    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, **{"cls": _Command, **options})


app = _App(
    name="simpo",
    cls=_OneLineErrors,
    help="Align language models with preference pairs by SimPO.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout; what else is said goes to stderr.")
]


def output_option(text: str, *, metavar: str = "FILE", is_folder: bool = False) -> Any:
    """The option --output: where nothing can be written is said before the work."""

    def check(context: typer.Context, given: str | None) -> str | None:
        if given is not None and not context.resilient_parsing:
            from simpo.data.files import check_writable

            check_writable(given, "--output", is_folder=is_folder)
        return given

    return typer.Option("--output", metavar=metavar, callback=check, help=text)


TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file; see `simpo keys` for what it may hold.")]
RecipeOrData = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE_OR_DATA", help="YAML file, or pairs (file, folder, hub name) with --model: the rest is chosen."
    ),
]


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


def load(
    recipe: str,
    overrides: list[str],
    *,
    processes: int | None = None,
    stage: str = "",
    writes: bool = False,
    trains_here: bool = False,
) -> Recipe:
    """The recipe with its overrides; keys of `stage` may be given without its name in front.

    Args:
        writes: the command will write into output_dir: that it cannot is said at once.
        trains_here: the command trains, in this process or one like it, unless a launcher starts several.
    """
    from simpo.recipe import load_recipe

    if recipe.startswith("-"):
        raise ValueError(f"the recipe comes before its overrides: simpo COMMAND RECIPE {recipe} ...")
    overrides = name_model(name_stage(overrides, stage) if stage else overrides)
    values: Any = recipe
    if not stage and _is_data(recipe, overrides):
        from simpo.starting import choose_recipe

        is_launched = "WORLD_SIZE" in os.environ or any("launcher" in word for word in overrides)
        gpus = 1 if trains_here and not is_launched else processes
        chosen = choose_recipe(recipe, overrides, recipe_name=recipe, gpus=gpus)
        say_chosen(chosen.facts)
        values = chosen.values
    resolved = load_recipe(values, overrides, processes=processes)
    if writes and resolved.output_dir is not None:
        from simpo.data.files import check_writable

        check_writable(resolved.output_dir, "output_dir", is_folder=True)
    return resolved


def name_stage(overrides: list[str], stage: str) -> list[str]:
    """Overrides with the stage's name in front of its keys, but for those that the recipe itself has too."""
    from simpo.recipe import KEYS, STAGE_KEYS

    own = {f"--{key.partition('.')[2]}" for key in STAGE_KEYS if key.startswith(f"{stage}.")}
    own -= {f"--{key}" for key in KEYS if key != stage}
    named = [
        f"--{stage}.{word[2:]}" if word.partition("=")[0].replace("-", "_").replace("__", "--", 1) in own else word
        for word in overrides
    ]
    if stage == "generate":  # whose own seed would win
        for word, value in zip(overrides, [*overrides[1:], ""], strict=False):
            if word.partition("=")[0] == "--seed":
                named += [f"--generate.{word[2:]}", *[value] * ("=" not in word)]
    return named


def name_model(words: list[str]) -> list[str]:
    """Words of a command line, --model by the name of its key."""
    long = "--model_name_or_path"
    return [long + word[7:] if word == "--model" or word.startswith("--model=") else word for word in words]


def _is_data(name: str, words: list[str]) -> bool:
    """Whether what stands where a recipe may is pairs."""
    path = Path(name)
    if path.suffix.lower() in (".yaml", ".yml"):
        return False
    names_model = any(word.startswith("--model_name_or_path") for word in words)
    looks_so = path.is_dir() or bool({".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz"} & set(path.suffixes))
    if looks_so and path.exists() and not names_model:
        raise ValueError(f"{name} is not a recipe (.yaml); if it holds pairs, say with --model which model to train")
    return names_model and (looks_so or path.suffix == ".json" or not path.exists())


def say_chosen(facts: Mapping[str, Any]) -> None:
    """What was looked at to choose a recipe, on stderr, once."""
    if os.environ.get("RANK", "0") == "0":
        from rich.console import Console

        from simpo.display import Display

        Display(console=Console(stderr=True, highlight=False, soft_wrap=True)).table("chosen for", facts)


def print_json(content: Any) -> None:
    """What `--json` asks for."""
    import json

    typer.echo(json.dumps(content, indent=1, default=str))


@contextlib.contextmanager
def stdout_for_json(wanted: bool) -> Iterator[None]:
    """Inside, where `--json` is wanted, all that is printed goes to stderr, that of child processes too."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(ours, 1)
        os.close(ours)


def exit_by_account(account: Path, *, examples: bool = True, as_json: bool = False) -> None:
    """Print a finished command's account, `as_json`; say what it left out, with `examples` or without, and exit 3."""
    from simpo.onpolicy.journal import read_about

    about = read_about(account)
    if as_json:
        print_json(about)
    left_out = about.get("left_out", {})
    if left_out:
        counts = ", ".join(f"{entry['count']} {reason}" for reason, entry in left_out.items())
        for reason, entry in left_out.items() if examples else ():
            example = entry["examples"][0]
            _complain(f"{reason}, as {example['row_id']}: {example['detail']}")
        _complain(f"left out: {counts}; which and why is in {account}")
        raise typer.Exit(LEFT_OUT)


@contextlib.contextmanager
def leaving_when_interrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM or a guard in work that goes on from there -> its one line and exit code; a loss that is not
    finite -> exit 1, as for want of memory."""
    from simpo.run.stopping import Interrupted, NonFiniteError

    try:
        yield
    except Interrupted as stopped:
        say_once(str(stopped), color="yellow")
        raise typer.Exit(stopped.exit_code) from None
    except NonFiniteError as error:
        say_once(f"error: {error}", color="red")
        raise typer.Exit(1) from None


_FOR_THE_FIRST_S = 10.0


def say_once(line: str, *, color: str) -> None:
    """A line on stderr: of several processes' equal lines the first process's; another process's own with its rank."""
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        from simpo.parallel.mesh import is_said_by_main

        if is_said_by_main(line):
            return
    elif local_rank != "0":
        # The machine's first process most likely fails alike. It says so, and its launcher ends this one; leaving at
        # once would have the launcher end the first before it has said anything.
        time.sleep(_FOR_THE_FIRST_S)
    _complain(line if rank == "0" else f"rank {rank}: {line}", color)


def _complain(line: str, color: str = "yellow") -> None:
    from rich.console import Console

    from simpo.display import say

    say(line, Console(stderr=True), style=color)
