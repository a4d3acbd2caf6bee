"""What is worth measuring where a CUDA GPU is at hand; `benchmarks/gpu.py` is its command.

Needs torch, transformers and numpy alone, and runs from a checkout. The same code runs on a CPU with a tiny model.
"""
