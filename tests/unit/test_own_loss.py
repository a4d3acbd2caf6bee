"""A loss of the user's own, `loss_type: module:function`: found, tried, explained, or refused in one line."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from simpo.cli import app
from simpo.core.losses import LOSSES, PairLogps
from simpo.core.own_loss import find_function
from simpo.recipe import KEYS, Recipe, load_recipe

NAMES = (f"own_losses_{number}" for number in itertools.count())
SIMPO = """
import torch.nn.functional as F

def simpo(logps, *, beta, gamma_beta_ratio=0.5, scale=1.0, shape="log"):
    "SimPO again, times a scale."
    return -scale * F.logsigmoid(beta * (logps.chosen_mean - logps.rejected_mean) - beta * gamma_beta_ratio)
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into the working directory and gives its name, one that no other test has imported."""
    monkeypatch.chdir(tmp_path)

    def write_module(source: str) -> str:
        name = next(NAMES)
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return write_module


def recipe(loss_type: str, **keys: object) -> Recipe:
    return load_recipe({"model_name_or_path": "m", "loss_type": loss_type, **keys})


def some_logps() -> PairLogps:
    lengths = torch.tensor([4, 7])
    return PairLogps(torch.tensor([-6.0, -9.0]), torch.tensor([-5.0, -20.0]), lengths, lengths + 1)


def test_it_is_called_with_the_recipes_keys_and_its_own_options(write: Write) -> None:
    r = recipe(f"{write(SIMPO)}:simpo", gamma=1.6, beta=4.0, loss_kwargs={"scale": 2})
    assert r.loss_values == {"beta": 4.0, "gamma_beta_ratio": 0.4, "scale": 2, "shape": "log"}
    ours = LOSSES["sigmoid"](some_logps(), beta=4.0, gamma_beta_ratio=0.4)
    theirs = r.loss(some_logps(), **r.loss_values)
    assert torch.allclose(theirs.losses, 2 * ours.losses)
    assert torch.equal(theirs.chosen_rewards, ours.chosen_rewards)  # beta times the mean, where it returns losses alone
    assert torch.equal(theirs.rejected_rewards, ours.rejected_rewards)
    assert r.loss_at_zero_margin() == pytest.approx(2 * math.log(1 + math.exp(1.6)))
    assert not r.loss.needs_reference
    assert not r.notices


def test_without_a_default_the_general_keys_are_simpos(write: Write) -> None:
    r = recipe(f"{write(SIMPO)}:simpo")
    assert (r.beta, r.gamma_beta_ratio, r.sft_weight) == (2.0, 0.5, 0.0)
    assert recipe(f"{r.loss_type}", gamma=1.6).gamma_beta_ratio == pytest.approx(0.8)


def test_the_resolved_recipe_holds_every_option_and_reads_back_equal(write: Write, tmp_path: Path) -> None:
    r = recipe(f"{write(SIMPO)}:simpo")
    assert r.loss_kwargs == {"scale": 1.0, "shape": "log"}  # a default that is changed in the file makes another run
    r.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == r
    other = load_recipe(r, ["--loss_kwargs.scale=3"])
    assert other.loss_kwargs == {"scale": 3, "shape": "log"}
    assert not KEYS["loss_kwargs"].may_change  # on resume


def test_a_loss_that_asks_for_the_reference_gets_one(write: Write) -> None:
    source = "def dpo(logps, *, beta=0.1):\n    return (beta * (logps.chosen_sum - logps.reference()[0])).exp()\n"
    r = recipe(f"{write(source)}:dpo", ref_model_name_or_path="r")
    assert r.loss.needs_reference
    assert not r.notices


def test_check_explains_it(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: m\nloss_type: {write(SIMPO)}:simpo\n")
    result = CliRunner().invoke(app, ["check", str(path), "--loss_kwargs", "{scale: 2}"])
    assert "beta 2, gamma/beta 0.5, scale 2, shape log, gamma 1, 2.6265 nats at zero margin" in result.output
    assert "SimPO again, times a scale.  [your own]" in result.output


def test_the_documentations_example_is_a_loss(write: Write) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(def cauchy\(.*?)```", page, flags=re.S)
    r = recipe(f"{write(block)}:cauchy", loss_kwargs={"width": 0.5})
    assert r.loss_at_zero_margin() == pytest.approx(math.log1p((2.0 * 0.5 / 0.5) ** 2 / 2))


@pytest.mark.parametrize(
    ("source", "name", "keys", "message"),
    [
        ("", "no", {}, r"loss_type = '\w+:no': no function 'no' in .*\.py"),
        ("x = 3", "x", {}, r"a int, not a function, 'x' in"),
        (
            "import nowhere_at_all",
            "f",
            {},
            r"cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("1 / 0", "f", {}, r"cannot be imported: ZeroDivisionError"),
        (SIMPO, "simpo", {"loss_kwargs": {"scal": 2}}, r"has no option 'scal'; it takes scale, shape"),
        (SIMPO, "simpo", {"loss_kwargs": {"beta": 2}}, r"loss_kwargs: beta is a key of the recipe itself"),
        (
            SIMPO,
            "simpo",
            {"loss_kwargs": {"scale": [2]}},
            r"loss_kwargs = .*scale must be true, false, text or a finite",
        ),
        (SIMPO, "simpo", {"orpo_lambda": 2}, r"orpo_lambda: loss_type '\w+:simpo' does not read it, only orpo does"),
        (SIMPO, "simpo", {"label_smoothing": 0.1}, r"label_smoothing = 0.1: not defined for loss_type '\w+:simpo'"),
        (
            "def f(logps, *, tau): return logps.chosen_mean",
            "f",
            {},
            r"needs tau, which has no default; give loss_kwargs",
        ),
        ("def f(logps): return logps.chosen_mean.mean()", "f", {}, r"returned shape \[\] for 3 pairs; one loss a pair"),
        ("def f(logps): return 3", "f", {}, r"returned int for 3 pairs"),
        ("def f(logps): return -logps.chosen_mean.log()", "f", {}, r"not finite for chosen and rejected at -1 and -1,"),
        ("def f(logps): return logps.chosen_mean.detach()", "f", {}, r"do not depend on the log-probs"),
        ("def f(logps): return logps.nothing", "f", {}, r"failed on three made-up pairs: AttributeError"),
    ],
)
def test_what_is_wrong_with_it_is_said_in_one_line(
    write: Write, source: str, name: str, keys: dict[str, object], message: str
) -> None:
    module = write(source)
    with pytest.raises(ValueError, match=message) as caught:
        recipe(f"{module}:{name}", **keys)
    assert len(str(caught.value).splitlines()) == 1


def test_a_module_that_is_not_there_is_named_with_the_folder_that_was_searched(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no module 'no_losses', neither in {tmp_path} nor installed"):
        recipe("no_losses:f")
    (tmp_path / "package_of_losses").mkdir()
    with pytest.raises(ValueError, match=r"there is no module 'package_of_losses.inner'"):
        recipe("package_of_losses.inner:f")


def test_a_module_of_the_working_directory_comes_before_one_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("elsewhere", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module_in_two_places.py").write_text(f"def where():\n    return {folder!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    assert find_function("module_in_two_places:where", "loss_type")() == "here"


def test_options_are_for_a_loss_of_ones_own() -> None:
    with pytest.raises(ValueError, match=r"loss_kwargs: only for a loss of your own.*sigmoid reads beta"):
        recipe("sigmoid", loss_kwargs={"tau": 1})
    with pytest.raises(ValueError, match="loss_type = 'my losses': not one of its values"):
        recipe("my losses")
