"""Whether a tokenizer fits the embedding of the model it is for, as far as their files say; reads JSON alone.

Must not import torch, transformers or datasets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpo.recipe import Recipe


def check_vocabulary(recipe: Recipe) -> str | None:
    """A line about tokens of the recipe's tokenizer that its model has no embedding for; None = none are to be seen.

    Raises:
        ValueError: every pair would need one: the chat template holds it, or it ends or pads a text; or a file that is
            not JSON.
    """
    model = Path(recipe.model_name_or_path)
    folder = Path(recipe.tokenizer_name_or_path or model)
    config, tokenizer = _read(model / "config.json"), _read(folder / "tokenizer.json")
    rows = {**config, **config.get("text_config", {})}.get("vocab_size")
    ids = _token_ids(tokenizer)
    beyond = {token: number for token, number in ids.items() if rows is not None and number >= rows}
    if not beyond:
        return None
    settings = _read(folder / "tokenizer_config.json")
    template = recipe.chat_template
    if not (template and "{" in template):  # no text, but a file's name, a template's, or none
        file = Path(template or folder / "chat_template.jinja")
        if file.is_file():
            template = file.read_text(encoding="utf-8", errors="replace")
        else:
            template = template or settings.get("chat_template")
    ends = [settings.get(f"{name}_token") for name in ("eos", "pad", "bos")]
    needed = [end["content"] if isinstance(end, dict) else end for end in ends]
    token = next((token for token in beyond if token in needed or token in str(template)), None)
    numbers = f"the tokenizer has ids up to {max(ids.values())}, and the model's embedding {rows} rows"
    if token is None:
        return f"vocabulary: {numbers}; data that holds such a token is refused"
    raise ValueError(
        f"vocabulary: {numbers}: there is none for {token!r} ({beyond[token]}), which the template or the end of a "
        "text needs; give the model's own tokenizer (tokenizer_name_or_path), or resize the model's embedding to it"
    )


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocab = tokenizer.get("model", {}).get("vocab", {})
    named = vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
    return {**named, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}}


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); load the model's folder anew") from error
