"""Making a tokenizer.json of a vocabulary that comes in another form."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

from edgert.converters.hf_config import shown
from edgert.errors import ConversionError, FormatError
from edgert.tokenizer import Tokenizer

Description = dict[str, Any]
"""A tokenizer.json, or parts of one, as Python objects."""

SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
# SentencePiece makes pieces of 16 characters; runs of spaces get to 128. Every place to cut a piece
# is tried, so without a limit a hostile one would take time quadratic in its length.
MAX_PIECE: Final = 256


class Kind(IntEnum):
    """What a token is, as SentencePiece and `tokenizer.ggml.token_type` number it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def check_unique(tokens: Sequence[str], where: str) -> None:
    """ConversionError if a token is there twice."""
    twice, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise ConversionError(
            f"{where}: found token {shown(twice)} {times} times, expected it once; download the file again"
        )


def added_tokens(
    tokens: Sequence[str], kinds: Sequence[int], special: Iterable[int]
) -> Iterator[Description]:
    """Tokens found in a text as they are spelled, before anything else is done with it.

    `special` are ids that are control tokens whatever their kind says.
    """
    control_ids = frozenset(special)
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        control = kind in (Kind.CONTROL, Kind.UNKNOWN) or i in control_ids
        if control or kind == Kind.USER_DEFINED:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            yield {"id": i, "content": token, **flags, "special": control}


def sentence_piece(
    vocab: Mapping[str, int],
    kinds: Sequence[int],
    scores: Sequence[float],
    where: str,
    *,
    prefix: bool = True,
    first_only: bool = False,
) -> Description:
    """SentencePiece's BPE: the neighbours that make the piece of highest score are joined first.

    `kinds` and `scores` are by id. `prefix` puts a space before a text, and before what follows a
    special token unless `first_only`. Raises ConversionError for pieces too long to be real.
    """
    pieces = [(piece, i) for piece, i in vocab.items() if kinds[i] in (Kind.NORMAL, Kind.UNUSED)]
    longest = max((len(piece) for piece, _ in pieces), default=0)
    if longest > MAX_PIECE:
        raise ConversionError(
            f"{where}: found a piece of {longest} characters, expected at most {MAX_PIECE}; "
            "download the file again"
        )
    # Of pieces with one score SentencePiece takes the leftmost in the text, which a fixed order of
    # merges cannot say; trained models have no two.
    pieces.sort(key=lambda piece: -scores[piece[1]])
    merges = [pair for piece, _ in pieces for pair in _halves(piece, vocab)]
    unknown = next((piece for piece, i in vocab.items() if kinds[i] == Kind.UNKNOWN), None)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        **_spaces(prefix, first_only),
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


def _spaces(prefix: bool, first_only: bool) -> Description:
    """How spaces become a character of pieces, and where one is put before a text."""
    if first_only:
        scheme = "first" if prefix else "never"
        step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        return {"normalizer": None, "pre_tokenizer": step}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {"normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]}, "pre_tokenizer": None}


def _halves(piece: str, vocab: Mapping[str, int]) -> list[list[str]]:
    """The ways to make a piece of two others; any of them joins at the piece's own rank."""
    cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [[left, right] for left, right in cuts if left in vocab and right in vocab]


def template(tokens: Sequence[str], bos: int | None, eos: int | None) -> Description | None:
    """What stands before and behind every text."""
    ids = [i for i in (bos, eos) if i is not None]
    if not ids:
        return None

    def part(i: int | None) -> list[Description]:
        return [] if i is None else [{"SpecialToken": {"id": tokens[i], "type_id": 0}}]

    def text(name: str) -> list[Description]:
        return [*part(bos), {"Sequence": {"id": name, "type_id": 0}}, *part(eos)]

    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": [*text("A"), *text("B")],
        "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ids},
    }


def encoded(description: Description, where: str) -> bytes:
    """The bytes of a tokenizer.json; ConversionError if it does not work or moves a token to another id."""
    try:
        data = json.dumps({"version": "1.0", **description}, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half a character, which JSON can write down
        raise ConversionError(
            f"{where}: found a token with {shown(error.object[error.start : error.end])}, expected Unicode; "
            "download the file again"
        ) from None
    try:
        made = Tokenizer(data)
    except FormatError as error:
        raise ConversionError(
            f"{where}: found a vocabulary that does not work ({shown(str(error))}), expected one whose "
            "merges are of its tokens; download the file again"
        ) from None
    moved = next((t for t, i in description["model"]["vocab"].items() if made.id_to_token(i) != t), None)
    if moved is not None:
        raise ConversionError(
            f"{where}: found token {shown(moved)} that gets another id, expected each to keep its own; "
            "download the file again"
        )
    return data
