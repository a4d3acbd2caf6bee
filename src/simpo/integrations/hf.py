"""The same preference training inside transformers' Trainer: its callbacks, trackers, engines and hub.

from simpo.integrations.hf import SimPOConfig, SimPOTrainer

trainer = SimPOTrainer("org/model", SimPOConfig(output_dir="runs/first"), train_dataset=rows)
trainer.train()
"""

from __future__ import annotations

from simpo.integrations.hf_config import SimPOConfig
from simpo.integrations.hf_run import run_recipe
from simpo.integrations.hf_trainer import SimPOTrainer

__all__ = ["SimPOConfig", "SimPOTrainer", "run_recipe"]
