"""The library as its users see it: load, generate, stream, chat, logits, convert."""

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import edgert
from edgert.errors import (
    ContextLengthError,
    ModelFileError,
    NotAModelError,
    OptionError,
    TemplateError,
    UsageError,
)
from edgert.format import ErtFile, ErtWriter
from tests import tiny_models

PROMPT = "Once upon"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = 1, 2  # the special tokens a script begins and ends with
LOGPROB_TOLERANCE = 1e-6  # their sum is made of float32 exponentials

Script = Callable[[Sequence[bytes]], Path]


def byte_characters() -> dict[int, str]:
    """How byte-level vocabularies write each byte (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def write_script(folder: Path, pieces: Sequence[bytes]) -> None:
    """A model that says these pieces, one token each, after START, and then END: no piece twice.

    Embeddings are unit vectors, the layer adds nothing, and the output matrix sends each token to
    the one that follows it.
    """
    table = byte_characters()
    spelled = ["".join(table[byte] for byte in piece) for piece in pieces]
    letters = [table[byte] for byte in (*range(0x20, 0x7F), 0x0A)]
    names = list(dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *spelled]))
    vocab = {name: i for i, name in enumerate(names)}
    config = tiny_models.CONFIGS["llama_mha"] | {
        "hidden_size": -(-len(vocab) // 32) * 32,
        "num_hidden_layers": 1,
        "vocab_size": len(vocab),
    }
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tiny_models.shapes(config).items()}
    for name, values in tensors.items():
        if name.endswith("norm.weight"):
            values[:] = 1.0
    follow_each_other(tensors, [START, *(vocab[name] for name in spelled), END])
    tiny_models.write_model(folder, config, tensors)
    (folder / "tokenizer.json").write_text(byte_level(vocab).to_str(), encoding="utf-8")


def follow_each_other(tensors: dict[str, NDArray[np.float32]], ids: Sequence[int]) -> None:
    embedding, output = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    np.fill_diagonal(embedding, 1.0)
    for before, after in pairwise(ids):
        output[after, before] = 1.0


def byte_level(vocab: dict[str, int]) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return made


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def make(pieces: Sequence[bytes]) -> Path:
        write_script(tmp_path / "script", pieces)
        edgert.convert(tmp_path / "script", tmp_path / "script.ert", quant="f32")
        return tmp_path / "script.ert"

    return make


# Loading


def test_load_takes_a_text_or_a_path(tiny_file: Path) -> None:
    for path in (tiny_file, str(tiny_file)):
        with edgert.load(path) as model:
            assert model.spec.vocab == 96
            assert model.size == tiny_file.stat().st_size


def test_load_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotAModelError, match="no such file"):
        edgert.load(tmp_path / "absent.ert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0; expected 1 to 256"),
        ({"threads": "two"}, "threads is 'two'; expected 1 to 256"),
        ({"context": 65}, "context is 65; expected 1 to 64"),
        ({"chunk": 0}, "chunk is 0; expected 1 to 4096"),
        ({"kv": "q5"}, "kv is 'q5'; expected one of f16, q8, q4"),
        ({"ram": "12x"}, "a size of '12x'; expected"),
        ({"ram": [1]}, r"ram is \[1\]; expected"),
    ],
)
def test_load_refuses_options_that_do_not_fit(tiny_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        edgert.load(tiny_file, **options)


def test_threads_end_with_the_context_manager(tiny_file: Path) -> None:
    before = set(threading.enumerate())
    with edgert.load(tiny_file, threads=3) as model:
        model.generate(PROMPT, max_tokens=2)
    assert set(threading.enumerate()) == before


def test_closed_model_refuses_work(tiny_file: Path) -> None:
    with edgert.load(tiny_file) as model:
        stream = model.stream(PROMPT)
        next(stream)
    for use in (lambda: model.generate(PROMPT), lambda: model.logits([5]), lambda: next(stream)):
        with pytest.raises(UsageError, match="this model is closed; load it again"):
            use()
    model.close()  # again does no harm


# What comes back


def test_completion_holds_the_whole_answer(tiny: edgert.Model) -> None:
    done = tiny.generate(PROMPT, max_tokens=5)
    assert isinstance(done, edgert.Completion)
    fields = {field.name for field in dataclasses.fields(done)}
    assert {"text", "tokens", "finish_reason", "timings", "stats"} <= fields
    assert len(done.tokens) == 5 and done.text == tiny.tokenizer.decode(done.tokens)
    assert (done.finish_reason, done.prompt_tokens) == ("length", len(PROMPT))
    assert done.timings.first_token_s > 0 and done.timings.prefill_tok_s > 0 and done.timings.decode_tok_s > 0
    assert done.stats["threads"] == 1
    assert (done.logprobs, done.top_logprobs) == ((), ())


def test_events_add_up_to_the_completion(tiny: edgert.Model) -> None:
    stream = tiny.stream(PROMPT, max_tokens=12, temperature=1.0, seed=3, logprobs=2)
    events = list(stream)
    done = stream.completion()
    assert all(isinstance(event, edgert.TokenEvent) for event in events)
    assert "".join(event.text for event in events) == done.text
    assert tuple(event.token for event in events) == done.tokens
    assert tuple(event.logprob for event in events) == done.logprobs
    assert tuple(event.top for event in events) == done.top_logprobs
    assert {event.source for event in events} == {"model"}
    assert done == dataclasses.replace(
        tiny.generate(PROMPT, max_tokens=12, temperature=1.0, seed=3, logprobs=2),
        timings=done.timings,
        stats=done.stats,
    )


def test_unfinished_stream_gives_what_came_so_far(tiny: edgert.Model) -> None:
    stream = tiny.stream(PROMPT, max_tokens=9)
    first = [next(stream), next(stream)]
    done = stream.completion()
    assert done.tokens == tuple(event.token for event in first)
    assert done.finish_reason == "interrupted"
    assert [*done.tokens, *(event.token for event in stream)] == list(stream.completion().tokens)
    assert stream.completion().finish_reason == "length"


def test_prompt_can_be_token_ids(tiny: edgert.Model) -> None:
    ids = tiny.tokenizer.encode(PROMPT)
    expected = tiny.generate(PROMPT, max_tokens=8).tokens
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert tiny.generate(prompt, max_tokens=8).tokens == expected


def test_model_without_a_tokenizer_works_on_ids(tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.ert"
    with ErtFile.open(tiny_file) as source:
        stored = {n: t for n, t in source.tensors.items() if t.role != "bytes"}
        quants = {n: t.quant for n, t in stored.items() if t.role == "matrix"}
        with ErtWriter(path, source.spec, quants) as writer:
            for name in stored:
                writer.write(name, source.raw(name))
            writer.finish()
    with edgert.load(path) as model, edgert.load(tiny_file) as whole:
        done = model.generate([7, 8, 9], max_tokens=6)
        assert done.tokens == whole.generate([7, 8, 9], max_tokens=6).tokens
        assert done.text == ""
        with pytest.raises(ModelFileError, match="holds no tokenizer: give token ids"):
            model.generate(PROMPT)
        with pytest.raises(OptionError, match="stop needs a tokenizer"):
            model.generate([7], stop="a")


# Refusals


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "there are no tokens"),
        ([96], "token id 96 is outside the vocabulary of 96"),
        ([5, -1], "token id -1 is outside the vocabulary of 96"),
        (5, "a prompt of type int"),
        (None, "a prompt of type NoneType"),
        ([1.5], "expected a text, or whole numbers"),
        (["a"], "expected a text, or whole numbers"),
    ],
)
def test_bad_prompt_is_refused(tiny: edgert.Model, prompt: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny.generate(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 5}, "there is no option 'max_token'; there are: logprobs, max_tokens"),
        ({"max_tokens": -1}, "max_tokens is -1; expected >= 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; expected a whole number"),
        ({"max_tokens": "5"}, "max_tokens is '5'; expected a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"temperature": float("nan")}, "temperature is nan; expected a finite number"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number"),
        ({"top_p": 0}, r"top_p is 0.0; expected in \(0, 1\]"),
        ({"min_p": 1}, r"min_p is 1.0; expected in \[0, 1\)"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; expected > 0"),
        ({"presence_penalty": 101}, "presence_penalty is 101.0; expected between"),
        ({"logprobs": None}, "logprobs is None; expected a whole number"),
        ({"seed": "7"}, "seed is '7'; expected a whole number"),
        ({"stop": 5}, "stop is 5; expected a text or a list of texts"),
        ({"stop": ["a", 5]}, "stop is .*; expected a text or a list of texts"),
        ({"stop": ""}, "stop holds an empty string"),
    ],
)
def test_bad_option_is_refused(tiny: edgert.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tiny.generate(PROMPT, **options)


def test_options_take_numpy_numbers(tiny: edgert.Model) -> None:
    expected = tiny.generate(PROMPT, max_tokens=4, temperature=0.5, seed=1).tokens
    options = {"max_tokens": np.int64(4), "temperature": np.float32(0.5), "seed": np.uint8(1)}
    assert tiny.generate(PROMPT, **options, stop=None).tokens == expected


def test_prompt_longer_than_the_context_is_refused_with_numbers(tiny: edgert.Model, tiny_file: Path) -> None:
    with pytest.raises(ContextLengthError) as error:
        tiny.generate("a" * 64)
    assert str(error.value) == "the prompt has 64 tokens, expected at most 63 in a context of 64; shorten it"
    with (
        edgert.load(tiny_file, context=16) as small,
        pytest.raises(ContextLengthError, match=r"at most 15 .* larger context \(this model's own is 64\)"),
    ):
        small.generate("a" * 16)
    with pytest.raises(ContextLengthError, match="65 tokens do not fit in a context of 64"):
        tiny.logits([5] * 65)


def test_refused_prompt_leaves_the_stream_in_progress_alone(tiny: edgert.Model) -> None:
    expected = tiny.generate(PROMPT, max_tokens=10).tokens
    stream = tiny.stream(PROMPT, max_tokens=10)
    next(stream)
    for bad in ("b" * 64, [500]):
        with pytest.raises(edgert.EdgertError):
            tiny.generate(bad)
    assert tuple(stream.completion().tokens + tuple(event.token for event in stream)) == expected


def test_stream_ends_when_another_generation_begins(tiny: edgert.Model) -> None:
    old = tiny.stream(PROMPT, max_tokens=10)
    came = [next(old) for _ in range(3)]
    expected = tiny.generate("abc", max_tokens=4).tokens
    with pytest.raises(UsageError, match="this stream ended: the model has begun another generation"):
        next(old)
    assert old.completion().tokens == tuple(event.token for event in came)
    assert old.completion().finish_reason == "interrupted"
    assert tiny.generate("abc", max_tokens=4).tokens == expected


def test_logits_end_a_stream_too(tiny: edgert.Model) -> None:
    old = tiny.stream(PROMPT)
    tiny.logits([5, 6])
    with pytest.raises(UsageError, match="this stream ended"):
        next(old)


def test_second_thread_is_refused_while_the_first_computes(
    tiny: edgert.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[str] = []
    step = tiny._engine.step

    def other() -> None:
        for use in (lambda: tiny.generate("abc"), lambda: tiny.logits([5])):
            with pytest.raises(UsageError) as error:
                use()
            refusals.append(str(error.value))

    def step_with_a_visitor() -> object:
        monkeypatch.setattr(tiny._engine, "step", step)
        visitor = threading.Thread(target=other)
        visitor.start()
        visitor.join()
        return step()

    expected = tiny.generate(PROMPT, max_tokens=5).tokens
    monkeypatch.setattr(tiny._engine, "step", step_with_a_visitor)
    assert tiny.generate(PROMPT, max_tokens=5).tokens == expected
    assert len(refusals) == 2
    assert all("at work in another thread; load it once per thread" in text for text in refusals)


@pytest.mark.compiled
def test_threads_that_share_a_model_never_mix_their_texts(tiny: edgert.Model) -> None:
    prompts = ("abc", "Once upon a", "xyz")
    expected = {prompt: tiny.generate(prompt, max_tokens=30).tokens for prompt in prompts}
    wrong: list[object] = []
    refused: list[object] = []

    def work(prompt: str) -> None:
        for _ in range(30):
            try:
                tokens = tiny.generate(prompt, max_tokens=30).tokens
                if tokens != expected[prompt]:
                    wrong.append((prompt, tokens))
            except UsageError as error:
                refused.append(error)

    workers = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert tiny.generate("abc", max_tokens=30).tokens == expected["abc"]


# Where an answer ends


def test_no_tokens_asked_for_gives_none(tiny: edgert.Model) -> None:
    done = tiny.generate(PROMPT, max_tokens=0)
    assert (done.text, done.tokens, done.finish_reason) == ("", (), "length")
    assert (done.timings.first_token_s, done.timings.prefill_tok_s, done.timings.decode_tok_s) == (0, 0, 0)


def test_one_token_is_the_most_probable_after_the_prompt(tiny: edgert.Model) -> None:
    done = tiny.generate(PROMPT, max_tokens=1)
    best = int(tiny.logits(tiny.tokenizer.encode(PROMPT))[-1].argmax())
    assert (done.tokens, done.finish_reason) == ((best,), "length")
    assert done.timings.decode_tok_s == 0


def test_answer_ends_where_the_context_does(tiny: edgert.Model) -> None:
    done = tiny.generate("a" * 60, max_tokens=100)
    # Positions 61 to 64, and the token after the last of them, which needs no position.
    assert (len(done.tokens), done.finish_reason) == (5, "length")
    assert tiny.generate("a" * 63, max_tokens=100).tokens == tiny.generate("a" * 63, max_tokens=2).tokens


def test_end_token_ends_the_answer_and_is_not_in_it(script: Script) -> None:
    with edgert.load(script([b"One", b" two", b" three"])) as model:
        done = model.generate([START], max_tokens=50)
        assert (done.text, len(done.tokens), done.finish_reason) == ("One two three", 3, "stop")
        assert END not in done.tokens
        assert model.generate([START], max_tokens=3).finish_reason == "length"
        assert model.generate([START], max_tokens=4).finish_reason == "stop"


def test_stop_string_across_token_borders_is_cut_off(script: Script) -> None:
    with edgert.load(script([b"One", b"\n", b"Us", b"er", b": hi"])) as model:
        stream = model.stream([START], stop=["zzz", "\nUser:"])
        events = list(stream)
        assert [event.text for event in events] == ["One", "", "", "", ""]
        done = stream.completion()
        assert (done.text, len(done.tokens), done.finish_reason) == ("One", 5, "stop")
        assert model.generate([START], stop="er: ").text == "One\nUs"


def test_what_only_began_like_a_stop_string_is_shown_in_the_end(script: Script) -> None:
    with edgert.load(script([b"One", b"\n", b"Us"])) as model:
        ended = model.stream([START], stop="\nUser:")
        pieces = [event.text for event in ended]
        assert ("".join(pieces), ended.completion().finish_reason) == ("One\nUs", "stop")
        assert ended.completion().text == "One\nUs"
        assert len(ended.completion().tokens) == 3
        cut = model.stream([START], stop="\nUser:", max_tokens=2)
        assert ("".join(event.text for event in cut), cut.completion().text) == ("One\n", "One\n")


def test_characters_of_several_tokens_come_whole(script: Script) -> None:
    text = "é🐙!"
    with edgert.load(script([bytes([byte]) for byte in text.encode()])) as model:
        stream = model.stream([START])
        assert [event.text for event in stream] == ["", "é", "", "", "", "🐙", "!"]
        assert stream.completion().text == text


def test_half_a_character_at_the_end_becomes_a_replacement(script: Script) -> None:
    with edgert.load(script([b"a", b"\xf0", b"\x9f"])) as model:
        stream = model.stream([START])
        assert "".join(event.text for event in stream) == stream.completion().text == "a\ufffd"
        assert model.generate([START], max_tokens=2).text == "a\ufffd"


# The numbers


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    return values - values.max() - np.log(np.exp(values - values.max()).sum())


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_those_of_the_logits(tiny: edgert.Model, temperature: float) -> None:
    options = {"temperature": temperature, "seed": 5, "repetition_penalty": 1.2}
    done = tiny.generate(PROMPT, max_tokens=10, logprobs=96, **options)
    ids = [*tiny.tokenizer.encode(PROMPT), *done.tokens]
    logits = tiny.logits(ids)
    assert logits.shape == (len(ids), 96) and logits.dtype == np.float32
    for place, (token, logprob, top) in enumerate(
        zip(done.tokens, done.logprobs, done.top_logprobs, strict=True)
    ):
        expected = log_softmax(logits[len(PROMPT) - 1 + place])
        assert logprob == pytest.approx(expected[token], abs=LOGPROB_TOLERANCE)
        assert [value for _, value in top] == pytest.approx(
            sorted(expected, reverse=True), abs=LOGPROB_TOLERANCE
        )
        assert [value for _, value in top] == pytest.approx(
            [expected[i] for i, _ in top], abs=LOGPROB_TOLERANCE
        )
        assert np.exp([value for _, value in top]).sum() == pytest.approx(1.0, abs=LOGPROB_TOLERANCE)


def test_as_many_logprobs_come_as_were_asked_for(tiny: edgert.Model) -> None:
    done = tiny.generate(PROMPT, max_tokens=4, logprobs=3)
    assert [len(top) for top in done.top_logprobs] == [3] * 4
    assert [top[0] for top in done.top_logprobs] == list(zip(done.tokens, done.logprobs, strict=True))


def test_logits_can_be_changed_without_harm(tiny: edgert.Model) -> None:
    first = tiny.logits([5, 6, 7])
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(tiny.logits([5, 6, 7]), kept)


def test_seed_repeats_a_sampled_text(tiny: edgert.Model) -> None:
    options = {"max_tokens": 25, "temperature": 1.5, "top_k": 50}
    first = tiny.generate(PROMPT, seed=11, **options)
    assert tiny.generate(PROMPT, seed=11, **options).tokens == first.tokens
    assert tiny.generate(PROMPT, seed=12, **options).tokens != first.tokens
    unseeded = tiny.generate(PROMPT, **options)
    assert tiny.generate(PROMPT, seed=unseeded.stats["seed"], **options).tokens == unseeded.tokens


def test_continued_prompt_reuses_what_was_computed_and_changes_nothing(
    tiny: edgert.Model, tiny_file: Path
) -> None:
    first = tiny.generate(PROMPT, max_tokens=6)
    prompts = [
        [*tiny.tokenizer.encode(PROMPT), *first.tokens, *tiny.tokenizer.encode(" more")],
        tiny.tokenizer.encode(PROMPT),  # shorter than what is cached
        tiny.tokenizer.encode("Once more"),  # parts after five tokens
        tiny.tokenizer.encode("xyz"),  # nothing in common
    ]
    cached = []
    for prompt in prompts:
        done = tiny.generate(prompt, max_tokens=8, temperature=0.7, seed=2)
        cached.append(done.stats["cached_prompt_tokens"])
        with edgert.load(tiny_file, threads=1) as fresh:
            again = fresh.generate(prompt, max_tokens=8, temperature=0.7, seed=2, logprobs=1)
        assert done.tokens == again.tokens
        assert again.stats["cached_prompt_tokens"] == 0
        assert tiny.generate(prompt, max_tokens=8, temperature=0.7, seed=2, logprobs=1).logprobs == (
            again.logprobs
        )
    # Of the six tokens generated the last was chosen, but never computed.
    assert cached == [len(PROMPT) + 5, len(PROMPT) - 1, 5, 0]


# Chat


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    tiny_models.write_folder(tmp_path / "chat", "llama_gqa_tied")
    config = json.dumps({"chat_template": CHATML, "bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / "chat" / "tokenizer_config.json").write_text(config, encoding="utf-8")
    edgert.convert(tmp_path / "chat", tmp_path / "chat.ert", quant="f32")
    return tmp_path / "chat.ert"


def test_chat_is_generation_from_the_rendered_conversation(chat_file: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    with edgert.load(chat_file) as model:
        ids = model.tokenizer.encode(rendered)
        assert model.chat_prompt(messages) == ids
        answer = model.chat(messages, max_tokens=10)
        assert answer.tokens == model.generate(ids, max_tokens=10).tokens
        assert answer.prompt_tokens == len(ids)


def test_malformed_conversation_is_refused(chat_file: Path) -> None:
    with edgert.load(chat_file) as model, pytest.raises(TemplateError, match="message 0 has the role"):
        model.chat([{"content": "Hi"}])


def test_chat_without_a_template_is_refused(tiny: edgert.Model) -> None:
    with pytest.raises(TemplateError, match="the model has no chat template; use plain generation"):
        tiny.chat([{"role": "user", "content": "Hi"}])


# Conversion


def test_convert_reports_and_replaces(tiny_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.ert"
    target.write_text("what was here before")
    report = edgert.convert(str(tiny_folder), str(target), quant="q8")
    assert report.path == target and report.file_bytes == target.stat().st_size
    with edgert.load(target) as model:
        assert len(model.generate(PROMPT, max_tokens=3).tokens) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model.ert"]


def test_convert_refuses_an_unknown_precision(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="quant is 'q5'; expected one of f32, f16, q8, q4"):
        edgert.convert(tiny_folder, tmp_path / "model.ert", quant="q5")
    assert not list(tmp_path.iterdir())
