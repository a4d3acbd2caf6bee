"""Small byte-level BPE tokenizers, trained on the spot, with the chat templates met in the wild."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from simpo.data.preferences import Pair, RowError
from simpo.data.tokenize import PairTokenizer, TokenizedPair

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}"
    "{% endif %}{% endfor %}"
)
# Asks for "<think>" when generating, but renders a finished answer without it.
THINKING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}{% else %}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# Writes an empty thinking block in front of the last answer.
EMPTY_THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' and '</think>' not in message['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Plain words, no special token anywhere: nothing in it ends a turn.
WORDS_ONLY = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Writes the number of turns in front: the prompt's text depends on whether the answer is there.
COUNTING = (
    "{{ messages | length }} turns\n{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)

# Renders tools, their results and calls; reasoning after the last question, and none before it.
AGENT = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% set last = namespace(user=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message.content %}{% set thought = message.reasoning_content %}"
    "{% if not thought and message.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if thought and loop.index0 > last.user %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}{% for call in message.tool_calls or [] %}{{ '\n<call>' + call.function.name + ' ' }}"
    "{{ call.function.arguments | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As many a template: content alone, of which only what stands after a thought is kept when it is not the last turn.
CUTS_EVERY_THOUGHT = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
# Asks without thinking: an empty thought stands at the end of the header and before the last answer.
EMPTY_HEADER = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
# The system turn stands with the last turn, if that is a question; thoughts have other marks.
SYSTEM_WHEN_ASKED = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}{% else %}"
    "{{ ' ' + message['content'].split('[/THINK]')[-1] + eos_token }}{% endif %}{% endfor %}"
)
# A turn of calls ends with a mark of its own, behind which the result follows.
CALLS_WAIT = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ message.content + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content }}{% for call in message.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}{% endfor %}"
    "{{ '<|wait|>' if message.tool_calls else '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The name of the thought is another one, and so are the marks around it; arguments are joined as text.
CHANNELS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role }}{% if message.thinking %}"
    "{{ ' to itself\n' + message.thinking + '<|end|>' }}{% endif %}{{ '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '\n' + call.function.name + ' ' + call.function.arguments }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)

# Line ends go with the punctuation before them, in one token.
GPT4_SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

KINDS: dict[str, dict[str, Any]] = {
    "chatml": {"template": CHATML, "eos": "<|im_end|>", "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]},
    "smollm": {
        "template": CHATML_DEFAULT_SYSTEM,
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    },
    "llama3": {
        "template": LLAMA3,
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "special": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "adds_bos": True,
    },
    "gemma": {
        "template": GEMMA,
        "bos": "<bos>",
        "eos": "<eos>",
        "special": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "adds_bos": True,
    },
    "mistral": {"template": MISTRAL, "bos": "<s>", "eos": "</s>", "special": ["<s>", "</s>"], "adds_bos": True},
    "thinking": {
        "template": THINKING,
        "bos": "<s>",
        "eos": "</s>",
        "special": ["<s>", "</s>", "<|user|>", "<|assistant|>"],
    },
    "empty_thinking": {"template": EMPTY_THINKING, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|im_end|>"]},
    "agent": {"template": AGENT, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|im_end|>"]},
    "cuts": {"template": CUTS_EVERY_THOUGHT, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|im_end|>"]},
    "channels": {"template": CHANNELS, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|im_end|>", "<|end|>"]},
    "empty_header": {"template": EMPTY_HEADER, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|im_end|>"]},
    "asked": {"template": SYSTEM_WHEN_ASKED, "bos": "<s>", "eos": "</s>", "special": ["<s>", "</s>"]},
    "wait": {"template": CALLS_WAIT, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|im_end|>", "<|wait|>"]},
    "counting": {"template": COUNTING, "eos": "<|im_end|>", "special": ["<|im_start|>", "<|im_end|>"]},
    "words": {"template": WORDS_ONLY, "eos": "<|end|>", "special": ["<|end|>"]},
    "plain": {"template": None, "eos": "<|end|>", "special": ["<|end|>"]},
    "plain_gpt4": {"template": None, "eos": "<|end|>", "special": ["<|end|>"], "split": GPT4_SPLIT},
    "plain_bos": {"template": None, "bos": "<s>", "eos": "</s>", "special": ["<s>", "</s>"], "adds_bos": True},
    "no_eos": {"template": None, "eos": None, "special": ["<|pad|>"]},
}

_TEXT = (
    "The river runs slow and the water is green. Which river? A question has a short answer: yes, no, perhaps. "
    "def f(x):\n    return x + 1\n\nThe answer is  42.\n\n\nHello world, hello there! assistant user system: "
    "Done.\n\nNext.\n\nLast.\n\n"
    "Write a poem about the sea, please. I cannot; it is too long.\n"
)


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: Any, **limits: Any) -> list[TokenizedPair | RowError]:
    """What the data layer makes of pairs; `limits` are `PairTokenizer`'s."""
    limits.setdefault("chat_template", None if tokenizer.chat_template else "none")
    return PairTokenizer(tokenizer, **limits)(pairs)


def tokenize_pair(pair: Pair, tokenizer: Any, **limits: Any) -> TokenizedPair:
    """The same of one pair; its RowError is raised."""
    (result,) = tokenize_pairs([pair], tokenizer, **limits)
    if isinstance(result, RowError):
        raise result
    return result


@cache
def build_tokenizer(kind: str) -> Any:
    """The tokenizer called `kind`; its vocabulary has about 500 tokens and covers every byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    settings = KINDS[kind]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if "split" in settings:
        pattern = Regex(settings["split"])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=settings["special"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT] * 3, trainer)
    byte_level = processors.ByteLevel(trim_offsets=True)  # as many released tokenizers: offsets without blanks
    bos = settings.get("bos")
    if settings.get("adds_bos"):
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        backend.post_processor = processors.Sequence([byte_level, template])
    else:
        backend.post_processor = byte_level
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=settings["eos"],
        pad_token=settings["special"][0],
        additional_special_tokens=settings["special"],
    )
    tokenizer.chat_template = settings["template"]
    return tokenizer


def trained_texts(tokens: TokenizedPair, tokenizer: Any) -> list[list[str]]:
    """The trained stretches of chosen and of rejected, decoded."""
    sides = []
    for side in ("chosen", "rejected"):
        ids = getattr(tokens, f"{side}_ids")
        edges = [getattr(tokens, f"{side}_start"), *getattr(tokens, f"{side}_gaps"), len(ids)]
        sides.append([tokenizer.decode(ids[begin:end]) for begin, end in zip(edges[::2], edges[1::2], strict=True)])
    return sides
