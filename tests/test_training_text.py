"""What of a text is learned from and what is held out; and training where there is no torch."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgert.training
from edgert.errors import UsageError
from edgert.training.corpus import MOST_HELD_OUT, Corpus, read_corpus
from tests import tiny_models
from tests.conftest import Outcome

EOS = 2


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    tiny_models.tokenizer().save(str(path))
    return path


def lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def read(path: Path, tokenizer: Path, held_out: int = 200, seed: int = 0, vocab: int = 96) -> Corpus:
    return read_corpus(path, tokenizer, vocab=vocab, eos=EOS, held_out=held_out, row_tokens=32, seed=seed)


def documents(count: int) -> list[str]:
    return [f"{i}: " + "abcdefgh " * 9 for i in range(count)]


def first_number(ids: np.ndarray) -> int:
    return int(tiny_models.tokenizer().decode([int(i) for i in ids]).split(":")[0])


def test_the_last_documents_are_held_out_and_the_rest_is_shuffled(tokenizer: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", documents(60))
    corpus = read(path, tokenizer, held_out=5)
    assert [first_number(ids) for ids in corpus.held_out] == [55, 56, 57, 58, 59]
    assert all(ids[-1] == EOS for ids in corpus.held_out)
    ends = np.flatnonzero(corpus.stream == EOS)[:-1] + 1
    learned = [first_number(ids) for ids in np.split(corpus.stream, ends)]
    assert sorted(learned) == list(range(55)) and learned != sorted(learned)
    assert read(path, tokenizer, held_out=5).digest == corpus.digest
    assert read(path, tokenizer, held_out=5, seed=1).digest != corpus.digest
    assert len(read(path, tokenizer, held_out=50).held_out) == 6  # a tenth at most


def test_of_a_few_long_documents_a_tenth_of_the_tokens_is_held_out(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 1000)
    corpus = read(path, tokenizer)
    assert (len(corpus.stream), [len(ids) for ids in corpus.held_out]) == (9001, [1000])
    path.write_text("abcdefghij" * 60_000)
    assert sum(map(len, read(path, tokenizer).held_out)) == MOST_HELD_OUT


def test_rows_depend_on_the_step_alone_and_an_epoch_has_every_row_once() -> None:
    corpus = Corpus(np.arange(1000, dtype=np.int32), (), "")
    per_epoch = (1000 - 32) // (4 * 32)
    epoch = [corpus.rows(step, 4, 32) for step in range(per_epoch)]
    seen = np.concatenate(epoch).reshape(-1)
    assert len(set(seen.tolist())) == len(seen)  # nothing twice
    np.testing.assert_array_equal(corpus.rows(3, 4, 32), epoch[3])
    assert {int(row[0]) for row in corpus.rows(per_epoch, 4, 32)} != {int(row[0]) for row in epoch[0]}
    assert corpus.rows(0, 40, 32).shape == (40, 32)  # more than there is: from the start again


def test_a_text_that_is_too_short_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abc" * 100)
    with pytest.raises(UsageError, match=r"found 271 tokens to learn from, expected at least 512; give more"):
        read(path, tokenizer)
    path.write_text("abc" * 300)
    with pytest.raises(UsageError, match=r"found 90 tokens to hold out, expected at least 256"):
        read(path, tokenizer)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", documents(60))
    with pytest.raises(UsageError, match=r"found token \d+ in t.jsonl, expected ids below the model's"):
        read(path, tokenizer, vocab=50)


@pytest.mark.parametrize("kind", ["draft", "exits"])
def test_without_torch_training_says_what_to_install(
    kind: str, cli: Callable[..., Outcome], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgert.training, "find_spec", lambda name: None)
    done = cli("train", kind, tiny_folder, "--text", "t.txt", "-o", "out.safetensors")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        "edgert: found no torch and no transformers, which training needs and running a model does not; "
        "install them: pip install 'edgert[train]'\n"
    )
