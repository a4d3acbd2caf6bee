"""`import simpo`: the public names, fetched lazily, whatever is imported first."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "numpy", "pydantic", "rich", "peft")
    code = f"import sys, simpo; dir(simpo); print([n for n in {heavy} if n in sys.modules])"
    assert run_python(code) == "[]"


def test_the_recipe_and_the_version_need_no_torch():
    code = (
        "import sys, simpo; simpo.Recipe; simpo.__version__; simpo.train; "
        "r = simpo.load_recipe({'model_name_or_path': 'm'}); print(r.beta, 'torch' in sys.modules)"
    )
    assert run_python(code) == "2.0 False"


@pytest.mark.parametrize(
    "first",
    [
        "from simpo.train import Trainer; from simpo.evaluate import evaluate; import simpo.train, simpo.evaluate",
        "import simpo; simpo.train, simpo.evaluate; import simpo.train, simpo.evaluate; from simpo import train",
    ],
)
def test_train_and_evaluate_are_functions_whatever_was_imported_first(first):
    code = f"{first}; import simpo; print([type(f).__name__ for f in (simpo.train, simpo.evaluate)])"
    assert run_python(code) == "['function', 'function']"


def test_modules_named_like_functions_are_still_importable():
    import simpo

    before = simpo.train
    from simpo.evaluate import evaluate
    from simpo.train import Trainer

    assert Trainer.__module__ == "simpo.train"
    assert simpo.train is before
    assert simpo.evaluate is evaluate


def test_every_public_name_is_there_and_no_other():
    import simpo

    assert all(getattr(simpo, name) is not None for name in simpo.__all__)
    assert set(simpo.__all__) <= set(dir(simpo))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        simpo.trian  # noqa: B018


def test_train_runs_the_trainer_with_overrides(monkeypatch):
    import simpo
    from simpo import train  # the function, for a script that imports it by name

    seen = []

    class Stub:
        def __init__(self, recipe):
            seen.append(recipe)

        def run(self):
            return "result"

    monkeypatch.setattr(importlib.import_module("simpo.train"), "Trainer", Stub)
    assert simpo.train({"model_name_or_path": "m", "beta": 2.0}, beta=3.0, output_dir="runs/a") == "result"
    assert train({"model_name_or_path": "m"}, gamma=1.0) == "result"
    assert (seen[0].beta, seen[0].output_dir) == (3.0, "runs/a")
    assert seen[1].gamma_beta_ratio == 0.5


def test_a_wrong_override_is_named():
    import simpo

    with pytest.raises(ValueError, match=r"unknown key 'betta'.*'beta'"):
        simpo.train({"model_name_or_path": "m"}, betta=3.0)
