"""The vocabulary of a GGUF file as a tokenizer.json.

Two kinds are read: "gpt2", byte-level BPE with its merges, and "llama", the pieces and scores of a
SentencePiece model, whose merges follow from the scores.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np

from edgert.converters.gguf.pretokenizers import PRE_TOKENIZERS
from edgert.converters.gguf.reader import GgufFile
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import ConversionError, FormatError, UnsupportedError
from edgert.tokenizer import Tokenizer

SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
# SentencePiece makes pieces of 16 characters; runs of spaces get to 128. Every place to cut a piece
# is tried, so without a limit a hostile one would take time quadratic in its length.
MAX_PIECE: Final = 256

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


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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
    description["added_tokens"] = list(_added(tokens, kinds, special))
    description["post_processor"] = _template(keys, tokens, named, model)
    endings = [i for i, token in enumerate(tokens) if token in ENDINGS and kinds[i] == Kind.CONTROL]
    ends = [i for i in (named["eos"], named["eot"], named["eom"], *endings) if i is not None]
    return Vocabulary(
        tokenizer_json=_checked(description, tokens, file),
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
    twice, times = Counter(named).most_common(1)[0]
    if times > 1:
        raise ConversionError(
            f"{keys.where}: found token {shown(twice)} {times} times, expected it once; "
            "download the file again"
        )
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


def _added(tokens: list[str], kinds: list[int], special: set[int]) -> Iterator[dict[str, Any]]:
    """Tokens found in a text as they are spelled, before anything else is done with it."""
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        control = kind in (Kind.CONTROL, Kind.UNKNOWN) or i in special
        if control or kind == Kind.USER_DEFINED:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            yield {"id": i, "content": token, **flags, "special": control}


def _vocab(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Ids by token, without those that llama.cpp's converter made up to fill the vocabulary."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if not (kind == Kind.UNUSED and token == f"[PAD{i}]")
    }


def _byte_level(keys: HfConfig, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
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


def _sentence_piece(keys: HfConfig, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """SentencePiece's BPE: the neighbours that make the piece of highest score are joined first."""
    vocab = _vocab(tokens, kinds)
    scores = _numbers(keys, "scores", len(tokens))
    pieces = [i for token, i in vocab.items() if kinds[i] in (Kind.NORMAL, Kind.UNUSED)]
    longest = max((len(tokens[i]) for i in pieces), default=0)
    if longest > MAX_PIECE:
        raise ConversionError(
            f"{keys.where}: found a piece of {longest} characters, expected at most {MAX_PIECE}; "
            "download the file again"
        )
    # Of pieces with one score SentencePiece takes the leftmost in the text, which a fixed order of
    # merges cannot say; trained models have no two.
    ranked = sorted(pieces, key=lambda i: -scores[i])
    merges = [pair for i in ranked for pair in _halves(tokens[i], vocab)]
    has_prefix = keys.flag("tokenizer.ggml.add_space_prefix", True)
    prefix = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == Kind.UNKNOWN), None)
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _halves(piece: str, vocab: dict[str, int]) -> list[list[str]]:
    """The ways to make a piece of two others; any of them joins at the piece's own rank."""
    cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [[left, right] for left, right in cuts if left in vocab and right in vocab]


def _template(
    keys: HfConfig, tokens: list[str], named: dict[str, int | None], model: str
) -> dict[str, Any] | None:
    """What stands before and behind every text: BOS and EOS, where the file wants them."""
    adds_bos = model == "llama" or PRE_TOKENIZERS[keys.text("tokenizer.ggml.pre")].adds_bos
    wanted = {
        "bos": keys.flag("tokenizer.ggml.add_bos_token", adds_bos),
        "eos": keys.flag("tokenizer.ggml.add_eos_token", False),
    }
    ids = {name: i for name, i in named.items() if wanted.get(name) and i is not None}
    if not ids:
        return None

    def part(name: str) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": tokens[ids[name]], "type_id": 0}}] if name in ids else []

    def text(name: str) -> list[dict[str, Any]]:
        return [*part("bos"), {"Sequence": {"id": name, "type_id": 0}}, *part("eos")]

    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ids.values()}
    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": [*text("A"), *text("B")],
        "special_tokens": special,
    }


def _checked(description: dict[str, Any], tokens: list[str], file: GgufFile) -> bytes:
    """As bytes; ConversionError if it is no tokenizer, or gives tokens other ids than the file."""
    data = json.dumps({"version": "1.0", **description}, ensure_ascii=False).encode()
    try:
        made = Tokenizer(data)
        moved = next((t for t, i in description["model"]["vocab"].items() if made.id_to_token(i) != t), None)
    except FormatError as error:
        raise ConversionError(
            f"{file.path}: found a vocabulary that does not work ({shown(str(error))}), expected one whose "
            "merges are of its tokens; download the file again"
        ) from None
    if moved is not None:
        raise ConversionError(
            f"{file.path}: found token {shown(moved)} that gets another id, expected each to keep its own; "
            "download the file again"
        )
    return data
