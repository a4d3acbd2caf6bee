"""The update is the same on every mesh: losses, every gradient and the clipped norm, against one process with padding.

`Trainer.train_step` itself runs on the ranks, with an optimizer that only remembers the whole gradients. What it is
compared with is written out below: ordinary logits of one sequence at a time, in one process.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import rarely
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

Settings = dict[str, Any]

STEPS = 2
MAX_NORM = 0.5  # as in step_recipe
TOLERANCE = 4e-6  # of losses, norms and the largest gradient; 2.4e-6 was found without AVX512


# --- on the ranks ----------------------------------------------------------------------------------------------------


class GradientRecorder:
    """In place of an optimizer: keeps the whole clipped gradients and updates nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.param_groups: list[Settings] = [{}]
        self.steps: list[dict[str, Tensor]] = []

    def step(self) -> None:
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
        self.steps.append({name: g.detach().clone() for name, g in whole.items()})

    def zero_grad(self, *, set_to_none: bool) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def run_steps(settings: Settings, steps: int = STEPS, *, prepare: str | None = None) -> dict[str, Any]:
    """A few training steps without updates: metrics of each, whole gradients, and what evaluation says.

    prepare: the function of this file that changes the trainer before its first step; what it returns is called after
        the last, and gives more of the result.
    """
    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
    report = globals()[prepare](trainer) if prepare else dict
    _fill_adapters(trainer.model)
    adapters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainer.model.named_parameters()
        if "lora_" in name
    }
    trainer.optimizer = GradientRecorder(trainer.model)
    plans = list(trainer.loader.plans(0, steps))
    values = [trainer.train_step(plan) for plan in plans]
    result = {
        "values": values,
        "gradients": trainer.optimizer.steps,
        "adapters": adapters,
        "evaluation": trainer.evaluate() if prepare is None else None,
        "empty": sum(not indices for plan in plans for indices in plan.micro_batches),
        "parameters": sum(
            p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trainer.model.parameters()
        ),
    }
    few = {"empty": result["empty"], "parameters": result["parameters"]}
    return (result if trainer.mesh.is_main else few) | report()


def compile_and_count(trainer: Any) -> Callable[[], dict[str, Any]]:
    """Blocks traced forward and backward and not compiled further, which would take minutes."""
    from collections import Counter

    from torch._dynamo.backends.debugging import aot_eager

    from simpo.model.compile import compile_blocks

    seen: set[Any] = set()

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        seen.add(torch._guards.CompileContext.current_compile_id())
        return aot_eager(graph, example_inputs)

    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # dynamo looks at every tensor's
    torch._dynamo.reset()
    compile_blocks(trainer.model, device=trainer.device, backend=backend)
    seen.clear()  # the trial's
    return lambda: {"compilations": max(Counter(each.frame_id for each in seen).values())}


def move_activations(trainer: Any) -> Callable[[], dict[str, Any]]:
    """What the backward pass needs makes the journey of `activation_offload`; on a CPU anything stands for a GPU's.

    Checked here: what moves is no gathered weight, and while it is away no gathered weight is kept in memory.
    """
    from torch.distributed.fsdp import FSDPModule

    from simpo.model import offload
    from simpo.parallel import sharding

    moved: list[Tensor] = []
    passes: list[offload.Offload] = []
    copy_to_cpu = offload._copy_to_cpu
    offload._copy_to_cpu = lambda tensor: moved.append(tensor) or copy_to_cpu(tensor)
    forward = trainer.forward
    # The root's are gathered until the backward pass begins.
    blocks = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)][1:]
    states = {id(block._get_fsdp_state()): block._get_fsdp_state() for block in blocks}
    parts = [p for state in states.values() for group in sharding._param_groups(state) for p in group.fsdp_params]

    def forward_and_move(*args: Any, **kwargs: Any) -> Any:
        with offload.offload_activations(trainer.model, eligible=lambda t: True, min_bytes=1) as found:
            result = forward(*args, **kwargs)
        passes.append(found)
        gathered = {part._unsharded_param.untyped_storage()._cdata for part in parts}
        assert not gathered & {_local(tensor).untyped_storage()._cdata for tensor in moved}
        moved.clear()
        held = [part for part in parts if part._unsharded_param.untyped_storage().size() > 0]
        assert len(held) <= len(parts) / 2, "gathered weights are kept alive"
        return result

    trainer.forward = forward_and_move

    def report() -> dict[str, Any]:
        offload._copy_to_cpu = copy_to_cpu
        return {"out": [found.num_bytes for found in passes], "back": [found.num_bytes_back for found in passes]}

    return report


def _fill_adapters(model: torch.nn.Module) -> None:
    """B starts at zero, which would hide mistakes in A's gradient: give it values, the same whole on every rank."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.data.copy_(values)


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_steps(settings: Settings, *, adapters: dict[str, Tensor] | None = None, steps: int = STEPS) -> dict:
    """The same steps by the definition: mean over the step's pairs of -log sigmoid(beta (m_w - m_l) - gamma)."""
    from simpo.data.loader import PairStore, StepLoader
    from simpo.data.prepare import prepare_pairs
    from simpo.model.load import load_tokenizer
    from simpo.recipe import load_recipe

    pairs_per_step = settings.pop("pairs_per_step")
    recipe = load_recipe({**settings, "dp_replicate": 1, "dp_shard": None, "cp": 1, "tp": 1})
    store = PairStore(prepare_pairs(recipe, load_tokenizer(recipe)).train)
    model = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path, attn_implementation="eager")
    if adapters:
        from peft import LoraConfig, get_peft_model

        options = {"r": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": 0.0}
        with warnings.catch_warnings():  # peft 0.21 reads an attribute that transformers 5.23 renamed
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options))
        missing = model.load_state_dict(adapters, strict=False)
        assert not missing.unexpected_keys
    model.train()
    loader = StepLoader(store, pairs_per_step=pairs_per_step, num_micro_batches=1, seed=recipe.seed)
    found: dict[str, list] = {"losses": [], "norms": [], "gradients": [], "accuracies": []}
    for plan in loader.plans(0, steps):
        indices = [index for items in plan.micro_batches for index in items]
        margins = [_mean_logp(model, store[i], "chosen") - _mean_logp(model, store[i], "rejected") for i in indices]
        losses = [-F.logsigmoid(recipe.beta * (margin - recipe.gamma_beta_ratio)) for margin in margins]
        loss = torch.stack(losses).mean()
        model.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)))
        found["losses"].append(loss.item())
        found["accuracies"].append(sum(float(margin.detach() > 0) for margin in margins) / len(margins))
        found["gradients"].append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def _mean_logp(model: torch.nn.Module, pair: Any, side: str) -> Tensor:
    ids, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_start")
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[start:])[:, None]).mean()


def assert_same_update(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    for step, values in enumerate(ours["values"]):
        assert values["loss"] == pytest.approx(reference["losses"][step], rel=TOLERANCE)
        assert values["rewards/accuracies"] == pytest.approx(reference["accuracies"][step])
        assert values["grad_norm"] == pytest.approx(reference["norms"][step], rel=TOLERANCE)
        found, expected = ours["gradients"][step], reference["gradients"][step]
        assert found.keys() == expected.keys()
        largest = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in expected.items():
            difference = float((found[name] - gradient).abs().max())
            assert difference <= TOLERANCE * largest, f"step {step}, {name}: {difference / largest:.1e}"


# --- what is run -----------------------------------------------------------------------------------------------------


SHAPES: dict[str, Settings] = {
    "untied": {},
    "tied, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 509},
    "3 KV heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "1 KV head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "norms of heads": {"architecture": "Qwen3", "head_dim": 12},
    "also sees": {
        "architecture": "Gemma3",
        "text_config": {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 12},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    },
}
DP, FSDP = {"dp_replicate": 2, "dp_shard": 1}, {"dp_shard": 2}
TP, CP = {"tp": 2}, {"cp": 2}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}

# name -> shape, data ranks, keys
TWO: dict[str, tuple[str, int, Settings]] = {
    "dp2": ("untied", 2, DP),
    "dp2 accumulated": ("untied", 2, {**DP, "accumulation": 2}),
    "dp2, also sees": ("also sees", 2, {**DP, "accumulation": 2}),  # with weights that text does not reach
    "fsdp2": ("untied", 2, FSDP),
    "fsdp2 tied": ("tied, odd vocabulary", 2, FSDP),
    "fsdp2 accumulated": ("untied", 2, {**FSDP, "accumulation": 2}),
    "fsdp2 checkpointed": ("untied", 2, {**FSDP, "gradient_checkpointing": True}),
    "tp2": ("untied", 1, TP),
    "tp2 tied": ("tied, odd vocabulary", 1, TP),
    "tp2 biases": ("biases", 1, TP),
    "tp2 checkpointed": ("untied", 1, {**TP, "gradient_checkpointing": True, "accumulation": 2}),
    "tp2, norms of heads": ("norms of heads", 1, {**TP, "accumulation": 4}),
    "cp2": ("untied", 1, CP),
    "cp2, 3 KV heads": ("3 KV heads", 1, CP),
    "cp2, 1 KV head": ("1 KV head", 1, {**CP, "accumulation": 2}),
    "cp2 checkpointed": ("tied, odd vocabulary", 1, {**CP, "gradient_checkpointing": True}),
    "dp2 padded": ("untied", 2, {**DP, "pack": False, "share_prompt": False}),
    "tp2 padded": ("untied", 1, {**TP, "pack": False, "share_prompt": False}),
    "dp2 LoRA": ("untied", 2, {**DP, **LORA}),
    "fsdp2 LoRA": ("untied", 2, {**FSDP, **LORA, "gradient_checkpointing": True}),
    "tp2 LoRA": ("untied", 1, {**TP, **LORA}),
    "cp2 LoRA": ("untied", 1, {**CP, **LORA}),
}
FOUR: dict[str, tuple[str, int, Settings]] = {
    "dp4": ("untied", 4, {"dp_replicate": 4, "dp_shard": 1}),
    "hsdp 2x2": ("untied", 4, {"dp_replicate": 2, "dp_shard": 2}),
    "fsdp2 x tp2": ("tied, odd vocabulary", 2, {"dp_shard": 2, "tp": 2}),
    "cp2 x tp2": ("untied", 1, {"cp": 2, "tp": 2}),
    "fsdp2 x cp2": ("3 KV heads", 2, {"dp_shard": 2, "cp": 2}),
    "dp2 x tp2": ("untied", 2, {"dp_replicate": 2, "dp_shard": 1, "tp": 2}),
    "dp2 x tp2, norms of heads": (
        *("norms of heads", 2),
        {"dp_replicate": 2, "dp_shard": 1, "tp": 2, "accumulation": 2},
    ),
    "fsdp2 x tp2, norms of heads": ("norms of heads", 2, {"dp_shard": 2, "tp": 2, "accumulation": 2}),
    "dp2 x cp2 accumulated": ("untied", 2, {"dp_replicate": 2, "dp_shard": 1, "cp": 2, "accumulation": 2}),
    "fsdp2 x tp2 LoRA checkpointed": ("untied", 2, {"dp_shard": 2, "tp": 2, **LORA, "gradient_checkpointing": True}),
}


def check(ranks: Ranks, settings: Settings, *, steps: int = STEPS, prepare: str | None = None) -> list[dict[str, Any]]:
    found = ranks.run(run_steps, settings, steps, prepare=prepare)
    assert_same_update(found[0], reference_of(settings, found[0], ranks.size, steps=steps))
    return found


def reference_of(settings: Settings, ours: dict[str, Any], world: int, *, steps: int = STEPS) -> dict[str, list]:
    pairs = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    data = world // (settings.get("cp", 1) * settings.get("tp", 1))
    return reference_steps({**settings, "pairs_per_step": pairs * data}, adapters=ours["adapters"], steps=steps)


@pytest.fixture(scope="module")
def kept() -> dict[str, tuple[Settings, list[dict[str, Any]]]]:
    """What `on_two` has run already."""
    return {}


@pytest.fixture
def on_two(kept, two_ranks: Ranks, model_folder, step_recipe) -> Callable[[str], tuple[Settings, list[dict[str, Any]]]]:
    """on_two(case): the settings of a case of TWO, and what its steps gave on each rank."""

    def run(case: str) -> tuple[Settings, list[dict[str, Any]]]:
        if case not in kept:
            shape, data, keys = TWO[case]
            settings = step_recipe(model_folder(**SHAPES[shape]), data, **keys)
            kept[case] = settings, two_ranks.run(run_steps, settings)
        return kept[case]

    return run


RARELY = ("dp2 accumulated", "fsdp2 accumulated", "tp2 checkpointed", "cp2 checkpointed", "tp2 padded")
RARELY += ("tp2 biases", "cp2, 1 KV head", "dp2 LoRA", "cp2 LoRA")


@pytest.mark.parametrize("case", [rarely(case) if case in RARELY else case for case in TWO])
def test_two_processes_make_the_update_of_one(case, on_two):
    settings, found = on_two(case)
    assert_same_update(found[0], reference_of(settings, found[0], 2))


@pytest.mark.parametrize("case", ["dp2", "fsdp2", "tp2 tied", "cp2, 3 KV heads"])
def test_evaluation_over_ranks_counts_every_pair_once(case, on_two):
    """Ten pairs in batches of four: with two data ranks one of four batches is empty."""
    settings, ranks = on_two(case)
    found = dict(ranks[0]["evaluation"])
    alone = run_steps({**settings, "dp_replicate": 1, "dp_shard": None, "cp": 1, "tp": 1}, 1)["evaluation"]
    assert found.pop("eval_time_s") > 0
    assert alone.pop("eval_time_s") > 0
    assert found == pytest.approx(alone, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("case", ["fsdp2", "tp2", "cp2"])
def test_sharded_ranks_hold_half_of_the_weights(case, on_two):
    settings, ranks = on_two(case)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]).parameters())
    for found in ranks:
        assert 0.45 * whole < found["parameters"] < 0.55 * whole


@pytest.mark.four_processes
@pytest.mark.parametrize("case", FOUR)
def test_four_processes_make_the_update_of_one(case, four_ranks: Ranks, model_folder, step_recipe):
    shape, data, keys = FOUR[case]
    check(four_ranks, step_recipe(model_folder(**SHAPES[shape]), data, **keys))


# The LoRA case takes a minute: it runs with the longer tests.
@pytest.mark.long
@pytest.mark.parametrize("case", ["fsdp2 checkpointed", "cp2", "fsdp2 LoRA"])
def test_compiled_blocks_make_the_same_update_on_two_processes(case, two_ranks: Ranks, model_folder, step_recipe):
    """And each piece of a block is compiled once, for all layers, lengths and steps."""
    shape, data, keys = TWO[case]
    found = check(two_ranks, step_recipe(model_folder(**SHAPES[shape]), data, **keys), prepare="compile_and_count")
    assert [result["compilations"] for result in found] == [1, 1]


SHARDED = ["fsdp2 tied", "fsdp2 checkpointed", "tp2 checkpointed"]


@pytest.mark.parametrize("case", ["fsdp2 LoRA", "cp2", *map(rarely, SHARDED)])
def test_activations_that_are_moved_away_make_the_same_update_on_two_processes(
    case, two_ranks: Ranks, model_folder, step_recipe
):
    shape, data, keys = TWO[case]
    found = check(two_ranks, step_recipe(model_folder(**SHAPES[shape]), data, **keys), prepare="move_activations")
    for result in found:
        assert result["back"] == result["out"]
        assert min(result["out"]) > 0


@pytest.mark.parametrize("mesh", [DP, FSDP], ids=["dp2", "fsdp2"])
def test_a_rank_without_pairs_in_the_last_batch_adds_nothing(mesh, two_ranks: Ranks, model_folder, step_recipe):
    settings = step_recipe(model_folder(), 2, max_train_samples=5, **mesh)  # a step of four pairs, then one of one
    found = check(two_ranks, settings)
    assert sorted(result["empty"] for result in found) == [0, 1]


@pytest.mark.parametrize("mesh", [DP, FSDP], ids=["dp2", "fsdp2"])
def test_ragged_shares_weigh_each_pair_the_same(mesh, two_ranks: Ranks, model_folder, step_recipe):
    settings = step_recipe(model_folder(), 2, pairs=8, accumulation=2, max_train_samples=7, **mesh)
    check(two_ranks, settings, steps=1)


def test_blocks_gathered_in_bf16_compute_what_autocast_does_on_one_process(
    two_ranks: Ranks, model_folder, step_recipe, tmp_path
):
    settings = step_recipe(model_folder(tie_word_embeddings=True), 2, bf16=True, **FSDP)
    ours = two_ranks.run(run_steps, settings, 1)[0]
    exact = two_ranks.run(run_steps, {**settings, "fsdp_param_dtype": "float32"}, 1)[0]
    alone = run_steps(
        {**settings, "dp_shard": 1, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "alone")}, 1
    )
    for other in (exact, alone):
        assert ours["values"][0]["loss"] == pytest.approx(other["values"][0]["loss"], rel=1e-5)
        for name, gradient in other["gradients"][0].items():
            difference = float((ours["gradients"][0][name] - gradient).norm() / gradient.norm())
            assert difference < 0.02, f"{name}: {difference}"  # a bf16 gradient before it is reduced in fp32


@pytest.mark.parametrize("case", ["fsdp2 tied", "cp2", rarely("dp2"), rarely("tp2")])
def test_a_reference_model_is_spread_like_the_policy(case, two_ranks: Ranks, model_folder, step_recipe, tmp_path):
    shape, data, keys = TWO[case]
    settings = step_recipe(model_folder(**SHAPES[shape]), data, loss_type="dpo", beta=0.1, **keys)
    settings["ref_model_name_or_path"] = model_folder(**SHAPES[shape], initializer_range=0.05)
    found = two_ranks.run(run_steps, settings)[0]["values"]
    whole = {"dp_replicate": 1, "dp_shard": None, "cp": 1, "tp": 1, "cache_dir": str(tmp_path / "other cache")}
    whole["output_dir"] = str(tmp_path / "alone")  # the ranks, which live on, hold the lock of theirs
    whole["per_device_train_batch_size"] = settings["per_device_train_batch_size"] * data
    alone = run_steps({**settings, **whole})["values"]
    for ours, theirs in zip(found, alone, strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def step_with_nan_on_one_rank(settings: Settings) -> str:
    """What is said of it."""
    import torch.distributed as dist

    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import NonFiniteError, Trainer

    trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
    forward = trainer.forward

    def broken(micro_batch: Any, plan: Any, **others: Any) -> tuple[Tensor, Tensor]:
        losses, sums = forward(micro_batch, plan, **others)
        if dist.get_rank() == 1:
            losses = torch.cat([losses[:-1], losses[-1:] * float("nan")])
        return losses, sums

    trainer.forward = broken
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(NonFiniteError) as error:
        trainer.train_step(next(trainer.loader.plans(0, 1)))
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(_local(parameter), _local(old))
    return str(error.value)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("case", ["dp2", "fsdp2", "tp2", "cp2"])
def test_nan_on_one_rank_stops_all_with_its_rank_and_row(case, two_ranks: Ranks, model_folder, step_recipe):
    shape, data, keys = TWO[case]
    for message in two_ranks.run(step_with_nan_on_one_rank, step_recipe(model_folder(**SHAPES[shape]), data, **keys)):
        assert re.search(r"Rows: rank 1: pairs\d*/train#\d+\.", message)
        assert "rank 0" not in message
        assert "nothing was updated" in message


def refusals(*starts: tuple[Settings, Settings]) -> list[str]:
    """What each recipe is refused with, which is with the second changes on rank 1."""
    import torch.distributed as dist

    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    found = []
    for settings, changes in starts:
        try:
            Trainer(load_recipe(settings | (changes if dist.get_rank() == 1 else {})), display=Display(quiet=True))
            found.append("nothing")
        except ValueError as error:
            found.append(str(error))
    return found


def test_ranks_that_would_do_different_runs_do_not_start(two_ranks: Ranks, model_folder, step_recipe):
    cases = [
        ({"learning_rate": 0.5}, "recipe key learning_rate: rank 1 has 0.5, rank 0 has 0.002"),
        ({"max_train_samples": 20}, "rank 1 has 20, rank 0 has None"),
        ({"seed": 7}, "recipe key seed: rank 1 has 7"),
        # Before the first collective that they would do alone or in another group.
        ({"dp_shard": 1, "tp": 2}, "recipe key dp_shard: rank 1 has 1, rank 0 has 2"),
        ({"eval_on_start": True}, "recipe key eval_on_start: rank 1 has True, rank 0 has False"),
        (LORA, "recipe key use_peft: rank 1 has True, rank 0 has False"),
    ]
    settings = step_recipe(model_folder(), 2, **FSDP)
    for found in two_ranks.run(refusals, *((settings, changes) for changes, _ in cases)):
        for message, (_, said) in zip(found, cases, strict=True):
            assert said in message


def refusals_in(folder: Path, *starts: Settings) -> list[str]:
    """As `refusals`, where relative names are those of this rank's own folder."""
    import torch.distributed as dist

    with contextlib.chdir(folder / f"rank{dist.get_rank()}"):
        return refusals(*((settings, {}) for settings in starts))


def test_ranks_whose_machines_hold_other_data_or_models_do_not_start(
    two_ranks: Ranks, model_folder, step_recipe, tmp_path: Path
):
    """Of the same names, and the same shapes: each would read its shards of its own."""
    settings = step_recipe(model_folder(), 2, **FSDP)
    pairs, model = Path(next(iter(settings["dataset_mixer"]))), Path(settings["model_name_or_path"])
    for rank in range(2):
        shutil.copytree(model, tmp_path / f"rank{rank}" / "same")
        shutil.copytree(model, tmp_path / f"rank{rank}" / "model")
        shutil.copytree(pairs, tmp_path / f"rank{rank}" / "pairs")
    for path in (tmp_path / "rank1" / "pairs").glob("train*"):
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    weights = tmp_path / "rank1" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other_data = {**settings, "dataset_mixer": {"./pairs": 1.0}, "model_name_or_path": "./same"}
    other_model = {**settings, "model_name_or_path": "./model"}
    for found in two_ranks.run(refusals_in, tmp_path, other_data, other_model):
        assert found[0].startswith("fingerprint of the data: rank 1 has ")
        assert found[1].startswith("weights of ./model: rank 1 has ")
        assert found[1].endswith("; every process needs the same recipe, data, model files and package versions")


CANNOT_BE: list[tuple[Settings, Settings, str]] = [
    ({}, {"tp": 3}, "the mesh (dp_replicate 1, cp 1, tp 3) needs a multiple of 3 processes, but 2 were started"),
    ({}, {"dp_shard": 4}, "needs 4 processes, but 2 were started"),
    (
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        {"tp": 2},
        "tp = 2: does not divide this model's num_att",
    ),
    ({"num_key_value_heads": 1}, {"tp": 2}, "tp = 2: does not divide this model's num_key_value_heads = 1"),
    ({"num_attention_heads": 3, "num_key_value_heads": 3}, {"cp": 2}, "cp = 2: does not divide the 3 attention heads"),
    ({}, {"cp": 2, "pack": False, "share_prompt": False}, "cp = 2: padded rows cannot be split"),
    ({}, {"dp_shard": 2, "optim": "adamw_8bit"}, "optim: adamw_8bit does not support sharded weights"),
    ({}, {**TP, "torch_compile": True}, "torch_compile: torch's compiler cannot trace tensor-parallel blocks"),
    ({}, {**TP, "use_liger_kernel": True}, "use_liger_kernel: Liger's kernels do not support tensor-parallel weights"),
    ({}, {**FSDP, **LORA, "lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save: not supported with sharded"),
    ({"architecture": "Mamba"}, FSDP, "needs packed rows, which MambaForCausalLM does not take"),
    (
        {"architecture": "Phi3", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        {**TP, **LORA},
        "self_attn.o_proj of Phi3ForCausalLM is sharded as rowwise_split_input",
    ),
    (
        {"architecture": "Mixtral", "num_local_experts": 4},
        {**TP, **LORA},
        "lora_target_modules: MixtralForCausalLM has its experts in one weight",
    ),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {"cp": 2}, "dynamic"),
]


def test_a_mesh_that_cannot_be_is_refused_on_every_rank(two_ranks: Ranks, model_folder, step_recipe):
    starts = [(step_recipe(model_folder(**shape), 1, **keys), {}) for shape, keys, _ in CANNOT_BE]
    for found in two_ranks.run(refusals, *starts):
        for message, (_, keys, said) in zip(found, CANNOT_BE, strict=True):
            assert said in message, keys
            assert "\n" not in message


def measure(settings: Settings) -> dict[str, float]:
    """What the trainer measures before it picks the size of its micro-batches."""
    import dataclasses

    from simpo.display import Display
    from simpo.parallel.sharding import drop_gathered, gathered_bytes
    from simpo.recipe import load_recipe
    from simpo.run.memory import measure_activations, step_bytes
    from simpo.trainer import Trainer

    trainer = Trainer(load_recipe(settings), display=Display(quiet=True))

    def forward(batch: Any) -> Any:
        drop_gathered(trainer.model)
        return trainer._logps(batch)

    found = measure_activations(trainer.model, forward, device=trainer.device)
    drop_gathered(trainer.model)
    gathered = gathered_bytes(trainer.model)
    state, elsewhere = (
        step_bytes(trainer.model, optim="adamw_torch", chunk_size=8, device=torch.device(name)) - gathered
        for name in ("cpu", "meta")
    )
    sizes = {"state": state, "elsewhere": elsewhere, "gathered": gathered}
    return dataclasses.asdict(found) | sizes | {"budget": trainer.loader.max_tokens}


def test_sharding_halves_the_state_and_leaves_activations(two_ranks: Ranks, model_folder, step_recipe, tmp_path):
    settings = step_recipe(model_folder(), 2, max_tokens_per_micro_batch=None, **FSDP)
    alone = measure({**settings, "dp_shard": 1, "output_dir": str(tmp_path / "alone")})
    sharded, other = two_ranks.run(measure, settings)
    assert sharded["budget"] == other["budget"]  # equal plans, whatever each process found free
    for name in ("per_pair", "per_token", "per_label", "per_score"):
        assert sharded[name] == pytest.approx(alone[name], rel=0.01, abs=1)
    head = 8 * 512 * 48 + 2 * 4 * 8 * 512  # put together to compute, and its logits, whatever is sharded
    assert sharded["state"] - head == (alone["state"] - head) / 2
    assert sharded["elsewhere"] == head  # nothing of weights that wait in another memory
    assert sharded["fixed"] <= alone["fixed"] + 64  # what was gathered for the pass is emptied after it
    block = 3 * 48 * 48 + 3 * 48 * 96 + 2 * 48  # its weights twice, its gradients as they come and in fp32
    assert (alone["gathered"], sharded["gathered"]) == (0, 4 * 4 * block)


@pytest.mark.long
@pytest.mark.parametrize("case", ["dp2", "fsdp2 checkpointed", "tp2 tied", "cp2"])
def test_what_is_known_of_tokens_makes_the_update_of_one_process(
    case, two_ranks: Ranks, model_folder, step_recipe, scored_lists, tmp_path
):
    """Weights and balances of gradients of SimPO's pairs, ConfPO, scores and lists: each mesh against one process."""
    shape, data, keys = TWO[case]
    lists = {"dataset_mixer": {str(scored_lists): 1.0}}
    methods: tuple[Settings, ...] = (
        {"wpo_weights": True, "reward_calibration": True},
        {"loss_type": "confpo", "wpo_weights": True},
        {**lists, "score_margin": 2.0},
        {**lists, "loss_type": "plackett_luce"},
    )
    for number, method in enumerate(methods):
        folders = [str(tmp_path / f"{number} {world}") for world in (1, 2)]
        one = run_steps(step_recipe(model_folder(**SHAPES[shape]), 1, output_dir=folders[0], **method))
        method["output_dir"] = folders[1]
        found = two_ranks.run(run_steps, step_recipe(model_folder(**SHAPES[shape]), data, **keys, **method))[0]
        for ours, theirs in zip(found["gradients"], one["gradients"], strict=True):
            largest = max(float(gradient.abs().max()) for gradient in theirs.values())
            for name, gradient in theirs.items():
                assert float((ours[name] - gradient).abs().max()) <= 2e-6 * largest, (method, name)
        for ours, theirs in zip(found["values"], one["values"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert found["evaluation"]["eval_loss"] == pytest.approx(one["evaluation"]["eval_loss"], rel=1e-5)
