"""Tokenizers, streamed text and stop strings, on small vocabularies of every family."""

import json

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgert.errors import FormatError, UsageError
from edgert.tokenizer import StopMatcher, TextStream, Tokenizer

FAMILY = "\u200d".join("👩👩👧")  # one emoji of five code points
FLAG = "\U0001f3f3\ufe0f\u200d\U0001f308"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog. ",
    "Größe, naïve café; 你好世界。 Привет мир.",
    f"emoji 😀 {FAMILY} and combining e\u0301 marks",
]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> hf.Tokenizer:
    inner = hf.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    inner.train_from_iterator(SENTENCES, trainer)
    inner.add_tokens(["<tool call>", "<Ã©>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return inner


def byte_level_in_sequence() -> hf.Tokenizer:
    inner = byte_level()
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("zzz", "!")])
    return inner


def llama2_style() -> hf.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *BYTE_PIECES, "▁", *"abcdefghé你.", "ab", "▁a", "▁ab", "▁▁", "▁▁▁▁"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "▁"), ("▁▁", "▁▁")]
    inner = hf.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


def unigram_metaspace() -> hf.Tokenizer:
    pieces = ["<unk>", "<s>", *BYTE_PIECES, "▁", *"abcdefgh.", "▁a", "▁the", "the", "▁▁"]
    inner = hf.Tokenizer(
        models.Unigram([(p, -float(len(pieces) - i)) for i, p in enumerate(pieces)], 0, True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    inner.add_special_tokens(["<unk>", "<s>"])
    return inner


def plain_metaspace() -> hf.Tokenizer:
    inner = unigram_metaspace()
    inner.decoder = decoders.Metaspace()
    return inner


def no_decoder() -> hf.Tokenizer:
    inner = hf.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner


FAMILIES = {
    make.__name__: Tokenizer(make().to_str().encode())
    for make in (
        byte_level,
        byte_level_in_sequence,
        llama2_style,
        unigram_metaspace,
        plain_metaspace,
        no_decoder,
    )
}
LOSSLESS = ["byte_level", "llama2_style", "unigram_metaspace"]
every_family = pytest.mark.parametrize("name", FAMILIES)


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = TextStream(tokenizer, skip_special)
    return [*(stream.push(token) for token in ids), stream.flush()]


@every_family
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_stream_of_any_tokens_is_their_text(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = FAMILIES[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def test_a_decoder_that_replaces_across_tokens_shows_nothing_early() -> None:
    tokenizer = FAMILIES["byte_level_in_sequence"]
    ids = tokenizer.encode("zzz", add_special=False)
    assert len(ids) == 3
    assert streamed(tokenizer, ids) == ["", "", "", "!"]


TEXT = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from([FAMILY, FLAG, "e\u0301", " ", "  ", "ab", "the ", "\ufffd"])
    )
).map("".join)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_stream_of_text_is_the_text_without_broken_characters(name: str, text: str) -> None:
    tokenizer = FAMILIES[name]
    ids = tokenizer.encode(text, add_special=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if name == "byte_level":
        assert "".join(pieces) == text
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = FAMILIES["byte_level"]
    ids = [tokenizer.token_to_id(piece) for piece in ("ð", "Ł", "ĺ", "Ģ", "!")]  # f0 9f 98 80 21
    assert streamed(tokenizer, [i for i in ids if i is not None]) == ["", "", "", "😀", "!", ""]


def test_a_run_of_byte_pieces_appears_when_it_ends() -> None:
    tokenizer = FAMILIES["llama2_style"]
    ids = tokenizer.encode("😀 a", add_special=False)
    assert streamed(tokenizer, ids) == ["", "", "", "", "", "😀 a", ""]
    assert streamed(tokenizer, ids[:-2]) == ["", "", "", "", "\ufffd" * 3]


@pytest.mark.parametrize("name", ["byte_level", "llama2_style", "unigram_metaspace"])
def test_the_cost_of_a_token_does_not_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES[name]
    decoded = 0
    real = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], skip_special: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return real(self, ids, skip_special)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    invalid = tokenizer.token_to_id("Ģ" if name == "byte_level" else "<0x80>")  # the byte 80
    assert invalid is not None
    streamed(tokenizer, [invalid] * 500 + tokenizer.encode("ab the ab " * 100))
    assert decoded < 6000


@every_family
def test_round_trip_of_plain_text(name: str) -> None:
    tokenizer = FAMILIES[name]
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_special_tokens() -> None:
    tokenizer = FAMILIES["byte_level"]
    assert tokenizer.encode("", add_special=True) == [0]
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.decode([0, 1]) == ""
    assert tokenizer.decode([0, 1], skip_special=False) == "<s></s>"


def test_token_names_and_bytes() -> None:
    tokenizer = FAMILIES["byte_level"]
    every = [tokenizer.id_to_token(token) for token in range(tokenizer.vocab_size)]
    assert all(piece is not None for piece in every)
    assert [tokenizer.token_to_id(piece) for piece in every if piece] == list(range(tokenizer.vocab_size))
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_to_id("no such token") is None
    space, added = tokenizer.token_to_id("Ġ"), tokenizer.token_to_id("<tool call>")
    assert space is not None
    assert added is not None
    assert tokenizer.token_bytes(space) == b" "
    assert tokenizer.token_bytes(added) == b"<tool call>"
    llama = FAMILIES["llama2_style"]
    assert [llama.token_bytes(llama.token_to_id(p) or 0) for p in ("<0xE2>", "▁ab", "é")] == [
        b"\xe2",
        b" ab",
        "é".encode(),
    ]


def test_truncation_and_padding_are_ignored() -> None:
    inner = byte_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    tokenizer = Tokenizer(inner.to_str().encode())
    text = "The quick brown fox"
    assert tokenizer.encode(text) == FAMILIES["byte_level"].encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        byte_level().to_str().encode()[:-9],
        json.dumps(json.loads(byte_level().to_str()) | {"decoder": {"type": "None such"}}).encode(),
    ],
)
def test_damaged_files_are_refused_in_one_line(damaged: bytes) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer(damaged)
    assert "\n" not in str(caught.value)
    assert caught.value.rule == "tokenizer"


def test_a_vocabulary_without_its_unknown_token_is_refused() -> None:
    inner = json.loads(no_decoder().to_str())
    del inner["model"]["vocab"]["<unk>"]
    tokenizer = Tokenizer(json.dumps(inner).encode())
    assert tokenizer.encode("a b") == [1, 2]
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot encode a text"):
        tokenizer.encode("c")


def test_a_panic_of_the_library_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    inner = json.loads(llama2_style().to_str())
    inner["model"]["continuing_subword_prefix"] = "####"  # longer than the second part of a merge
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(json.dumps(inner).encode())
    assert "panicked" in capfd.readouterr().err


def test_wrong_use_is_explained() -> None:
    tokenizer = FAMILIES["byte_level"]
    with pytest.raises(UsageError, match="character 2 is a lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(UsageError, match="it is of type int"):
        tokenizer.encode(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="run from -1 to 5"):
        tokenizer.decode([5, -1])


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "matched"),
    [
        ([], ["a", "b"], ["a", "b"], None),
        (["END"], ["one E", "N", "D two"], ["one ", "", ""], "END"),
        (["END"], ["one E", "N", "S"], ["one ", "", "ENS"], None),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (["abc", "b"], ["xabc"], ["xa"], "b"),  # complete first
        (["bc", "abc"], ["xabc"], ["x"], "abc"),  # the longer of those that end together
        (["\n\n"], ["a\n", "b\n\nc"], ["a", "\nb"], "\n\n"),
        (["stop"], ["stop"], [""], "stop"),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], shown: list[str], matched: str | None) -> None:
    matcher = StopMatcher(stops)
    results = [matcher.push(piece) for piece in pieces]
    assert [text for text, _ in results] == shown
    assert results[-1][1] == matched
    if matched:
        assert matcher.push("more") == ("", matched)
        assert matcher.flush() == ""


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the shortest start of the text that ends with a stop string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stops_do_not_depend_on_the_cuts(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, matched = "", None
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown += text
        if matched:
            break
        assert stops or text == piece
    shown += matcher.flush()
    assert (shown, matched) == first_stop("".join(pieces), stops)
