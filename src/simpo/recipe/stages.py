"""The keys of the commands around training: what a recipe says under `generate`, `score`, `pair`, `rounds` and `judge`;
and those of cleaning, under `clean`.

Declared as the recipe's own keys are, and checked with it: one file describes the whole loop, and each command reads
its part. Written as a mapping in YAML, or one by one: `--generate.temperature 0.8`.
Must not import torch, transformers or datasets.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue

from simpo.recipe.declare import Key, declared_key, in_section
from simpo.recipe.scorers import as_scorers_or_null
from simpo.recipe.values import Number, PathText, Text, Whole, Words, as_mixture, as_words


class Stage(BaseModel):
    """What a recipe says about one command; every key has a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


_generate, _clean = in_section("generate"), in_section("clean")


# fmt: off
class Clean(Stage):
    """What is done to pairs before they are trained on; the ledger lists every pair that goes, with its reason."""

    near_duplicates: bool = _clean(
        False, "Drop pairs whose prompt nearly repeats an earlier one; pairs with the very same prompt stay or go "
        "together (install simpo[clean]).")
    similarity: Number = _clean(
        0.7, "From which similarity prompts are near-duplicates: what two prompts share of all their pairs of "
        "neighbouring words (Jaccard), estimated by MinHash; system turns aside.", gt=0.3, le=1)
    leaks: Literal["keep", "exact", "near"] = _clean(
        "keep", "Drop pairs whose prompt is in the other split too: exact, the very same; near, also near-duplicates "
        "(install simpo[clean]).")
    leaks_from: Literal["train", "eval"] = _clean(
        "train", "The split that such pairs are dropped from.")
    contradictions: bool = _clean(
        False, "Drop pairs that another one contradicts: the same prompt and answers, the other way round.")
    one_pair_a_prompt: bool = _clean(
        False, "Keep one pair of each prompt: that with the largest gap between its scores, else the first.")
    max_length_ratio: Number | None = _clean(
        None, "Drop pairs whose longer answer has more than this many times the characters of the shorter one.",
        null="no limit", ge=1)
    min_score_gap: Number | None = _clean(
        None, "Drop pairs whose chosen answer does not score this much more than the rejected one, and those without "
        "scores.", null="no limit")
    template_residue: bool = _clean(
        False, "Drop pairs whose texts hold marks of a chat template (<|im_end|>, [INST], an answer's own "
        '"\\n\\nHuman:"); text that was rendered as a whole is not meant.')
    refusals: Literal["keep", "chosen", "either"] = _clean(
        "keep", "Drop pairs whose chosen answer, or either, declines to help.")
    truncated: Literal["keep", "chosen", "either"] = _clean(
        "keep", "Drop pairs whose chosen answer, or either, stops in the middle: in a sentence or in a block of code.")
    languages: Annotated[list[str] | None, BeforeValidator(as_words)] = _clean(
        None, "Drop pairs with an answer that is clearly in another language than these (install simpo[clean]); "
        "`prompt` stands for the language of the prompt.", "list of two-letter codes", null="any")
    benchmarks: Annotated[dict[str, float | dict[str, Any]] | None, BeforeValidator(as_mixture)] = _clean(
        None, "Drop pairs that share `benchmark_ngram` words in a row with these benchmarks, named as dataset_mixer "
        "names datasets; all of their splits are read, all of their texts or those in `columns`.",
        "mapping of name to 1.0 or to settings", null="none")
    benchmark_ngram: Whole = _clean(
        13, "Words in a row, case and punctuation aside, that count as taken from a benchmark; of a benchmark's "
        "shorter text all words, if there are 8 (as in appendix C of arXiv:2005.14165).", ge=8)


class Generate(Stage):
    """`simpo generate`: responses to prompts."""

    prompts: Annotated[dict[str, float | dict[str, Any]] | None, BeforeValidator(as_mixture)] = _generate(
        None, "Where the prompts are: datasets, as dataset_mixer names them, whose rows may have responses or not.",
        "mapping of name to fraction > 0 or to settings", null="the train splits of dataset_mixer")
    keep_columns: Annotated[list[str] | None, BeforeValidator(as_words)] = _generate(
        None, "Columns that go along with each prompt, for scorers: a reference answer, tests.",
        "list of column names", null="none")
    max_prompts: Whole | None = _generate(
        None, "At most this many prompts, a seeded choice.", null="all", ge=1)
    backend: Literal["local", "vllm", "openai", "ray"] = _generate(
        "local", "What samples. local: this package, on the CPU or its GPUs; vllm: vLLM's engine, where it is "
        "installed; openai: a server that speaks OpenAI's protocol; ray: local or vllm over a Ray cluster.")
    num_samples: Whole = _generate(
        5, "Responses to each prompt.", ge=1)
    temperature: Number = _generate(
        0.8, "Divides the logits; 0 takes the most likely token each time, and one sample is all there is.", ge=0)
    top_p: Number = _generate(
        0.95, "Tokens are drawn from the smallest set with this share of the probability.", gt=0, le=1)
    top_k: Whole | None = _generate(
        None, "Tokens are drawn from the k most likely ones.", null="no limit", ge=1)
    min_p: Number = _generate(
        0.0, "Tokens less likely than this share of the most likely one are not drawn.", ge=0, lt=1)
    max_new_tokens: Whole = _generate(
        1024, "Longest response, in tokens; what is cut there counts as unfinished.", ge=1)
    stop: Words = _generate(
        [], "Texts that end a response besides the end of turn; they are left out of it.", "list of texts")
    seed: Whole | None = _generate(
        None, "Seed of sampling.", "whole, 0 <= x < 2^32", null="the recipe's seed", ge=0, lt=2**32)
    batch_size: Whole = _generate(
        128, "Responses computed together (local); memory for their keys and values is the limit.", ge=1)
    processes: Whole | None = _generate(
        None, "Processes that sample side by side (local, vllm, ray).",
        null="one a GPU; on a CPU one a core, as far as free memory goes", ge=1)
    tensor_parallel: Whole = _generate(
        1, "GPUs that one engine of vLLM is spread over (vllm, ray).", ge=1)
    on_ray: Literal["local", "vllm"] = _generate(
        "local", "What samples in each process of the cluster (ray).")
    url: Text | None = _generate(
        None, "The server (openai), such as http://localhost:8000/v1.", "URL", null="none")
    served_model: Text | None = _generate(
        None, "The model's name on the server (openai).", "text", null="the only one that the server lists")
    api_key_variable: Text | None = _generate(
        None, "Environment variable with the server's key (openai); the key itself is never written down.", "name",
        null="no key")
    concurrency: Whole = _generate(
        32, "Requests on their way at once (openai).", ge=1)
    timeout_s: Number = _generate(
        600, "Longest wait for an answer (openai), in seconds; then the request is repeated, 4 times.", gt=0)
    options: dict[str, JsonValue] | None = _generate(
        None, "Further settings under the names that others gave them: fields of each request (openai), arguments of "
        "vllm.LLM (vllm).", "mapping of names to values", null="none")


SERVER_KEYS = ("url", "served_model", "api_key_variable", "concurrency", "timeout_s")
"""Keys of `generate` that say which server is asked, and how."""

_score, _pair, _rounds, _judge = map(in_section, ("score", "pair", "rounds", "judge"))


class Score(Stage):
    """`simpo score`: numbers for responses."""

    input: PathText | None = _score(
        None, "File of responses.", "path", null="responses.jsonl in output_dir")
    scorers: Annotated[dict[str, dict[str, Any]] | None, BeforeValidator(as_scorers_or_null)] = _score(
        None, "What rates the responses: a name for each scorer, with its kind, its weight and its kind's options. A "
        "response's score is the weighted sum; `simpo keys score` lists the kinds.",
        "mapping of name to {kind, weight, options}", null="none, which only `simpo score` minds")
    standardize: bool = _score(
        False, "Bring each scorer's numbers to mean 0 and standard deviation 1 over the whole file before they are "
        "weighted, for scorers of different scales.")


class Pair(Stage):
    """`simpo pair`: pairs from scored responses."""

    input: PathText | None = _pair(
        None, "File of scored responses.", "path", null="scored.jsonl in output_dir")
    method: Literal["best_worst", "best_sigma", "best_random", "all", "top_bottom"] = _pair(
        "best_worst", "Which of a prompt's responses make pairs. best_worst: the highest score against the lowest; "
        "best_sigma: against the response nearest to mean - sigmas x deviation of the prompt's scores, which stays "
        "as good when many are sampled; best_random: against one drawn from those below; all: every two that differ by "
        "min_gap; top_bottom: each of the top_k best against each of the top_k worst.")
    sigmas: Number = _pair(
        2.0, "Standard deviations below the mean at which best_sigma looks for the rejected response.", ge=0)
    top_k: Whole = _pair(
        2, "Responses on each side of top_bottom; at most half of the prompt's.", ge=1)
    min_gap: Number = _pair(
        0.0, "Least difference of the two scores; equal scores never make a pair.", ge=0)
    min_score: Number | None = _pair(
        None, "Least score of a chosen response.", "any finite number", null="none")
    finished_only: bool = _pair(
        True, "Only a response that came to its end can be chosen.")
    max_pairs: Whole | None = _pair(
        None, "At most this many pairs a prompt, those with the largest gaps.", null="all", ge=1)
    length_control: Literal["none", "balance", "drop"] = _pair(
        "none", "Against learning length instead of what is scored. balance: keep as many pairs with the longer "
        "response chosen as with the shorter one, a seeded choice; drop: leave out pairs whose order length alone "
        "explains (gap <= slope x difference of lengths, the slope by least squares within all prompts).")
    test_fraction: Number = _pair(
        0.05, "Share of the prompts whose pairs are held out in test.jsonl, decided by a hash of the prompt: it stays "
        "on its side in every round and rerun.", ge=0, lt=1)
    lists: bool = _pair(
        False, "Also write all scored responses of each prompt that gives pairs, as lists, to the folder lists.")


class Rounds(Stage):
    """`simpo rounds`: generate, score, pair, train and evaluate, several times."""

    rounds: Whole = _rounds(
        2, "How many times; each round begins with the last one's model.", ge=1)
    prompts_per_round: Whole | None = _rounds(
        None, "Prompts to train on in each round, none of them in two rounds.", null="all, shared out evenly", ge=1)
    reuse_prompts: bool = _rounds(
        False, "Let every round draw from all prompts (all of them, without prompts_per_round) instead of fresh ones.")
    eval_prompts: Whole = _rounds(
        500, "Held-out prompts (pair.test_fraction) that each round's model answers, at most.", ge=1)
    eval_samples: Whole | None = _rounds(
        None, "Responses to each of them. With 1 there are no held-out pairs, and so no accuracy and margin.",
        null="generate.num_samples", ge=1)
    min_gain: Number | None = _rounds(
        None, "Stop after a round whose held-out score did not rise by more than this many standard errors of the "
        "paired difference; 0 stops where it does not rise.", null="never stop early", ge=0)
    launcher: Words = _rounds(
        [], "What starts training on several processes, such as torchrun --nproc_per_node=8.", "list of words; empty = "
        "one process")


class Judge(Stage):
    """`simpo judge`: two models' answers to the same prompts, and which are better."""

    model: PathText | None = _judge(
        None, "What is judged: a model, or a file of its answers.", "folder, hub name or file",
        null="the one trained in output_dir")
    against: PathText | None = _judge(
        None, "What it is compared with: a model, or a file of answers (of this command or `simpo generate`, of "
        "AlpacaEval or Arena-Hard).", "folder, hub name or file", null="model_name_or_path")
    prompts: Annotated[dict[str, float | dict[str, Any]] | None, BeforeValidator(as_mixture)] = _judge(
        None, "Where the prompts are: datasets, as dataset_mixer names them, whose rows may have responses or not.",
        "mapping of name to fraction > 0 or to settings", null="the held-out rows of dataset_mixer")
    max_prompts: Whole | None = _judge(
        None, "At most this many prompts, a seeded choice.", null="all", ge=1)
    temperature: Number = _judge(
        0.0, "Of the answers, one to a prompt; 0 takes the most likely token each time, as Arena-Hard does. The rest "
        "of sampling is as `generate` says.", ge=0)
    scorers: Annotated[dict[str, dict[str, Any]] | None, BeforeValidator(as_scorers_or_null)] = _judge(
        None, "What judges: scorers as score.scorers has them. One of kind judge compares both answers in both orders; "
        "of any other the higher score wins, and equal scores are a tie.",
        "mapping of name to {kind, weight, options}", null="score.scorers")
# fmt: on


STAGES: dict[str, type[Stage]] = {
    "clean": Clean,
    "generate": Generate,
    "score": Score,
    "pair": Pair,
    "rounds": Rounds,
    "judge": Judge,
}
"""Key of a recipe -> what it may hold."""

STAGE_KEYS: dict[str, Key] = {
    f"{stage}.{name}": declared_key(f"{stage}.{name}", info)
    for stage, model in STAGES.items()
    for name, info in model.model_fields.items()
}
"""Every key of every stage, by its whole name such as "generate.temperature"."""
