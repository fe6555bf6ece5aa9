"""Vocabularies of GGUF: the ids of llama.cpp, the flags of the metadata, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.converters.gguf.pretokenizers import PRE_TOKENIZERS
from edgert.converters.gguf.reader import GgufFile
from edgert.converters.gguf.vocabulary import Vocabulary, read_vocabulary
from edgert.errors import ConversionError, EdgertError, UnsupportedError
from edgert.tokenizer import Tokenizer

Keys = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level(**changes: Any) -> Keys:
    """A small vocabulary of GPT-2's kind: two words, three special tokens."""
    letters = [*"abcdehilopst", "Ġ", "!", "1", "2", "é"]
    tokens = ["<unk>", "<s>", "</s>", *letters, "he", "ll", "hell", "hello", "Ġh", "12", "<tool>", "[PAD27]"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (len(letters) + 6), USER, UNUSED]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ h", "1 2"]
    return made("gpt2", tokens, kinds, {"pre": "gpt-2", "merges": merges}, changes)


def sentence_piece(**changes: Any) -> Keys:
    """A small vocabulary of Llama 2's kind."""
    letters = [*"▁hello"]
    letters = list(dict.fromkeys(letters))
    words = ["ll", "he", "hell", "hello", "▁hello", "▁h"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *words, *letters]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) + len(letters))]
    scores = np.array([0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))], np.float32)
    return made("llama", tokens, kinds, {"scores": scores}, changes)


def made(model: str, tokens: list[str], kinds: list[int], own: Keys, changes: Keys) -> Keys:
    values = {
        "model": model,
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **own,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def read(keys: Keys) -> Vocabulary:
    return read_vocabulary(GgufFile(Path("m.gguf"), keys, {}))


def tokenizer(keys: Keys) -> Tokenizer:
    return Tokenizer(read(keys).tokenizer_json)


def pieces(keys: Keys, text: str, **options: Any) -> list[str | None]:
    found = tokenizer(keys)
    return [found.id_to_token(i) for i in found.encode(text, **options)]


def test_byte_level_merges_in_order() -> None:
    assert pieces(byte_level(), "hello hello12!") == ["hello", "Ġ", "hello", "12", "!"]


def test_ids_are_those_of_the_file() -> None:
    keys = byte_level()
    found = tokenizer(keys)
    for i, token in enumerate(keys["tokenizer.ggml.tokens"]):
        assert found.id_to_token(i) == (None if token == "[PAD27]" else token)


def test_special_tokens_are_found_in_text_and_hidden_in_output() -> None:
    found = tokenizer(byte_level())
    assert found.encode("<s>h</s>") == [1, 8, 2]
    assert found.decode([1, 8, 2]) == "h"
    tool = found.token_to_id("<tool>")
    assert tool is not None
    assert found.encode("a<tool>b") == [3, tool, 4]
    assert found.decode([3, tool, 4]) == "a<tool>b"  # a user's token is text


@pytest.mark.parametrize("keys", [byte_level, sentence_piece])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_tokens_around_a_text_are_those_the_file_asks_for(
    keys: Callable[..., Keys], bos: bool, eos: bool
) -> None:
    found = pieces(keys(add_bos_token=bos, add_eos_token=eos), "h")
    assert (found[0] == "<s>", found[-1] == "</s>") == (bos, eos)
    assert "<s>" not in pieces(keys(add_bos_token=bos), "h", add_special=False)


def test_tokens_around_a_text_where_the_file_says_nothing() -> None:
    assert pieces(sentence_piece(), "h")[0] == "<s>"
    assert pieces(byte_level(), "h")[0] == "h"
    assert pieces(byte_level(pre="llama-bpe"), "h")[0] == "<s>"
    assert pieces(byte_level(pre="llama-bpe", bos_token_id=None), "h") == ["h"]


def test_pieces_join_by_score() -> None:
    """ "ll" scores above "he", "hell" above "hello"; an "o" too many stays alone."""
    assert pieces(sentence_piece(), "helloo") == ["<s>", "▁hello", "o"]
    assert pieces(sentence_piece(), "llhe", add_special=False) == ["▁", "ll", "he"]


def test_what_has_no_piece_becomes_bytes() -> None:
    assert pieces(sentence_piece(), "é", add_special=False) == ["▁", "<0xC3>", "<0xA9>"]
    found = tokenizer(sentence_piece())
    for text in ("hello  é", " hello", "\U0001f600\n"):
        assert found.decode(found.encode(text)) == text


def test_a_space_before_the_text_is_an_option() -> None:
    assert pieces(sentence_piece(add_space_prefix=False), "hello", add_special=False) == ["hello"]
    found = tokenizer(sentence_piece(add_space_prefix=False))
    assert found.decode(found.encode(" hello")) == " hello"


def test_ends_are_those_named_and_those_every_chat_model_has() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "<|eot_id|>", "<|im_end|>", "<end>"]
    kinds = np.array([UNKNOWN, CONTROL, CONTROL, NORMAL, CONTROL, NORMAL, CONTROL], np.int32)
    keys = byte_level(tokens=tokens, token_type=kinds, merges=[], eos_token_id=6)
    assert read(keys).eos_ids == (6, 2, 4)  # not <|im_end|>, which is a word here
    assert read(keys | {"tokenizer.ggml.eom_token_id": 3}).eos_ids == (6, 3, 2, 4)
    assert (read(keys).bos_token, read(keys).eos_token) == ("<s>", "<end>")


def test_qwen_composes_what_others_keep_apart() -> None:
    """Qwen's own tokenizer does, llama.cpp does not."""
    composed, apart = "\u00e9", "e\u0301"
    assert tokenizer(byte_level(pre="qwen2")).encode(apart) == tokenizer(byte_level(pre="qwen2")).encode(
        composed
    )
    gpt2 = tokenizer(byte_level(pre="gpt-2"))
    assert gpt2.encode(apart) != gpt2.encode(composed)


def test_merges_may_start_with_a_space_and_stand_alone_as_words() -> None:
    keys = byte_level()
    keys["tokenizer.ggml.tokens"][-1] = "hell!"
    keys["tokenizer.ggml.token_type"][-1] = NORMAL
    assert pieces(keys, "hell!") == ["hell", "!"]
    # Llama 3 takes a whole word that is a token without merging; here the word is cut before "!".
    assert pieces(keys | {"tokenizer.ggml.pre": "llama-bpe"}, "hello") == ["<s>", "hello"]


REFUSED: dict[str, tuple[Keys, type[EdgertError], str]] = {
    "another model": (
        byte_level(model="t5"),
        UnsupportedError,
        "tokenizer.ggml.model 't5', expected gpt2 or llama",
    ),
    "no model": (byte_level(model=None), ConversionError, "found no tokenizer.ggml.model"),
    "an unknown cut": (
        byte_level(pre="kimi-k2"),
        UnsupportedError,
        "tokenizer.ggml.pre 'kimi-k2', expected one of",
    ),
    "no cut": (byte_level(pre=None), UnsupportedError, "tokenizer.ggml.pre '', expected one of"),
    "a cut that is a number": (byte_level(pre=3), ConversionError, "found 'tokenizer.ggml.pre' 3"),
    "no tokens": (byte_level(tokens=[]), ConversionError, "found no tokenizer.ggml.tokens"),
    "tokens that are numbers": (byte_level(tokens=np.zeros(4)), ConversionError, "tokenizer.ggml.tokens"),
    "a token twice": (
        byte_level(tokens=["a", "b", "a"], token_type=None, merges=[], eos_token_id=1),
        ConversionError,
        "found token 'a' 2 times",
    ),
    "types of other tokens": (
        byte_level(token_type=np.zeros(3, np.int32)),
        ConversionError,
        "found 3 values for tokenizer.ggml.token_type, expected 28 numbers",
    ),
    "types as text": (byte_level(token_type=["a"]), ConversionError, "for tokenizer.ggml.token_type"),
    "a merge of one token": (byte_level(merges=["he"]), ConversionError, "found merge 'he', expected two"),
    "a merge of nothing": (byte_level(merges=["he "]), ConversionError, "found merge 'he '"),
    "a merge of no token": (byte_level(merges=["x y"]), ConversionError, "a vocabulary that does not work"),
    "a merge to no token": (byte_level(merges=["a b"]), ConversionError, "a vocabulary that does not work"),
    "no scores": (sentence_piece(scores=None), ConversionError, "tokenizer.ggml.scores, expected 2"),
    "a piece too long": (
        sentence_piece(
            tokens=["<unk>", "a" * 257],
            token_type=np.array([UNKNOWN, NORMAL], np.int32),
            scores=np.zeros(2, np.float32),
            bos_token_id=None,
            eos_token_id=None,
        ),
        ConversionError,
        "found a piece of 257 characters",
    ),
    "a start beyond the tokens": (
        byte_level(bos_token_id=28),
        ConversionError,
        "bos_token_id 28, expected an id below 28",
    ),
    "a flag that is a number": (
        byte_level(add_bos_token=1),
        ConversionError,
        "add_bos_token' 1, expected true or false",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_vocabulary_is_one_line(name: str) -> None:
    keys, kind, expected = REFUSED[name]
    with pytest.raises(kind, match=expected) as caught:
        read(keys)
    assert "\n" not in str(caught.value)


GOLDENS = Path(__file__).parent / "goldens" / "gguf_tokens.json"
STORED: dict[str, Any] = json.loads(GOLDENS.read_text(encoding="utf-8"))


def test_every_cut_has_goldens() -> None:
    assert set(STORED["ids"]) == {*PRE_TOKENIZERS, "sentence_piece"}


# Where llama.cpp departs from the models' own patterns: it takes no marks into the words of Tekken and
# GPT-4o, and of DeepSeek Coder's ranges it misses the spaces outside ASCII.
DEPARTURES = {"tekken": "\u0939\u0301", "gpt-4o": "\u0939\u0301", "deepseek-coder": "\u3000"}


@pytest.mark.parametrize("pre", sorted(STORED["ids"]))
def test_ids_are_those_of_llama_cpp(pre: str) -> None:
    """`tools/check_gguf.py tokens --write` stores them."""
    kind = "sentence_piece" if pre == "sentence_piece" else "byte_level"
    keys = STORED["metadata"][kind] | ({"pre": pre} if kind == "byte_level" else {})
    typed = {k: np.array(v) if k in ("token_type", "scores") else v for k, v in keys.items()}
    found = tokenizer({f"tokenizer.ggml.{key}": value for key, value in typed.items()})
    compared = 0
    for text, expected in zip(STORED["texts"], STORED["ids"][pre], strict=True):
        if not set(text) & set(DEPARTURES.get(pre, "")):
            assert found.encode(text) == expected, text
            compared += 1
    assert compared >= len(STORED["texts"]) - 2
