"""Perplexity: the definition, computed by hand from the logits."""

import math
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.errors import UsageError
from edgert.evaluate import evaluate, read_documents


def loss(model: edgert.Model, ids: list[int]) -> float:
    """-log p of every token but the first, in nats, one at a time."""
    logits = model.logits(ids).astype(np.float64)
    return sum(math.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, ids[1:], strict=False))


def test_perplexity_is_that_of_the_logits(tiny: edgert.Model) -> None:
    documents = ["A cat sat.", "It ran away from a dog."]
    found = evaluate(tiny, documents)
    ids = [tiny.tokenizer.encode(document) for document in documents]
    total, count = sum(loss(tiny, each) for each in ids), sum(len(each) - 1 for each in ids)
    assert found.tokens == count == 9 + 22
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-7)  # summed in float32
    assert found.bytes == sum(len(document.encode()) for document in documents)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.bytes, rel=1e-9)
    assert found.documents == 2


def test_long_document_is_scored_in_windows_of_the_context(tiny_file: Path) -> None:
    document = "abcdefghij klmnopqrst uvwxyz"
    with edgert.load(tiny_file, threads=1, context=10) as model:
        found = evaluate(model, [document])
        ids = model.tokenizer.encode(document)
        total = sum(loss(model, ids[start : start + 10]) for start in (0, 10, 20))
    assert found.tokens == len(ids) - 3
    assert found.perplexity == pytest.approx(math.exp(total / found.tokens), rel=1e-9)


def test_progress_counts_documents(tiny: edgert.Model) -> None:
    steps: list[tuple[int, int]] = []
    evaluate(tiny, ["ab", "cd", "ef"], lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_text_without_a_second_token_is_refused(tiny: edgert.Model) -> None:
    with pytest.raises(UsageError, match="shorter than two tokens"):
        evaluate(tiny, ["a", ""])


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Zażółć\ngęślą", encoding="utf-8")
    assert read_documents(path) == ["Zażółć\ngęślą"]


def test_lines_of_jsonl_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n{"text": "three"}\n', encoding="utf-8")
    assert read_documents(path) == ["one", "two", "three"]
    assert read_documents(path, last=2) == ["two", "three"]


@pytest.mark.parametrize(
    ("name", "blob", "message"),
    [
        ("t.txt", b"", "no text in it"),
        ("t.jsonl", b"\n\n", "no text in it"),
        ("t.txt", b"abc\xff", "not UTF-8 at byte 3; expected a text file or a .jsonl"),
        ("t.jsonl", b'{"text": "a"}\nplain\n', r't.jsonl:2: expected \{"text": ...\} on every line'),
        ("t.jsonl", b'{"body": "a"}\n', "t.jsonl:1: expected"),
        ("t.jsonl", b"[1]\n", "t.jsonl:1: expected"),
    ],
)
def test_files_that_hold_no_text_are_refused(tmp_path: Path, name: str, blob: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(blob)
    with pytest.raises(UsageError, match=message):
        read_documents(path)


def test_absent_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; expected a text file"):
        read_documents(tmp_path / "absent.txt")
