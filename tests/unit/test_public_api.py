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


def test_what_a_run_raises_is_reached_from_the_package():
    import simpo
    from simpo.run import stopping

    assert simpo.Interrupted is stopping.Interrupted
    assert simpo.NonFiniteError is stopping.NonFiniteError
    assert simpo.Trainer.__module__ == "simpo.trainer"


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

    monkeypatch.setattr(importlib.import_module("simpo.trainer"), "Trainer", Stub)
    assert simpo.train({"model_name_or_path": "m", "beta": 2.0}, beta=3.0, output_dir="runs/a") == "result"
    assert train({"model_name_or_path": "m"}, gamma=1.0) == "result"
    assert (seen[0].beta, seen[0].output_dir) == (3.0, "runs/a")
    assert seen[1].gamma_beta_ratio == 0.5


def test_a_wrong_override_is_named():
    import simpo

    with pytest.raises(ValueError, match=r"unknown key 'betta'.*'beta'"):
        simpo.train({"model_name_or_path": "m"}, betta=3.0)
