"""The kinds of scorers: what one may say under `score.scorers.NAME` beside its kind.

Each kind is declared once, here, as the recipe's own keys are; `simpo.onpolicy.scorers` has what computes it, under the
same name. Must not import torch, transformers or datasets.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from simpo.errors import short
from simpo.recipe.declare import Key, declared_key, describe_wrong, in_section
from simpo.recipe.values import Number, PathText, Text, Whole, as_settings, as_text, as_words

_option = in_section("score")


def _as_function(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.]+:\w+", value):
        raise ValueError("the form is module:function")
    return value


def _as_formats(value: Any) -> Any:
    words = as_words(value)
    if not words or (unknown := [word for word in words if word not in FORMATS]):
        raise ValueError(f"{short(unknown[0]) if words else 'an empty list'} is not among {', '.join(FORMATS)}")
    return words


FORMATS = ("json", "code_block", "heading", "list", "table", "plain", "ends")
"""What a response may have, for `format`."""


# fmt: off
class Scorer(BaseModel):
    """What every scorer may say."""

    # Built when first used: reading recipes without scorers need not wait for it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), defer_build=True)

    weight: Number = _option(
        1.0, "What its numbers count in the score; below 0 where more is worse.", may_change=True)


class Function(Scorer):
    """A Python function: f(prompt, response, row) -> number, or f(prompt, responses, row) -> one for each."""

    function: Annotated[str, BeforeValidator(_as_function)] = _option(
        ..., "The function; its module is looked for in the working directory, then among the installed ones. It gets "
        "the messages of the prompt, the response as text and the whole row. One whose second parameter is called "
        "responses gets all texts of the prompt at once.", "module:function")
    options: Annotated[dict[str, Any], BeforeValidator(as_settings)] = _option(
        {}, "Keyword arguments for it.", "mapping")


class Length(Scorer):
    """Closeness of the length to a range: 1 within it, less in proportion outside; the length itself without one."""

    unit: Literal["words", "characters", "tokens"] = _option(
        "words", "What is counted. Words are letters and digits in a row, and each letter of scripts without blanks; "
        "tokens are those that generate counted.")
    min: Whole | None = _option(
        None, "Shortest length that scores 1.", null="no lower end", ge=1)
    max: Whole | None = _option(
        None, "Longest length that scores 1.", null="no upper end", ge=1)

    @model_validator(mode="after")
    def _is_range(self) -> Length:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class Repetition(Scorer):
    """Freedom from repetition: 1 less the share of runs of four words that have occurred in the response before."""


class Language(Scorer):
    """How surely the response is in a language, by py3langid: 0 in another one, 0.5 where it is too short to tell."""

    languages: Annotated[list[str] | None, BeforeValidator(as_words)] = _option(
        None, "Codes such as en or zh; any of them will do.", "list of ISO 639-1 codes",
        null="the language of the prompt's last turn")


class Format(Scorer):
    """Share of the named forms that the response has."""

    has: Annotated[list[str], BeforeValidator(_as_formats)] = _option(
        ..., "json: the response, or its only code block, is JSON; code_block, heading, list, table: it has one, in "
        "Markdown; plain: it has none of these; ends: it does not stop in the middle of a sentence or a code block.",
        "list of " + ", ".join(FORMATS))


class Regex(Scorer):
    """1 where a regular expression matches anywhere in the response, else 0."""

    pattern: Text = _option(
        ..., "In the syntax of the package regex, which Python's is part of; (?i) in front ignores case.",
        "regular expression")

    @model_validator(mode="after")
    def _compiles(self) -> Regex:
        import regex

        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern = {short(self.pattern)}: {error}") from None
        return self


class Math(Scorer):
    r"""1 where the response's final answer is the reference's, else 0.

    The answer is the last \boxed{}, else what follows the last ####, else the last "answer is" or "Answer:", else the
    last number.
    """

    reference: Text = _option(
        "answer", "Column with the reference answer, or a solution that ends with it; name it in generate.keep_columns "
        "too.", "name of a column")
    compare: Literal["exact", "symbolic"] = _option(
        "exact", "exact: equal numbers, or equal text once spacing and LaTeX's ornaments are gone; symbolic: equal "
        "expressions, by math-verify.")

class Code(Scorer):
    """1 where the response's Python passes its tests, else 0; it runs apart, without network, files and processes."""

    tests: Text = _option(
        "tests", "Column with the tests, a text or a list of texts: Python that raises where the code is wrong, as "
        "assert does. What HumanEval's check(candidate) is called with is read from the column entry_point. Name both "
        "in generate.keep_columns too.", "name of a column")
    prelude: Text | None = _option(
        None, "Column with code that runs first, a text or a list of texts: imports, the function's beginning where "
        "responses continue it; name it in generate.keep_columns too.", "name of a column", null="none")
    timeout_s: Number = _option(
        10.0, "Seconds that code and tests may take, by the clock and of the processor.", gt=0)
    memory_mib: Whole = _option(
        1024, "MiB that their process may have.", ge=32)
    unsafe: bool = _option(
        False, "Run them too where this machine cannot keep them from the network and from your files.")

class RewardModel(Scorer):
    """The score of a reward model, by transformers' sequence classification."""

    model: PathText = _option(
        ..., "Folder or hub name.", "path or name")
    revision: Text | None = _option(
        None, "Branch, tag or commit on the hub.", "text", null="main")
    trust_remote_code: bool = _option(
        False, "Run the code that comes with the model.")
    chat_template: PathText | None = _option(
        None, "Template for its dialogues.", "chatml, Jinja text or a file that holds it", null="the model's own")
    output: Text | None = _option(
        None, "Which of the model's outputs is the score.", "name of an output",
        null="score where it has that (as ArmoRM), else logits")
    index: Whole | None = _option(
        None, "Which entry of that output, counted from 0, where a response has several.", null="there is one", ge=0)
    dtype: Literal["bfloat16", "float32"] = _option(
        "bfloat16", "What it computes in.")
    max_length: Whole | None = _option(
        None, "Most tokens of a dialogue; a row that has a longer one is left out, never cut.",
        null="the model's own limit", ge=1)
    batch_tokens: Whole = _option(
        16384, "Tokens in one forward pass, padding included.", ge=1, may_change=True)
    processes: Whole | None = _option(
        None, "Processes that score side by side.", null="one a GPU; one on a CPU", ge=1, may_change=True)


class Logprob(Scorer):
    """Mean log-prob of the response, in nats per token, its end of turn included."""

    model: PathText | None = _option(
        None, "Folder or hub name of the model that says it, computed as in training.", "path or name",
        null="the model that sampled the response, as generate wrote it down")
    processes: Whole | None = _option(
        None, "Processes that score side by side.", null="one a GPU; one on a CPU", ge=1, may_change=True)


class Judge(Scorer):
    """A language model behind a server of OpenAI's protocol: its grade, or its mean verdict in comparisons."""

    url: Text = _option(
        ..., "The server, such as http://localhost:8000/v1.", "URL", may_change=True)
    model: Text = _option(
        ..., "The model's name there.", "text")
    form: Literal["pairs", "reference", "grade"] = _option(
        "pairs", "pairs: each response against each other one of its prompt, in both orders, 0 to 1; reference: "
        "against the reference answer, in both orders, 0 to 1; grade: each by itself, 1 to 10.")
    reference: Text = _option(
        "answer", "Column with the reference answer (reference); name it in generate.keep_columns too.",
        "name of a column")
    template: PathText | None = _option(
        None, "File with the question, with {prompt} and {response} (grade), or {prompt}, {first} and {second}. It "
        "must ask for a line 'Grade: N', or 'Verdict: 1', 'Verdict: 2' or 'Verdict: tie'; the last such line counts.",
        "path", null="one that comes with simpo", may_change=True)
    temperature: Number = _option(
        0.0, "Of the judge.", ge=0)
    max_tokens: Whole = _option(
        1024, "Longest answer of the judge.", ge=1)
    keep_answers: bool = _option(
        False, "Keep what the judge says, beside its numbers.", may_change=True)
    api_key_variable: Text | None = _option(
        None, "Environment variable with the server's key; the key itself is never written down.", "name",
        null="no key", may_change=True)
    concurrency: Whole = _option(
        32, "Requests on their way at once.", ge=1, may_change=True)
    timeout_s: Number = _option(
        600.0, "Longest wait for an answer, in seconds; then the request is repeated, 4 times.", gt=0, may_change=True)
# fmt: on


SCORERS: dict[str, type[Scorer]] = {
    "function": Function,
    "reward_model": RewardModel,
    "logprob": Logprob,
    "judge": Judge,
    "length": Length,
    "repetition": Repetition,
    "language": Language,
    "format": Format,
    "regex": Regex,
    "math": Math,
    "code": Code,
}
"""Kind -> its options."""

SCORER_KEYS: dict[str, list[Key]] = {
    kind: [
        declared_key(f"score.scorers.NAME.{name}", info)
        for name, info in sorted(model.model_fields.items(), key=lambda item: item[0] == "weight")
    ]
    for kind, model in SCORERS.items()
}
"""Kind -> the documentation of its options."""


def read_scorer(spec: Mapping[str, Any]) -> tuple[str, Scorer]:
    """Kind and options of a scorer as the recipe has it.

    Raises:
        ValueError: no such kind, or which option is wrong and what is allowed.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    if kind is None:
        raise ValueError(f"kind is missing; it is one of {', '.join(SCORERS)}")
    if not isinstance(kind, str) or kind not in SCORERS:
        near = difflib.get_close_matches(str(kind), SCORERS, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"kind = {short(kind)}: there are {', '.join(SCORERS)}{hint}")
    try:
        return kind, SCORERS[kind](**{str(name): value for name, value in options.items()})
    except ValidationError as error:
        raise ValueError(_explain(kind, error.errors(include_url=False)[0])) from None


def _explain(kind: str, found: Any) -> str:
    if not found["loc"]:
        return str(found["ctx"]["error"])
    name = str(found["loc"][0])
    known = {key.name.rpartition(".")[2]: key for key in SCORER_KEYS[kind]}
    if name not in known:
        return f"{short(name)} is not an option of kind {kind}, which has {', '.join(known)}"
    if found["type"] == "missing":
        return f"{name} is missing: {known[name].meaning}"
    return describe_wrong(name, found, known[name].allowed)


def as_scorers_or_null(value: Any) -> Any:
    """{name: {kind, weight, options}}, each checked; what is null in an option stays out."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise ValueError("a mapping of names to scorers, each with its kind, is needed")
    scorers = {}
    for name, spec in value.items():
        if not re.fullmatch(r"[\w.-]{1,64}", as_text(name)):
            raise ValueError(f"{short(name)}: a name has letters, digits, _, - and . only")
        if not isinstance(spec, Mapping):
            raise ValueError(f"{name}: {short(spec)} is not a mapping with its kind")
        try:
            read_scorer(spec)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        scorers[name] = dict(spec)
    return scorers
