"""Commands that explain and plan, and need neither data nor weights: check, plan, keys, losses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simpo.cli.app import TAKES_OVERRIDES, AsJson, RecipeFile, RecipeOrData, app, load, output_option, print_json
from simpo.display import say

if TYPE_CHECKING:
    from simpo.recipe import Key, Recipe


@app.command(context_settings=TAKES_OVERRIDES)
def check(
    context: typer.Context,
    recipe: RecipeOrData,
    full: Annotated[bool, typer.Option("--full", help="Print every key, as YAML.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Data-parallel processes of the run.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check a recipe and print what it resolves to; needs no model, data, network or torch."""
    resolved = load(recipe, context.args, processes=processes)
    from simpo.recipe.vocabulary import check_vocabulary

    content = _checked(resolved, processes) | {"vocabulary": check_vocabulary(resolved)}
    if as_json:
        print_json(content)
        return
    tell = typer.echo if full else say
    tell(resolved.to_yaml() if full else _key_lines(resolved))
    for line in _effective_lines(resolved, content, processes):
        tell("# " * full + line)


@app.command(context_settings=TAKES_OVERRIDES)
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs of the run. \\[default: one node's]")] = None,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", help="GiB of one GPU.")] = 80,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Machines. \\[default: as the GPUs say]")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of one machine. \\[default: 8]")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Plan for another model: llama-70b and others by name, or a .json or .yaml file."),
    ] = None,
    output: Annotated[str | None, output_option("Write the plan as JSON too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute memory by part, pick a mesh and other sizes, say what is sent; reads no weights. Any key can follow."""
    resolved = load(recipe, context.args, processes=1)
    from simpo.data.files import check_own, write_whole
    from simpo.plan.report import describe_plan, plan_as_dict
    from simpo.plan.search import Machines, plan_recipe

    machines = Machines.of(gpus=gpus, nodes=nodes, gpus_per_node=gpus_per_node, gpu_gib=gpu_memory)
    found = plan_recipe(resolved, machines, shape=shape)
    # Again, for the number of ranks that share a global_batch_size is known now.
    shared = load(recipe, context.args, processes=found.mesh.data * resolved.cp * resolved.tp)
    if shared != resolved:
        found = plan_recipe(shared, machines, shape=shape)
    if output is not None:
        check_own(output, "machines", "choices", "memory")
        write_whole(output, json.dumps(plan_as_dict(found), indent=2) + "\n")
    if as_json:
        print_json(plan_as_dict(found))
    else:
        say(describe_plan(found, shared, recipe_name=recipe))


@app.command(context_settings={"ignore_unknown_options": True})
def keys(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One key, by any of its names; or a command's, as generate.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain the keys of a recipe: meaning, allowed values, default."""
    from simpo.recipe import KEYS, STAGE_KEYS

    if name is not None:
        name = name.removeprefix("--").replace("-", "_")
    if as_json:
        print_json(_keys_as_dicts(name))
        return
    if name is not None:
        say(_explain_key(name))
        return
    section = None
    for doc in (*KEYS.values(), *STAGE_KEYS.values()):
        if doc.section != section:
            say(f"\n{doc.section.upper()}")
            section = doc.section
        say(_key_text(doc))


@app.command()
def losses(as_json: AsJson = False) -> None:
    """List the losses: equation, defaults, source."""
    from simpo.core.losses import LOSSES

    if as_json:
        shown = ("name", "equation", "defaults", "sft_weight", "needs_reference", "source")
        print_json([{name: getattr(loss, name) for name in shown} for loss in LOSSES.values()])
        return
    say("l: summed log-prob of a response; m = l/length; p = exp(m); w chosen, r rejected; M = m_w - m_r;")
    say("z = beta (M - gamma_beta_ratio); D: l_w - l_r less the same under the reference; sft = -m_w\n")
    for name, loss in LOSSES.items():
        shown = ", ".join(f"{key} {value}" for key, value in {**loss.defaults, "sft_weight": loss.sft_weight}.items())
        needs = "; needs a reference model" if loss.needs_reference else ""
        say(f"{name:<10} {loss.equation}\n{'':<10} {shown}\n{'':<10} {loss.source}{needs}\n")
    say(
        f"{'module:function':<10}\n{'':<10} a loss of your own; see `simpo keys loss_type` and `simpo keys loss_kwargs`"
    )


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


def _data_ranks(recipe: Recipe, processes: int) -> int:
    return max(1, processes // (recipe.cp * recipe.tp))  # processes of one cp or tp group compute the same pairs


def _checked(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What `simpo check` says, for programs."""
    from simpo.recipe.checks import far_from_published, in_vain

    pairs = recipe.pairs_per_step(_data_ranks(recipe, processes))
    return {
        "recipe": recipe.to_dict(),
        "loss": {"equation": recipe.loss.equation, "source": recipe.loss.source, "as_set": recipe.describe_loss()},
        "pairs_per_step": pairs,
        "notices": list(recipe.notices),
        "warnings": [*in_vain(recipe), *far_from_published(recipe, pairs)],
        "missing": [name for name in ("dataset_mixer", "output_dir") if not getattr(recipe, name)],
    }


def _effective_lines(recipe: Recipe, content: dict[str, Any], processes: int) -> list[str]:
    """The same for people: loss and batch as they will act, notices, and what is still missing to train."""
    each, accumulation = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    data = _data_ranks(recipe, processes)
    many = f"{data} process{'es' * (data > 1)}" + " that see other pairs" * (data != processes)
    lines = [
        "",
        f"loss: {recipe.describe_loss()}",
        f"      {recipe.loss.equation}  [{recipe.loss.source}]",
        f"batch: {content['pairs_per_step']} pairs an optimizer step "
        f"({each} a micro-batch x {accumulation} accumulated x {many})",
    ]
    lines += [f"notice: {line}" for line in content["notices"]]
    lines += [f"warning: {line}" for line in content["warnings"]]
    missing = ", ".join(content["missing"])
    lines.append(f"to train, still give: {missing}" if missing else "this recipe can be trained")
    return [*lines, *filter(None, [content["vocabulary"]])]


def _key_text(doc: Key) -> str:
    aliases = f"\n      also: {', '.join(doc.aliases)}" if doc.aliases else ""
    return f"  {doc.name}\n      {doc.meaning}\n      allowed: {doc.allowed}\n      default: {doc.default}{aliases}"


def _keys_as_dicts(name: str | None) -> list[dict[str, Any]]:
    """All keys, or those that a name stands for, for programs."""
    from simpo.recipe import KEYS, STAGE_KEYS
    from simpo.recipe.aliases import ALIASES, INPUT_KEYS
    from simpo.recipe.scorers import SCORERS

    asked, explained = name, "" if name is None else _explain_key(name)  # an unknown one is an error
    if name is not None:
        name = ALIASES[name].target if name in ALIASES else INPUT_KEYS.get(name, (name,))[0]
    shown = ("name", "section", "meaning", "allowed", "default", "aliases", "nullable")
    found = [key for key in (KEYS | STAGE_KEYS).values() if name in (None, key.name, key.section)]
    content = [{part: getattr(key, part) for part in shown} for key in found]
    if name == "score":
        content += [{"name": f"score.{kind}", "meaning": _scorer_text(kind)} for kind in SCORERS]
    return content or [{"name": asked, "meaning": explained}]


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
