"""Text to tokens and back, and text as it streams.

`Tokenizer` wraps a Hugging Face tokenizer.json. `TextStream` turns tokens into text one at a
time; `StopMatcher` ends that text at a stop string.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import tokenizers

from edgert.errors import FormatError, UsageError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of one model.

    Args:
        json_bytes: the contents of tokenizer.json. Truncation and padding set in it are
            ignored: they are settings of a training run, not of the vocabulary.

    Raises FormatError when it is not a tokenizer this version of `tokenizers` understands.
    """

    def __init__(self, json_bytes: bytes) -> None:
        with _refusing("be read"):
            self._inner: Any = tokenizers.Tokenizer.from_str(json_bytes.decode("utf-8"))
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocab_size: int = self._inner.get_vocab_size(with_added_tokens=True)  # ids, added ones too
        self.special_ids: frozenset[int] = frozenset(
            token for token, added in self._inner.get_added_tokens_decoder().items() if added.special
        )
        steps = _decoder_steps(self._inner.decoder)
        self.decoders: tuple[str, ...] = tuple(step["type"] for step in steps)
        self.rewrites_across_tokens = _rewrites_across_tokens(steps)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens (BOS) of the model unless told otherwise.

        Raises UsageError on text that is not valid Unicode (a lone surrogate), FormatError when
        the tokenizer contradicts itself.
        """
        try:
            with _refusing("encode a text"):
                ids: list[int] = self._inner.encode(text, add_special_tokens=add_special).ids
        except TypeError as error:
            raise UsageError(f"the text cannot be tokenized: {_not_unicode(text)}") from error
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Ids outside the vocabulary have no text (models pad theirs). Raises UsageError on a
        number that cannot be an id, FormatError when the tokenizer contradicts itself.
        """
        try:
            with _refusing("decode tokens"):
                text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special)
        except OverflowError as error:
            raise UsageError(f"token ids run from {min(ids)} to {max(ids)}, expected 0 to 2**32-1") from error
        return text

    def id_to_token(self, token: int) -> str | None:
        """The token as the vocabulary spells it, None outside the vocabulary."""
        try:
            piece: str | None = self._inner.id_to_token(token)
        except OverflowError:
            return None
        return piece

    def token_to_id(self, piece: str) -> int | None:
        """The id of a token as the vocabulary spells it, None when it has none."""
        token: int | None = self._inner.token_to_id(piece)
        return token

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for inside a text; b"" outside the vocabulary."""
        piece = self.id_to_token(token)
        if piece is None:
            return b""
        if "ByteLevel" in self.decoders:
            table = _byte_level_table()
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
            return piece.encode()  # an added token, spelled as text
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte and "ByteFallback" in self.decoders:
            return bytes([int(byte[1], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def is_byte_piece(self, token: int) -> bool:
        """Whether the token is one raw byte of a SentencePiece vocabulary, like <0x0A>."""
        return "ByteFallback" in self.decoders and bool(_BYTE_PIECE.fullmatch(self.id_to_token(token) or ""))


class TextStream:
    """Text of a growing token sequence.

    What `push` and `flush` return, joined, equals `Tokenizer.decode` of all the tokens, and no
    piece ends inside a character. The cost of a token does not grow with those before it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._text: _Assembler
        if tokenizer.decoders == ("ByteLevel",):
            self._text = _Utf8Text(tokenizer)
        elif tokenizer.rewrites_across_tokens:
            self._text = _WholeText(tokenizer)
        else:
            self._text = _WindowText(tokenizer)

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often "" in the middle of a character."""
        if token in self._skipped or self._tokenizer.id_to_token(token) is None:
            return ""
        return self._text.push(token)

    def flush(self) -> str:
        """The rest of the text, once the last token was pushed."""
        return self._text.flush()


class _Assembler(Protocol):
    """How visible tokens become text; one per family of decoders."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class _Utf8Text:
    """Byte-level vocabularies: every token is a string of bytes, and the text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Like the library's decoder, this replaces maximal subparts (Unicode 15.0, section 3.9).
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowText:
    """Every other decoder: decode a short window and show what the newest tokens added to it.

    A decoder may treat the first token of a text differently (it strips a space), so the window
    starts with tokens already shown, and both sides of the comparison start alike.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._mixes_bytes = "ByteLevel" in tokenizer.decoders
        self._window: list[int] = []
        self._shown = 0  # how many tokens at the start of the window have been shown
        self._before = ""  # their text

    def push(self, token: int) -> str:
        self._window.append(token)
        # A run of byte pieces is text only if the whole run is valid UTF-8, else every byte of
        # it becomes U+FFFD: nothing in it is certain before it ends.
        return "" if self._tokenizer.is_byte_piece(token) else self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._tokenizer.decode(self._window, skip_special=False)
        if self._mixes_bytes and not final and text.endswith("\ufffd"):
            return ""  # perhaps the start of a character
        fresh = text[len(self._before) :]
        if fresh:  # tokens without text stay: alone they could not start a window
            del self._window[: self._shown]
            self._shown = len(self._window)
            self._before = self._tokenizer.decode(self._window, skip_special=False)
        return fresh


class _WholeText:
    """A decoder that rewrites text across tokens: any later token may still change what came before."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        self._ids.append(token)
        return ""

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special=False)


class StopMatcher:
    """Ends a streamed text at the first stop string.

    First is the one that is complete first, and the longest of those that end together; so the
    result does not depend on how the text was cut into pieces. Without stop strings text passes
    through at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the end of the text, which may be the start of a stop string
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was found or None).

        After a match everything further is swallowed and the match is repeated.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self._matched = min(found)
            self._held = ""
            return text[: end - len(self._matched)], self._matched
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """The text still held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop` but not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2's bytes_to_unicode).

    Bytes that print as Latin-1 stand for themselves; the others, in order, are U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The decoders in the order they run, sequences opened up; [] for none."""
    return [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _rewrites_across_tokens(steps: list[dict[str, Any]]) -> bool:
    """Whether a replacement of more than one character runs after the tokens were joined to one text."""
    joined = False
    for step in steps:
        if joined and step["type"] == "Replace" and len(step["pattern"].get("String", "..")) > 1:
            return True
        joined = joined or step["type"] in ("ByteLevel", "Fuse")
    return False


def _not_unicode(text: object) -> str:
    """What is wrong with a text that the library refuses."""
    if not isinstance(text, str):
        return f"it is of type {type(text).__name__}, expected str"
    place = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), 0)
    return f"character {place} is a lone surrogate, expected valid Unicode"


@contextmanager
def _refusing(action: str) -> Iterator[None]:
    """Turns what the library raises about a bad tokenizer.json into a FormatError.

    It raises bare Exception and ValueError, and where its Rust code panics a PanicException,
    which is no Exception and has no public name. TypeError and OverflowError are about arguments.
    """
    try:
        yield
    except (TypeError, OverflowError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise FormatError(
            "tokenizer",
            f"tokenizer.json cannot {action} ({reason}); expected a working Hugging Face fast tokenizer; "
            "convert the model again from a source that has one",
        ) from error
