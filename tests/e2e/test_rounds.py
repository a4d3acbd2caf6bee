"""`simpo rounds` with its real commands on the tiny model; how commands are started and end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniature import rounds_recipe

from simpo.onpolicy.rounds import run_command, run_rounds
from simpo.recipe import load_recipe


@pytest.mark.usefixtures("rounds_in_process")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_a_rounds_adapter_is_merged_and_the_next_begins_with_that(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    keys = rounds_recipe(tmp_path, tiny_model, [f"water and stone, {number}?" for number in range(30)])
    more = {"use_peft": True, "learning_rate": 1e-2, "save_strategy": "no"}
    run_rounds(load_recipe({**keys, **more, "rounds": {"rounds": 1, "prompts_per_round": 8, "eval_prompts": 4}}))
    place = tmp_path / "run" / "round-1"
    assert load_recipe(place / "evaluation" / "recipe.yaml").model_name_or_path == str(place / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = PeftModel.from_pretrained(base, place / "run" / "model").merge_and_unload().state_dict()
    merged = load_file(place / "merged" / "model.safetensors")
    before = load_file(tiny_model / "model.safetensors")
    assert all(weight.equal(expected[name]) for name, weight in merged.items())
    assert any(not weight.equal(before[name]) for name, weight in merged.items())


def test_a_command_is_waited_for_and_interrupted_once(tmp_path: Path) -> None:
    assert run_command([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    code = (
        "import os, signal, sys, time\n"
        "def stop(number, frame): print('asked', flush=True); time.sleep(0.3); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "os.kill(int(sys.argv[1]), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )

    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, "-c", code, str(os.getpid())])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a command may outlive the loop that started it")
def test_a_command_goes_with_the_loop_that_is_killed() -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    loop = f"import sys\nfrom simpo.onpolicy.rounds import run_command\nrun_command([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        number = int(process.stdout.readline())
        process.kill()
    stat, deadline = Path(f"/proc/{number}/stat"), time.monotonic() + 5
    while stat.exists() and ") Z" not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stat.exists() or ") Z" in stat.read_text()
