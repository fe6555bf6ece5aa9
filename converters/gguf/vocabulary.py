"""The vocabulary of a GGUF file as a tokenizer.json.

Two kinds are read: "gpt2", byte-level BPE with its merges, and "llama", the pieces and scores of a
SentencePiece model, whose merges follow from the scores.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from edgert.converters.gguf.pretokenizers import PRE_TOKENIZERS
from edgert.converters.gguf.reader import GgufFile
from edgert.converters.hf_config import HfConfig, shown
from edgert.converters.tokenizer_json import (
    Description,
    Kind,
    added_tokens,
    check_unique,
    encoded,
    sentence_piece,
    template,
)
from edgert.errors import ConversionError, UnsupportedError

# Tokens that end a text whatever the file calls them: a file names one, chat models have several.
ENDINGS: Final = frozenset(
    {
        "</s>",
        "<EOT>",
        "<end_of_turn>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|im_end|>",
    }
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a file says about its tokens."""

    tokenizer_json: bytes
    eos_ids: tuple[int, ...]
    bos_token: str | None
    eos_token: str | None


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The tokenizer of a GGUF file.

    Raises UnsupportedError for a kind whose tokens edgert cannot be certain of, ConversionError for
    a vocabulary that is missing, damaged or contradicts itself.
    """
    keys = HfConfig(file.metadata, str(file.path))
    tokens = _tokens(keys)
    kinds = _numbers(keys, "token_type", len(tokens), Kind.NORMAL)
    named = {name: _id(keys, name, len(tokens)) for name in ("bos", "eos", "eot", "eom")}
    special = {i for i in named.values() if i is not None}
    model = keys.text("tokenizer.ggml.model")
    if model == "gpt2":
        description = _byte_level(keys, tokens, kinds)
    elif model == "llama":
        description = _sentence_piece(keys, tokens, kinds)
    else:
        raise UnsupportedError(
            f"{file.path}: found tokenizer.ggml.model {shown(model)}, expected gpt2 or llama; "
            "convert the Hugging Face folder of this model"
        )
    description["added_tokens"] = list(added_tokens(tokens, kinds, special))
    description["post_processor"] = template(tokens, *_around(keys, named, model))
    endings = [i for i, token in enumerate(tokens) if token in ENDINGS and kinds[i] == Kind.CONTROL]
    ends = [i for i in (named["eos"], named["eot"], named["eom"], *endings) if i is not None]
    return Vocabulary(
        tokenizer_json=encoded(description, keys.where),
        eos_ids=tuple(dict.fromkeys(ends)),
        bos_token=None if named["bos"] is None else tokens[named["bos"]],
        eos_token=None if named["eos"] is None else tokens[named["eos"]],
    )


def _tokens(keys: HfConfig) -> list[str]:
    tokens = keys.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise ConversionError(
            f"{keys.where}: found no tokenizer.ggml.tokens, expected a vocabulary; "
            "convert a file that holds a whole model"
        )
    named = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp calls them
    check_unique(named, keys.where)
    return named


def _numbers(keys: HfConfig, name: str, count: int, default: float | None = None) -> list[Any]:
    """An array with one number per token."""
    key = f"tokenizer.ggml.{name}"
    values = keys.values.get(key)
    if values is None and default is not None:
        return [default] * count
    if not isinstance(values, np.ndarray) or len(values) != count or values.dtype == np.bool_:
        found = f"{len(values)} values" if isinstance(values, np.ndarray) else shown(values)
        raise ConversionError(
            f"{keys.where}: found {found} for {key}, expected {count} numbers; download the file again"
        )
    numbers: list[Any] = values.tolist()
    return numbers


def _id(keys: HfConfig, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if not keys.has(key):
        return None
    value = keys.integer(key, least=0)
    if value >= count:
        raise ConversionError(
            f"{keys.where}: found {key} {value}, expected an id below {count}; download the file again"
        )
    return value


def _vocab(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Ids by token, without those that llama.cpp's converter made up to fill the vocabulary."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if not (kind == Kind.UNUSED and token == f"[PAD{i}]")
    }


def _byte_level(keys: HfConfig, tokens: list[str], kinds: list[int]) -> Description:
    """GPT-2's kind: a text's bytes as characters, merged in the order of a list."""
    name = keys.text("tokenizer.ggml.pre", "")
    rule = PRE_TOKENIZERS.get(name)
    if rule is None:
        raise UnsupportedError(
            f"{keys.where}: found tokenizer.ggml.pre {shown(name)}, expected one of "
            f"{', '.join(PRE_TOKENIZERS)}; convert the Hugging Face folder of this model"
        )
    merges = []
    for merge in keys.texts("tokenizer.ggml.merges"):
        cut = merge.find(" ", 1)  # behind the first character, which may be a space
        if cut < 0 or cut + 1 == len(merge):
            raise ConversionError(
                f"{keys.where}: found merge {shown(merge)}, expected two tokens and a space between them; "
                "download the file again"
            )
        merges.append([merge[:cut], merge[cut + 1 :]])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if rule.composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rule.steps()},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": rule.whole_words,
            "vocab": _vocab(tokens, kinds),
            "merges": merges,
        },
    }


def _sentence_piece(keys: HfConfig, tokens: list[str], kinds: list[int]) -> Description:
    """Llama 2's kind: the pieces of a SentencePiece model and their scores."""
    scores = _numbers(keys, "scores", len(tokens))
    prefix = keys.flag("tokenizer.ggml.add_space_prefix", True)
    return sentence_piece(_vocab(tokens, kinds), kinds, scores, keys.where, prefix=prefix)


def _around(keys: HfConfig, named: dict[str, int | None], model: str) -> tuple[int | None, int | None]:
    """The ids of BOS and EOS where the file wants them with every text."""
    adds_bos = model == "llama" or PRE_TOKENIZERS[keys.text("tokenizer.ggml.pre")].adds_bos
    bos = keys.flag("tokenizer.ggml.add_bos_token", adds_bos)
    eos = keys.flag("tokenizer.ggml.add_eos_token", False)
    return named["bos"] if bos else None, named["eos"] if eos else None
