"""`simpo chat`: a dialogue with a model, token by token, and beside it the model that it was trained from."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from simpo.data.columns import RowError
from simpo.data.messages import Message, turn
from simpo.data.templates import NO_TEMPLATE
from simpo.model.load import pick_device, set_precision
from simpo.model.sampling import Sampling, noise_key, sample_responses, why_not_shared
from simpo.onpolicy.prompts import Prompt
from simpo.onpolicy.sampler import PromptTokenizer, ResponseReader
from simpo.recipe import load_recipe
from simpo.run.optim import set_threads
from simpo.shipping.source import Source, find_source, load_source, load_source_tokenizer
from simpo.streams import is_stdout_lost

SIDE_BY_SIDE = 100
"""Columns of a terminal from which two answers stand side by side."""
HELP = "/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
KEYS = frozenset({"generate", "system_prompt"})


class Speaker:
    """A model that answers.

    Args:
        source: what it is loaded from.
        title: what stands above its answers.
        template: a chat template for a tokenizer without one.
    Raises:
        ValueError: it cannot be loaded, or nothing would end an answer.
    """

    def __init__(self, source: Source, title: str, *, template: str | None = None) -> None:
        recipe, self.name, self.title = source.recipe, source.name, title
        self.wanted = recipe.generate
        self.turns: list[Message] = [turn("system", recipe.system_prompt)] if recipe.system_prompt else []
        self.seed = recipe.seed if self.wanted.seed is None else self.wanted.seed
        device = pick_device(recipe.device)
        self.slow = set_precision(recipe, device)
        dtype = torch.bfloat16 if recipe.bf16 else torch.float32
        self.tokenizer = load_source_tokenizer(source)
        if self.tokenizer.chat_template is None and recipe.chat_template is None and template is not None:
            recipe = load_recipe(recipe, {"chat_template": template})
        self.tokenize = PromptTokenizer(recipe, self.tokenizer)
        self.model = load_source(source, device=device, dtype=dtype)
        config = getattr(self.model, "generation_config", None)
        self.read = ResponseReader(recipe, self.tokenizer, config)
        self.shares = why_not_shared(self.model) is None
        self.limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr]

    def answer(self, show: Callable[[str], None]) -> None:
        """Answer the dialogue's last turn, and take the answer, or what there was of it before Ctrl-C, into it.

        Args:
            show: called with the answer so far after each token.
        Raises:
            ValueError: the template refuses the dialogue, or there is no room for an answer.
        """
        ids = self._prompt()
        room = math.inf if self.limit is None else self.limit - len(ids)
        if room < 1:
            raise ValueError(
                f"{self.name}: the dialogue has {len(ids)} tokens, and the model takes {self.limit}; /reset begins anew"
            )
        tokens: list[int] = []

        def each(so_far: list[int]) -> bool:
            tokens[:] = so_far
            stopped = bool(self.read.stops) and self.read.is_stopped(so_far)
            if not stopped:
                show(self._text(tokens))
            return stopped

        wanted, text = self.wanted, None
        try:
            (found,) = sample_responses(
                self.model,
                [ids],
                [[noise_key(self.seed, len(self.turns), *ids)]],
                Sampling(wanted.temperature, wanted.top_p, wanted.top_k, wanted.min_p),
                ends=self.read.ends,
                max_new_tokens=int(min(wanted.max_new_tokens, room)),
                is_stopped=each,
                shared=self.shares,
            )
            responses = self.read(found)
            if isinstance(responses, RowError):
                raise ValueError(f"{self.name}: {responses.detail}")
            text = responses[0].text.lstrip()
        finally:
            text = self._text(tokens) if text is None else text
            show(text)
            self.turns.append(turn("assistant", text.strip()))

    def _prompt(self) -> list[int]:
        (found,) = self.tokenize([Prompt("chat", "the dialogue", self.turns)])
        if isinstance(found, RowError):
            raise ValueError(f"{self.name}: {found.detail}")
        return found

    def _text(self, ids: Sequence[int]) -> str:
        """Without half a character at the end."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\N{REPLACEMENT CHARACTER}").lstrip()


def run_chat(name: str, overrides: Sequence[str] = (), *, compare: str | None = None) -> None:
    """Read turns from stdin and answer them until it ends.

    Args:
        name: a run, a checkpoint, a model's or adapter's folder, or a hub name.
        overrides: recipe keys; those of `generate` say how to sample.
        compare: another model, which answers first; "" = the one that it was trained from. Both are asked alike, as
            the recipe of the run says.
    """
    source = find_source(name, overrides, keys=KEYS)
    set_threads(source.recipe.num_threads)
    other = None
    if compare is not None:
        if not compare and source.folder is not None and source.base in (source.folder, source.name):
            raise ValueError(f"--compare: what {name} was trained from is not known here; name it: --compare MODEL")
        try:
            other = find_source(compare or source.base, overrides, keys=KEYS)
        except ValueError as error:
            if compare:
                raise
            raise ValueError(
                f"--compare: {name} was trained from {source.base}, which is not found from here ({error}); go to the "
                "folder that it was trained in, or name it: --compare MODEL"
            ) from error
        if not compare:  # as training had it
            keys = ("model_revision", "trust_remote_code")
            known = {key: getattr(source.recipe, key) for key in keys}
            known["tokenizer_name_or_path"] = other.recipe.tokenizer_name_or_path or source.base_tokenizer
            other = replace(other, recipe=other.recipe.model_copy(update=known))
        if source.run is None:
            source = _asked_like(source, other)
        else:
            other = _asked_like(other, source)
    trained = Speaker(source, name if other is not None else "")
    speakers = [trained]
    if other is not None:
        own = trained.tokenizer.chat_template
        template = own if isinstance(own, str) and source.recipe.chat_template != NO_TEMPLATE else None
        speakers = [Speaker(other, other.name, template=template), trained]
    Chat(speakers).run()


def _asked_like(source: Source, other: Source) -> Source:
    """With the precision and sampling of another; a run's model keeps the system prompt that it was trained with."""
    keys = ("bf16", "generate", *(("system_prompt",) if source.run is None else ()))
    return replace(source, recipe=source.recipe.model_copy(update={key: getattr(other.recipe, key) for key in keys}))


@dataclass
class Chat:
    """The dialogue loop: on a terminal with a prompt, elsewhere a line of stdin a turn."""

    speakers: list[Speaker]
    out: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))

    def run(self) -> None:
        """Until stdin ends, nobody reads the answers any more, /quit, or Ctrl-C where nothing is being answered."""
        self.talks = sys.stdin.isatty()
        if self.talks:
            self.out.print(Text(HELP, style="dim"))
        for slow in {speaker.slow for speaker in self.speakers if speaker.slow}:
            self._note(slow)
        for said in self._lines():
            if said == "/quit" or is_stdout_lost():
                return
            if said == "/reset":
                for speaker in self.speakers:
                    speaker.turns = [message for message in speaker.turns if message["role"] == "system"]
                self._note("the dialogue begins anew")
            elif said.startswith("/") and " " not in said:
                self._note(f"{said} is not known; {HELP}")
            elif said:
                self._answer(said)

    def _lines(self) -> Iterator[str]:
        if not self.talks:
            yield from (line.strip() for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):  # on Windows
            import readline  # noqa: F401  it gives input() its history and keys
        while True:
            try:
                said = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.out.print()
                return
            yield said

    def _note(self, text: str) -> None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style="yellow"))

    def _answer(self, said: str) -> None:
        wide = len(self.speakers) > 1 and self.out.is_terminal and self.out.width >= SIDE_BY_SIDE
        for speaker in self.speakers:
            speaker.turns.append(turn("user", said))
        if wide:
            self._side_by_side()
        else:
            self._one_by_one()

    def _let(self, speaker: Speaker, show: Callable[[str], None]) -> str:
        """Have it answer; what to say of it: on a terminal Ctrl-C ends the answer, and a turn that fails is undone."""
        count = len(speaker.turns)
        try:
            speaker.answer(show)
        except (KeyboardInterrupt, ValueError) as error:
            if not self.talks:
                raise
            if len(speaker.turns) == count:
                speaker.turns.pop()
            return "(stopped)" if isinstance(error, KeyboardInterrupt) else str(error)
        return ""

    def _one_by_one(self) -> None:
        for speaker in self.speakers:
            if speaker.title:
                self.out.print(Text(f"[{speaker.title}]", style="bold"))
            show = _Stream(self.out)
            note = self._let(speaker, show)
            show.finish()
            if note:
                self._note(note)
            elif not self.talks or speaker is not self.speakers[-1]:
                self.out.print()

    def _side_by_side(self) -> None:
        texts, notes = ["" for _ in self.speakers], []

        def table() -> Table:
            grid = Table.grid(padding=(0, 2), expand=True)
            for _ in self.speakers:
                grid.add_column(ratio=1)
            grid.add_row(*(Text(speaker.title, style="bold") for speaker in self.speakers))
            grid.add_row(*(Text(text) for text in texts))
            return grid

        with Live(table(), console=self.out, auto_refresh=False) as live:
            for place, speaker in enumerate(self.speakers):

                def show(text: str, place: int = place) -> None:
                    texts[place] = _printable(text)
                    live.update(table(), refresh=True)

                notes.append(self._let(speaker, show))
        for note in filter(None, notes):
            self._note(note)


class _Stream:
    """Prints what is new of a growing text; on a terminal it breaks lines between words.

    Args:
        out: where to.
    """

    def __init__(self, out: Console) -> None:
        self.out, self.text, self.whole, self.column = out, "", "", 0
        self.width = out.width if out.is_terminal else None

    def __call__(self, text: str) -> None:
        text = self.whole = text if self.width is None else _printable(text)
        if self.width is not None:  # the last word may grow yet
            text = text[: len(text) - len(text.split(" ")[-1].split("\n")[-1])]
        self._put(text)

    def _put(self, text: str) -> None:
        if not text.startswith(self.text):  # a stop text was cut off
            return
        new, self.text = text[len(self.text) :], text
        # A line may break between words, each with the blanks behind it.
        for piece in re.findall(r"\n|[^ \n]+ *| +", new) if self.width is not None else [new]:
            self._place(piece)
        self.out.file.flush()

    def _place(self, piece: str) -> None:
        size = Text(piece.rstrip()).cell_len
        if self.width is not None and piece != "\n" and self.column > 0 and self.column + size > self.width - 1:
            self.out.file.write("\n")
            self.column = 0
        self.out.file.write(piece)
        self.column = 0 if piece.endswith("\n") else self.column + Text(piece).cell_len

    def finish(self) -> None:
        """What is left, and the end of the line."""
        self._put(self.whole)
        self.out.file.write("\n")
        self.out.file.flush()


def _printable(text: str) -> str:
    """Without what would steer the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())


def parse_compare(words: Sequence[str], wanted: bool) -> tuple[str | None, list[str]]:
    """The model behind `--compare`, if it is named there, and the other words of a command line."""
    alone, rest, follows = [], [], False
    for word in words:
        if word.startswith("--"):
            follows = "=" not in word
            rest.append(word)
        elif follows or "=" in word:
            rest.append(word)
            follows = False
        else:
            alone.append(word)
    if len(alone) > (1 if wanted else 0):
        raise ValueError(f"{alone[-1]!r}: not an option; one model is given, and one more behind --compare")
    return (alone[0] if alone else "") if wanted else None, rest
