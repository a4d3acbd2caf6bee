"""The commands of this project that are tested for what a hostile machine does to them; one is a few lines."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chaos.harness import Case
from mesh_runs import metrics
from miniature import WORDS, rounds_recipe, sampling_recipe

from simpo.recipe import load_recipe
from simpo.run.saved import NATIVE, TRAINERS, list_checkpoints

COMMANDS: dict[str, Callable[[Path, Path], Case]] = {}
"""Name -> build(folder, model): fills the folder with what a user gives, and says what the command promises."""


def command(build: Callable[[Path, Path], Case]) -> Callable[[Path, Path], Case]:
    COMMANDS[build.__name__.replace("_", " ")] = build
    return build


# --- training --------------------------------------------------------------------------------------------------------


def write_pairs(path: Path, number: int) -> None:
    rng = random.Random(str(path.name))
    rows = [{"prompt": f"{_words(rng)}?", "chosen": f"water {_words(rng)}", "rejected": "stone"} for _ in range(number)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))


def train_recipe(root: Path, model: Path, **keys: Any) -> str:
    """Four steps with two checkpoints, of which one is kept, two evaluations and an answer; its data not prepared."""
    write_pairs(root / "pairs" / "train.jsonl", 10), write_pairs(root / "pairs" / "test.jsonl", 4)
    recipe = {
        **{"model_name_or_path": str(model), "dataset_mixer": {str(root / "pairs"): 1.0}, "bf16": False},
        **{"output_dir": str(root / "run"), "cache_dir": str(root / "cache"), "num_threads": 1},
        **{"per_device_train_batch_size": 2, "learning_rate": 2e-3, "max_length": 96, "max_prompt_length": 64},
        **{"max_steps": 4, "save_steps": 2, "save_total_limit": 1, "eval_steps": 2, "save_dtype": "bfloat16"},
        **{"max_tokens_per_micro_batch": 4096, "resume_from_checkpoint": True, "num_eval_generations": 1},
        **{"eval_generation_max_new_tokens": 3, "preprocessing_num_workers": 1, **keys},
    }
    load_recipe(recipe, processes=1).save(root / "recipe.yaml")
    return "recipe.yaml"


def run_directory(root: Path) -> dict[str, Any]:
    """A finished run: weights, metrics, logs, the state that its last checkpoint holds."""
    run = root / "run"
    states = {}
    for kind in (NATIVE, TRAINERS):
        for each in list_checkpoints(run / "checkpoints", kind):
            state = json.loads((each.folder / kind.state_file).read_text())
            states[each.folder.name] = state["digest"] if kind is NATIVE else None  # the Trainer's files have times
    logs = ("generations.jsonl", "eval_pairs.jsonl", "audit.json", "recipe.yaml", "guard.jsonl")
    lines = [{k: v for k, v in line.items() if not k.endswith(("runtime", "per_second"))} for line in metrics(run)]
    return {"metrics": lines, "checkpoints": states, **files(run, *logs), **model_in(run / "model")}


def files(folder: Path, *patterns: str) -> dict[str, bytes]:
    """The bytes of those that are there, but for what killed processes left half written."""
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
    found = (path for path in found if not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def model_in(folder: Path) -> dict[str, bytes]:
    """All but its card, which has times."""
    found = files(folder, "*")
    found.pop("README.md")
    assert any(name.endswith(".safetensors") for name in found), "no weights"
    return found


def newest_checkpoint(root: Path) -> int:
    """How far a run has come that is resumed."""
    found = [each.step for kind in (NATIVE, TRAINERS) for each in list_checkpoints(root / "run" / "checkpoints", kind)]
    return max(found, default=0)


INPUTS = ("recipe.yaml", "pairs/*.jsonl", "prompts.jsonl")
"""What the user gave."""


@command
def train(root: Path, model: Path) -> Case:
    return Case(["train", train_recipe(root, model)], run_directory, given=INPUTS, progress=newest_checkpoint)


@command
def train_from_a_named_checkpoint(root: Path, model: Path) -> Case:
    """Of a finished run."""
    recipe = train_recipe(root, model, save_total_limit=None)
    words = ["train", recipe, "--resume_from_checkpoint", "run/checkpoints/step-2"]
    return Case(words, run_directory, given=INPUTS, first=[["train", recipe]])


@command
def train_async(root: Path, model: Path) -> Case:
    recipe = train_recipe(root, model, async_save=True, use_peft=True, lora_r=2, lora_dropout=0.1)
    return Case(["train", recipe], run_directory, given=INPUTS, progress=newest_checkpoint)


@command
def train_on_two(root: Path, model: Path) -> Case:
    recipe = train_recipe(root, model, dp_shard=2, per_device_train_batch_size=1)
    return Case(["train", recipe], run_directory, given=INPUTS, progress=newest_checkpoint, processes=2)


@command
def train_hosted(root: Path, model: Path) -> Case:
    """By transformers' Trainer."""
    recipe = train_recipe(root, model, num_eval_generations=0)
    env = {"ACCELERATE_MIXED_PRECISION": "no"}
    return Case(["train", recipe], run_directory, given=INPUTS, progress=newest_checkpoint, env=env)


@command
def audit(root: Path, model: Path) -> Case:
    return Case(["audit", train_recipe(root, model)], lambda root: files(root / "run", "audit*"), given=INPUTS)


@command
def evaluate(root: Path, model: Path) -> Case:
    def measured(root: Path) -> dict[str, Any]:
        numbers = json.loads((root / "eval.json").read_text())
        return {**files(root, "eval.pairs.jsonl"), "numbers": {k: v for k, v in numbers.items() if "time" not in k}}

    return Case(["eval", train_recipe(root, model), "--output", "eval.json"], measured, given=INPUTS)


# --- on-policy pairs -------------------------------------------------------------------------------------------------


def write_prompts(root: Path, number: int) -> list[str]:
    rng = random.Random(5)
    return [f"{_words(rng)} {place}?" for place in range(number)]


def write_rows(root: Path, name: str, *, scored: bool) -> None:
    """Responses as `simpo generate` or `simpo score` leaves them, with their account."""
    rng, lines = random.Random(7), []
    for place in range(12):
        responses = [{"text": _words(rng), "num_tokens": 5, "finished": True, "logprob": None} for _ in range(3)]
        for number, each in enumerate(responses if scored else ()):
            each |= {"scores": {"any": number}, "score": rng.random()}
        prompt = [{"role": "user", "content": f"Ask {place}"}]
        row = {"id": f"p{place:02}", "row_id": f"x#{place}", "prompt": prompt, "responses": responses}
        lines.append(json.dumps(row))
    (root / "run").mkdir()
    (root / "run" / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    account = {"simpo": "1", "format": 1, "settings": {}, "complete": True, "rows": len(lines), "left_out": {}}
    (root / "run" / f"{name}.json").write_text(json.dumps(account))


def rows_written(root: Path) -> int:
    """How far a command has come that writes rows."""
    return sum(path.read_bytes().count(b"\n") for path in (root / "run").rglob("*.jsonl"))


def save(root: Path, keys: Mapping[str, Any]) -> str:
    load_recipe(dict(keys), processes=1).save(root / "recipe.yaml")
    return "recipe.yaml"


@command
def generate(root: Path, model: Path) -> Case:
    recipe = sampling_recipe(root, model, write_prompts(root, 8), num_samples=2, max_new_tokens=6, batch_size=4)
    words = ["generate", save(root, recipe)]
    return Case(words, lambda root: files(root / "run", "responses.*"), progress=rows_written, given=INPUTS)


SCORERS = {"clean": {"kind": "repetition", "weight": 5}, "brief": {"kind": "length", "max": 4}}


@command
def score(root: Path, model: Path) -> Case:
    write_rows(root, "responses", scored=False)
    recipe = {"model_name_or_path": "any", "output_dir": str(root / "run")}
    recipe["score"] = {"scorers": SCORERS, "standardize": True}
    patterns = ("scored.*", "scores/*")
    words = ["score", save(root, recipe)]
    return Case(words, lambda root: files(root / "run", *patterns), progress=rows_written, given=INPUTS)


@command
def pair(root: Path, model: Path) -> Case:
    write_rows(root, "scored", scored=True)
    recipe = {"model_name_or_path": "any", "output_dir": str(root / "run"), "pair": {"method": "all", "lists": True}}
    patterns = ("pairs/*", "pairs.json", "lists/*")
    return Case(["pair", save(root, recipe)], lambda root: files(root / "run", *patterns), given=INPUTS)


@command
def judge(root: Path, model: Path) -> Case:
    prompts = write_prompts(root, 6)
    recipe = sampling_recipe(root, model, prompts, max_new_tokens=6, batch_size=4)
    answers = [{"instruction": prompt, "output": "water", "generator": "other"} for prompt in prompts]
    (root / "theirs.json").write_text(json.dumps(answers))
    recipe["judge"] = {
        **{"model": str(model), "against": str(root / "theirs.json"), "scorers": {"long": {"kind": "length"}}},
        "prompts": recipe["dataset_mixer"],
    }
    judged = root / "run" / "judged"
    return Case(["judge", save(root, recipe)], lambda _: files(judged, "**/*"), given=(*INPUTS, "theirs.json"))


def in_process() -> None:
    """Commands that others start, in the process of the one that starts them: a kill takes both."""
    from typer.testing import CliRunner

    from simpo.cli import app
    from simpo.onpolicy import rounds
    from simpo.tuning import jobs

    def run(words: list[str], *args: Any, **options: Any) -> Any:
        result = CliRunner().invoke(app, words[words.index("simpo") + 1 :] if "simpo" in words else words)
        print(result.output)
        return (result.exit_code, result.output.strip().rpartition("\n")[2]) if args else result.exit_code

    rounds.run_command = jobs.run_command_line = run


@command
def rounds(root: Path, model: Path) -> Case:
    recipe = rounds_recipe(root, model, write_prompts(root, 40), max_new_tokens=12, batch_size=6)
    recipe |= {"learning_rate": 1e-3, "save_steps": 2, "max_steps": 3, "max_tokens_per_micro_batch": 4096}
    recipe["rounds"] = {"rounds": 1, "prompts_per_round": 8, "eval_prompts": 4}

    def left(root: Path) -> dict[str, Any]:
        names = ("responses.jsonl", "scored.jsonl", "train.jsonl", "test.jsonl", "model.safetensors", "prompts.jsonl")
        found = files(root / "run", *(f"**/{name}" for name in names))
        return {name: content for name, content in found.items() if "/_" not in name}

    return Case(["rounds", save(root, recipe)], left, given=INPUTS, prepare="chaos.commands:in_process")


@command
def sweep(root: Path, model: Path) -> Case:
    recipe = train_recipe(root, model, resume_from_checkpoint=None, max_steps=2, num_eval_generations=0)

    def found(root: Path) -> dict[str, Any]:
        content = re.sub(r'"time_s": [\d.]+', "", (root / "run" / "sweep.json").read_text())
        return {"sweep.json": content, **files(root / "run", "best.yaml", "*/run/model/*.safetensors")}

    words = ["sweep", recipe, "--learning_rate", "1e-3,4e-3", "--generations", "0"]
    return Case(words, found, given=INPUTS, prepare="chaos.commands:in_process")


# --- what is done with a model ---------------------------------------------------------------------------------------


@command
def merge(root: Path, model: Path) -> Case:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapters = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), adapters).save_pretrained(root / "it")
    AutoTokenizer.from_pretrained(model).save_pretrained(root / "it")
    words = ["merge", "it", "--output", "merged"]
    return Case(words, lambda root: model_in(root / "merged"), is_there="is there already")


@command
def export(root: Path, model: Path) -> Case:
    shutil.copytree(model, root / "it")
    words = ["export", "it", "--gguf", "--output", "it.gguf"]
    return Case(words, lambda root: files(root, "*.gguf", "*Modelfile"), is_there="is there already")
