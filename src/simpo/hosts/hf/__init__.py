"""The same preference training inside transformers' Trainer: its callbacks, trackers, engines and hub.

from simpo.hosts.hf import SimPOConfig, SimPOTrainer

trainer = SimPOTrainer("org/model", SimPOConfig(output_dir="runs/first"), train_dataset=rows)
trainer.train()
"""

from __future__ import annotations

from simpo.hosts.hf.config import SimPOConfig
from simpo.hosts.hf.run import run_recipe
from simpo.hosts.hf.trainer import SimPOTrainer

__all__ = ["SimPOConfig", "SimPOTrainer", "run_recipe"]
