"""A stand-in for vLLM with the part of its API (main branch, autumn 2026) that simpo uses: it checks what it is given,
and samples from the real weights, token by token. VLLM_STANDIN_LOG is a file for what it was given, as JSON lines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm.lora.request import LoRARequest

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise ValueError("n must be 1 when using greedy sampling")


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        **kwargs: Any,
    ) -> None:
        known = {"logprobs_mode", "distributed_executor_backend", "enable_lora", "max_lora_rank", "max_model_len"}
        if kwargs.keys() - known:
            raise TypeError(f"EngineArgs got unexpected arguments {sorted(kwargs.keys() - known)}")
        assert kwargs.get("max_lora_rank", 16) in RANKS
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._log(model=model, tp=tensor_parallel_size, devices=devices, pid=os.getpid(), **kwargs)
        self.may_adapt = kwargs.get("enable_lora", False)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        if len(sampling_params) != len(prompts):
            raise ValueError("The lengths of prompts and params must be the same.")
        self._log(prompts=len(prompts), lora=lora_request and lora_request.lora_path)
        assert lora_request is None or self.may_adapt
        return [
            RequestOutput(
                prompt["prompt_token_ids"],
                [self._complete(prompt["prompt_token_ids"], params, index) for index in range(params.n)],
            )
            for prompt, params in zip(prompts, sampling_params)
        ]

    @torch.inference_mode()
    def _complete(self, prompt: list[int], params: SamplingParams, index: int) -> CompletionOutput:
        generator = torch.Generator().manual_seed((params.seed or 0) + index)
        tokens: list[int] = []
        total, reason = 0.0, "length"
        while len(tokens) < (params.max_tokens or 16):
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator))
            total += float(logits.log_softmax(-1)[token])
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if token in (params.stop_token_ids or ()) or any(stop in text for stop in params.stop or ()):
                reason = "stop"
                break
        if os.environ.get("VLLM_STANDIN_ABORTS", "never") in self.tokenizer.decode(prompt):
            reason = "abort"
        logprob = total if params.logprobs is not None else None
        return CompletionOutput(index, self.tokenizer.decode(tokens), tokens, logprob, reason)

    def _log(self, **values: Any) -> None:
        if path := os.environ.get("VLLM_STANDIN_LOG"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
