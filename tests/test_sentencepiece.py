"""`tokenizer.model` files: the ids of sentencepiece itself, what transformers adds, and damage."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.converters.hf_config import HfConfig
from edgert.converters.sentencepiece import tokenizer_of
from edgert.errors import ConversionError, EdgertError, UnsupportedError
from edgert.format import ErtFile
from edgert.tokenizer import Tokenizer
from tests import tiny_models

STORED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "goldens" / "sentencepiece.json").read_text(encoding="utf-8")
)
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6
SPECIAL = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
PIECES = [("ab", 0.0, 1), ("\u2581", -1.0, 1), ("a", -2.0, 1), ("b", -3.0, 1), ("c", -4.0, 1)]


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def text(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def piece(name: str, score: float, kind: int) -> bytes:
    return text(1, text(1, name.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))


def model(
    pieces: list[tuple[str, float, int]] | None = None,
    trainer: bytes = number(3, 2),
    normalizer: bytes = number(4, 0),
) -> bytes:
    """A BPE model of the text as it is."""
    known = SPECIAL + PIECES if pieces is None else pieces
    return b"".join(piece(*p) for p in known) + text(2, trainer) + text(3, normalizer)


def tokenizer(data: bytes, folder: Path, config: Any = None, added: Any = None) -> Tokenizer:
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    made = tokenizer_of(path, HfConfig(config or {}, "config"), HfConfig(added or {}, "added"))
    return Tokenizer(made)


def spelled(found: Tokenizer, value: str, **options: Any) -> list[str | None]:
    return [found.id_to_token(i) for i in found.encode(value, **options)]


def test_ids_and_text_are_those_of_sentencepiece(tmp_path: Path) -> None:
    data = base64.b64decode(STORED["model"])
    first, legacy = tokenizer(data, tmp_path, {"legacy": False}), tokenizer(data, tmp_path)
    for value, ids, decoded in zip(STORED["texts"], STORED["ids"], STORED["decoded"], strict=True):
        assert legacy.decode(ids) == decoded
        if "<tool>" not in value:  # behind which transformers' legacy form has a space
            assert legacy.encode(value, add_special=False) == ids, value
        if value[:1] != " ":  # before which its other form has none
            assert first.encode(value, add_special=False) == ids, value


def test_tokens_around_a_text_are_those_of_the_configuration(tmp_path: Path) -> None:
    assert spelled(tokenizer(model(), tmp_path), "ab") == ["<s>", "\u2581", "ab"]
    both = {"add_eos_token": True, "bos_token": {"content": "<s>"}}
    assert spelled(tokenizer(model(), tmp_path, both), "ab") == ["<s>", "\u2581", "ab", "</s>"]
    none = {"add_bos_token": False}
    assert spelled(tokenizer(model(), tmp_path, none), "ab") == ["\u2581", "ab"]


def test_the_space_before_a_text(tmp_path: Path) -> None:
    """transformers puts one after every special token, unless `legacy` is false."""
    value = "a<s>b"
    legacy = tokenizer(model(), tmp_path)
    assert spelled(legacy, value, add_special=False) == ["\u2581", "a", "<s>", "\u2581", "b"]
    first = tokenizer(model(), tmp_path, {"legacy": False})
    assert spelled(first, value, add_special=False) == ["\u2581", "a", "<s>", "b"]
    without = tokenizer(model(), tmp_path, {"add_prefix_space": False})
    assert spelled(without, value, add_special=False) == ["a", "<s>", "b"]
    trained = tokenizer(model(normalizer=number(3, 0) + number(4, 0)), tmp_path)
    assert spelled(trained, "a", add_special=False) == ["a"]


def test_added_tokens_stand_behind_the_pieces(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"10": {"content": "<end>", "special": True}, "1": {"content": "<s>"}}}
    found = tokenizer(model(), tmp_path, config, {"<tool>": 8})
    assert found.encode("a<tool>b<end>", add_special=False) == [4, 5, 8, 4, 6, 10]
    assert found.decode([5, 8, 6, 10]) == "a<tool>b"
    assert found.vocab_size == 11


REFUSED: dict[str, tuple[bytes, dict[str, Any], type[EdgertError], str]] = {
    "unigram": (model(trainer=number(3, 1)), {}, UnsupportedError, "a SentencePiece model of type unigram"),
    "no type": (model(trainer=b""), {}, UnsupportedError, "of type unigram"),
    "rules of normalisation": (
        model(normalizer=text(2, b"rules") + number(4, 0)),
        {},
        UnsupportedError,
        "that rewrites its text",
    ),
    "runs of spaces made one": (model(normalizer=b""), {}, UnsupportedError, "that rewrites its text"),
    "another class": (model(), {"tokenizer_class": "T5Tokenizer"}, UnsupportedError, "'T5Tokenizer' without"),
    "empty": (b"", {}, ConversionError, "found no pieces"),
    "a text file": (b"version https://git-lfs", {}, ConversionError, "the file is damaged"),
    "an endless number": (b"\xff" * 20, {}, ConversionError, "a number without end"),
    "a length beyond the file": (b"\x0a\xff\xff\xff\xff\x0f", {}, ConversionError, "beyond its message"),
    "a group": (b"\x0b", {}, ConversionError, "field 1 of type 3"),
    "an empty piece": (text(1, number(3, 1)), {}, ConversionError, "an empty piece"),
    "a piece that is not text": (text(1, text(1, b"\xff")), {}, ConversionError, "not UTF-8"),
    "a piece twice": (model([*SPECIAL, *PIECES, PIECES[0]]), {}, ConversionError, "token 'ab' 2 times"),
    "a piece too long": (model([*SPECIAL, ("x" * 257, 0.0, 1)]), {}, ConversionError, "257 characters"),
    "a start that is no token": (model(), {"bos_token": "<start>"}, ConversionError, "bos_token '<start>'"),
    "a start that is a number": (model(), {"bos_token": 1}, ConversionError, "bos_token 1"),
    "an added token over another": (
        model(),
        {"added_tokens_decoder": {"3": {"content": "x"}}},
        ConversionError,
        "token 3: found 'x', expected a token behind the 8",
    ),
    "an added token far away": (
        model(),
        {"added_tokens_decoder": {"999999999": {"content": "x"}}},
        ConversionError,
        "token 999999999: found 'x'",
    ),
    "an id that is none": (
        model(),
        {"added_tokens_decoder": {"-1": {"content": "x"}}},
        ConversionError,
        "found '-1'",
    ),
    "an added token of half a character": (
        model(),
        {"added_tokens_decoder": {"8": {"content": "\ud800"}}},
        ConversionError,
        "a token with '.*ud800', expected Unicode",
    ),
    "an added token without text": (
        model(),
        {"added_tokens_decoder": {"8": {}}},
        ConversionError,
        "token 8: found no content",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(name: str, tmp_path: Path) -> None:
    data, config, kind, expected = REFUSED[name]
    with pytest.raises(kind, match=expected) as caught:
        tokenizer(data, tmp_path, config)
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_model_is_an_answer(tmp_path: Path) -> None:
    whole = model()
    for cut in range(len(whole)):
        with pytest.raises(EdgertError):  # without its end it is unigram, or squeezes spaces
            tokenizer(whole[:cut], tmp_path)


def test_a_folder_without_a_tokenizer_json(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_models.write_folder(folder, "llama_gqa_tied")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model())
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (folder / "added_tokens.json").write_text('{"<tool>": 8}')
    edgert.convert(folder, tmp_path / "m.ert", quant="f32")
    with ErtFile.open(tmp_path / "m.ert") as file:
        found = Tokenizer(file.tokenizer_json() or b"")
    assert found.encode("ab<tool>") == [1, 4, 3, 8]


def test_a_long_token_with_a_wrong_id_is_one_short_line(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_models.write_folder(folder, "llama_gqa_tied")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model())
    (folder / "added_tokens.json").write_text(json.dumps({"<\n" + "long" * 1000: -1}))
    with pytest.raises(ConversionError, match="expected a whole number >= 0") as caught:
        edgert.convert(folder, tmp_path / "m.ert")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
