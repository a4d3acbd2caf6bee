"""Trap 73: Llama-3.2's template writes today's date, so the same rows were other tokens on the next day: a run on a new
machine, or after an upgrade, was refused as another one."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from simpo.data.prepare import prepare_pairs
from simpo.data.templates import follows_clock, on_one_day

# As Llama-3.2's has it: the clock where there is one.
DATED = (
    "{% if not day is defined %}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}"
    "{% set day = 'no clock' %}{% endif %}{% endif %}{{ '<|im_start|>system\nToday Date: ' + day + '<|im_end|>\n' }}"
)


def test_a_template_that_asks_for_the_clock_writes_the_same_on_every_day(
    build_tokenizer: Any, data_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(build_tokenizer("chatml"))
    tokenizer.chat_template = dated = DATED + tokenizer.chat_template
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}) + "\n", encoding="utf-8")
    found = []
    for day in (1, 2):
        clock = type(
            "Clock", (datetime.datetime,), {"now": classmethod(lambda _, day=day: datetime.datetime(2026, 3, day))}
        )
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        recipe = data_recipe(file, validation_fraction=0, cache_dir=str(tmp_path / str(day)))
        found.append(prepare_pairs(recipe, tokenizer, progress=False))
    assert "Today Date: 26 Jul 2024<" in found[0].train[0]["prompt_text"]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].ledger.notes == ["chat_template: it writes today's date; 2024-07-26 stands for it, on every day"]
    assert tokenizer.chat_template == dated  # what is saved with the model still asks for the clock


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ('{{ strftime_now("%Y-%m-%d") }}', '{{ "2024-07-26" }}'),
        ("{{ strftime_now( '%B' ) }}{{ strftime_now (format='%d',) }}", "{{ 'July' }}{{ '26' }}"),
        ("{{ strftime_now('%d\\n%b') }}", "{{ '26\\nJul' }}"),
        ("{{ 'strftime_now' }}", "{{ 'strftime_now' }}"),
    ],
)
def test_each_way_to_ask_is_answered(asked: str, text: str) -> None:
    assert on_one_day(asked) == text
    assert not follows_clock(asked)


@pytest.mark.parametrize("asked", ["{{ strftime_now(format) }}", "{{ '%d' | strftime_now }}"])
def test_what_cannot_be_answered_is_known(asked: str) -> None:
    assert follows_clock(asked)
