"""Texts that no two ways of cutting words treat alike, and vocabularies that show where they were cut.

All are in composed form (NFC): on others llama.cpp departs from Qwen's own tokenizer.
"""
# ruff: noqa: RUF001 (letters that look like others are the point)

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n  \n",
    "\t tabs\tand  spaces ",
    " leading and trailing   ",
    "Hello, world! It's 2024; they're here, I'LL go, DON'T.",
    "1 12 123 1234 12345 1234567890 3.14159 0x1F 1,000,000",
    "CamelCase snake_case UPPER lower MiXeD iPhone15Pro",
    'http://example.org/a/b?c=d&e=f#g <tag attr="x">&amp;</tag>',
    "def f(x):\n    return x**2 + 3  # done\n\n\nclass A:\r\n\tpass\r\n",
    "((([[[{{{}}}]]])))!!!???...---===>>><<<$$$^^^~~~|||```",
    "naïve café résumé Über straße Łódź",
    "Привет, мир! γειά σου Κόσμε",
    "你好，世界。こんにちは世界 안녕하세요 세계",
    "مرحبا بالعالم שלום हिन्दी สวัสดี",
    "١٢٣٤ १२३ Ⅷ ½² ①②",
    "\U0001f600\U0001f601 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469 \U0001f1eb\U0001f1f7!",
    "\u2028line\u2029para\u00a0nbsp\u2003em\u200bzero\ufeffbom\u3000wide",
    "<s>special</s> <unk> tokens</s></s> in text",
    "\u0001\u0007\u001b[0m control \u007f\u0085",
    "'s 't 're 'S 'Ll x's X'S y''S \u2019s n't",
    "a" * 40 + " " * 20 + "b" * 17 + "\n" * 9,
    "x" + "\u0301" * 3 + " q\u0323\u0307",  # marks on letters that Unicode has not composed
]

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> dict[str, Any]:
    """A tokenizer.json of GPT-2's kind, its merges learned across words so that every cut shows."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _trained(made, 900, SPECIAL, pre_tokenizers.ByteLevel.alphabet())


def sentence_piece() -> dict[str, Any]:
    """A tokenizer.json of Llama 2's kind."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    # The rarest characters stay out, so that bytes are needed.
    return _trained(made, 620, SPECIAL + BYTES, [])


def _trained(made: Tokenizer, size: int, first: list[str], alphabet: list[str]) -> dict[str, Any]:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet) or 150,
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    described: dict[str, Any] = json.loads(made.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in SPECIAL]
    return described
