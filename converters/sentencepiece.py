"""`tokenizer.model` of a Hugging Face folder, a SentencePiece model, as a tokenizer.json.

The file is a protocol buffer (sentencepiece_model.proto); the few fields that matter are read here.
What transformers adds beside it, in tokenizer_config.json and added_tokens.json, is taken as
LlamaTokenizer takes it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edgert.converters.hf_config import HfConfig, read_bytes, shown
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

MODEL: Final = "tokenizer.model"
# The largest vocabulary, of 256,000 pieces, takes 4 MB.
MAX_BYTES: Final = 64 << 20
# Added tokens start behind the pieces; vocabularies have some thousand at most.
MAX_ADDED: Final = 1 << 16

_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast")
_BPE: Final = 2  # TrainerSpec.model_type
_MODEL_TYPES: Final = {1: "unigram", 3: "word", 4: "char"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(slots=True)
class Pieces:
    """What a SentencePiece model says."""

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    model_type: int = 1  # unigram, where the file does not say
    charsmap: bytes = b""  # rules of normalisation; none in what edgert runs
    prefix: bool = True
    squeeze: bool = True  # runs of spaces become one
    escape: bool = True  # spaces become a character of pieces
    suffix: bool = False  # spaces belong to the word before them


def tokenizer_of(path: Path, config: HfConfig, added: HfConfig) -> bytes:
    """The tokenizer.json of a SentencePiece model and the two JSON files beside it.

    Raises UnsupportedError for another kind of model or tokenizer class, ConversionError for
    damaged files.
    """
    kind = config.text("tokenizer_class", _CLASSES[0])
    if kind not in _CLASSES:
        raise UnsupportedError(
            f"{config.where}: found tokenizer_class {shown(kind)} without a tokenizer.json, expected one of "
            f"{', '.join(_CLASSES)}; write one with transformers: AutoTokenizer...save_pretrained(FOLDER)"
        )
    pieces = read_pieces(path)
    _refuse(pieces, path)
    flags = _add(pieces, config, added)
    check_unique(pieces.tokens, str(path))
    vocab = {token: i for i, token in enumerate(pieces.tokens)}
    first_only = config.has("legacy") and not config.flag("legacy")
    prefix = pieces.prefix and config.flag("add_prefix_space", True)
    description = sentence_piece(
        vocab, pieces.kinds, pieces.scores, str(path), prefix=prefix, first_only=first_only
    )
    entries = added_tokens(pieces.tokens, pieces.kinds, ())
    description["added_tokens"] = [entry | flags.get(entry["id"], {}) for entry in entries]
    bos = _named(config, "bos", "<s>", vocab) if config.flag("add_bos_token", True) else None
    eos = _named(config, "eos", "</s>", vocab) if config.flag("add_eos_token", False) else None
    description["post_processor"] = template(pieces.tokens, bos, eos)
    return encoded(description, str(path))


def _refuse(pieces: Pieces, path: Path) -> None:
    """Everything but the kind that Llama and Mistral have."""
    found = None
    if pieces.model_type != _BPE:
        found = f"a SentencePiece model of type {_MODEL_TYPES.get(pieces.model_type, pieces.model_type)}"
    elif pieces.charsmap or pieces.squeeze or not pieces.escape or pieces.suffix:
        found = "a SentencePiece model that rewrites its text"
    if found is not None:
        raise UnsupportedError(
            f"{path}: found {found}, expected BPE of the text as it is; write a tokenizer.json with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )


def _named(config: HfConfig, name: str, default: str, vocab: dict[str, int]) -> int:
    """The id of `bos_token` or `eos_token`: a text, or an object with its text as content."""
    value = config.values.get(f"{name}_token", default)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or text not in vocab:
        raise ConversionError(
            f"{config.where}: found {name}_token {shown(value)}, expected a token of the vocabulary; "
            "download the model's files again"
        )
    return vocab[text]


def _add(pieces: Pieces, config: HfConfig, added: HfConfig) -> dict[int, Description]:
    """Tokens that came after training, put behind the pieces; and the flags that transformers gives any."""
    tokens = {added.integer(text, least=0): {"content": text} for text in added.values}
    for key, value in config.child("added_tokens_decoder").values.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and isinstance(value, dict)):
            raise ConversionError(
                f"{config.where}: found {shown(key)}: {shown(value)} in added_tokens_decoder, expected an id "
                "and its token; download the model's files again"
            )
        tokens[int(key)] = value
    flags: dict[int, Description] = {}
    for i, value in sorted(tokens.items()):
        entry = HfConfig(value, f"{config.where}: token {i}")
        content, special = entry.text("content"), entry.flag("special")
        flags[i] = {name: entry.flag(name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        _place(pieces, i, content, special, entry)
    return flags


def _place(pieces: Pieces, i: int, content: str, special: bool, entry: HfConfig) -> None:
    """One added token at its id: over the same piece, or next behind the last."""
    kind = Kind.CONTROL if special else Kind.USER_DEFINED
    if i < len(pieces.tokens) and pieces.tokens[i] == content:
        if pieces.kinds[i] != Kind.UNKNOWN:
            pieces.kinds[i] = kind
        return
    if not len(pieces.tokens) <= i < len(pieces.tokens) + MAX_ADDED or not content:
        raise ConversionError(
            f"{entry.where}: found {shown(content)}, expected a token behind the {len(pieces.tokens)} "
            "of the model or the same as there; download the model's files again"
        )
    while len(pieces.tokens) <= i:  # ids between are no tokens, but ours have to be something
        pieces.tokens.append(f"[PAD{len(pieces.tokens)}]")
        pieces.scores.append(0.0)
        pieces.kinds.append(Kind.BYTE)
    pieces.tokens[i], pieces.kinds[i] = content, kind


def read_pieces(path: Path) -> Pieces:
    """A SentencePiece model; ConversionError for a file that is none."""
    data = read_bytes(path)
    if len(data) > MAX_BYTES:
        raise _damaged(path, f"{len(data):,} bytes")
    pieces = Pieces()
    for number, value in _fields(data, path):
        if number == 1 and isinstance(value, bytes):
            _read_piece(pieces, value, path)
        elif number == 2 and isinstance(value, bytes):
            for inner, setting in _fields(value, path):
                if inner == 3 and isinstance(setting, int):
                    pieces.model_type = setting
                elif inner == 24:
                    pieces.suffix = bool(setting)
        elif number == 3 and isinstance(value, bytes):
            for inner, setting in _fields(value, path):
                if inner == 2 and isinstance(setting, bytes):
                    pieces.charsmap = setting
                elif inner in (3, 4, 5):
                    setattr(pieces, {3: "prefix", 4: "squeeze", 5: "escape"}[inner], bool(setting))
    if not pieces.tokens:
        raise _damaged(path, "no pieces")
    return pieces


def _read_piece(pieces: Pieces, data: bytes, path: Path) -> None:
    text, score, kind = "", 0.0, int(Kind.NORMAL)
    for number, value in _fields(data, path):
        if number == 1 and isinstance(value, bytes):
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError:
                raise _damaged(path, "a piece that is not UTF-8") from None
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if not text:
        raise _damaged(path, "an empty piece")
    pieces.tokens.append(text)
    pieces.scores.append(score)
    pieces.kinds.append(kind)


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a message: whole numbers, 32-bit floats and bytes; 64-bit fields as bytes."""
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place, path)
        number, wire = key >> 3, key & 7
        value: int | float | bytes
        if wire == _VARINT:
            value, place = _varint(data, place, path)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
            if wire == _BYTES:
                length, place = _varint(data, place, path)
            if length is None or length > end - place:
                raise _damaged(path, f"field {number} of type {wire} beyond its message")
            raw = data[place : place + length]
            value = struct.unpack("<f", raw)[0] if wire == _FIXED32 else raw
            place += length
        yield number, value


def _varint(data: bytes, place: int, path: Path) -> tuple[int, int]:
    """Seven bits to a byte, lowest first; the upper bit says that more follow."""
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise _damaged(path, "a number without end")


def _damaged(path: Path, found: str) -> ConversionError:
    return ConversionError(
        f"{path}: found {found}, expected a SentencePiece model; the file is damaged, download it again"
    )
