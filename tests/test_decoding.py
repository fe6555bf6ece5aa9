"""The seam between the engine and its accelerations: steps of several tokens, reports, wait points."""

from pathlib import Path

import pytest

import edgert
from edgert.decoding import Commit, Report, TokenSequence
from edgert.engine import Engine
from edgert.errors import UsageError
from edgert.format import ErtFile
from edgert.generation import Generation, Turns
from edgert.planner import plan
from edgert.sampling import Sampler
from edgert.state import Weights
from edgert.tokenizer import Tokenizer
from edgert.waits import Waits

PROMPT = "Once upon"


class Threes:
    """Computes three tokens plainly and commits them in one step; every second one is a "draft"."""

    def __init__(self) -> None:
        self.steps = 0
        self.closed = False

    def begin(self, sequence: TokenSequence) -> Report:
        self.steps = 0
        return lambda: {"steps": self.steps}

    def prefill(self, sequence: TokenSequence) -> None:
        sequence.run_pending()

    def step(self, sequence: TokenSequence) -> list[Commit]:
        self.steps += 1
        made: list[Commit] = []
        for turn in range(3):
            if sequence.full:
                break
            logits = sequence.run_pending()
            assert logits is not None
            made += sequence.commit([Commit(sequence.choose(logits), "draft" if turn == 1 else "model")])
        return made

    def close(self) -> None:
        self.closed = True


class Setup:
    """A model whose engine has that decoder."""

    def __init__(self, path: Path, context: int | None = None) -> None:
        self.file = ErtFile.open(path)
        self.decoder = Threes()
        config = plan(self.file.spec, self.file.size, threads=1, context=context)
        self.engine = Engine(Weights.of_file(self.file), config, self.decoder)
        json_bytes = self.file.tokenizer_json()
        assert json_bytes is not None
        self.tokenizer = Tokenizer(json_bytes)
        self.turns = Turns()

    def stream(self, **options: object) -> Generation:
        params = edgert.SamplingParams(**options)  # type: ignore[arg-type]
        sampler = Sampler(params, self.file.spec.vocab)
        made = Generation(self.engine, self.turns, self.tokenizer, self.tokenizer.encode(PROMPT), sampler)
        self.turns.latest = made
        return made


@pytest.fixture
def setup(tiny_file: Path) -> Setup:
    return Setup(tiny_file)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 11, 12])
def test_steps_of_several_tokens_give_the_same_text(tiny: edgert.Model, setup: Setup, count: int) -> None:
    plain = tiny.generate(PROMPT, max_tokens=count)
    stream = setup.stream(max_tokens=count)
    events = list(stream)
    done = stream.completion()
    assert (done.tokens, done.text, done.finish_reason) == (plain.tokens, plain.text, "length")
    assert [event.source for event in events] == (["model", "draft", "model"] * 4)[:count]
    assert done.stats["steps"] == -(-count // 3)


def test_sampled_steps_of_several_tokens_give_the_same_text(tiny: edgert.Model, setup: Setup) -> None:
    plain = tiny.generate(PROMPT, max_tokens=20, temperature=1.1, seed=4)
    stream = setup.stream(max_tokens=20, temperature=1.1, seed=4)
    assert tuple(event.token for event in stream) == plain.tokens


def test_a_stop_string_inside_a_step_ends_the_answer_there(tiny: edgert.Model, setup: Setup) -> None:
    text = tiny.generate(PROMPT, max_tokens=12).text
    stop = text[4]
    plain = tiny.generate(PROMPT, max_tokens=12, stop=stop)
    stream = setup.stream(max_tokens=12, stop=(stop,))
    list(stream)
    done = stream.completion()
    assert (done.tokens, done.text, done.finish_reason) == (plain.tokens, plain.text, "stop")


def test_a_step_may_fill_the_context(tiny_file: Path) -> None:
    for context in range(len(PROMPT) + 1, len(PROMPT) + 6):
        with edgert.load(tiny_file, threads=1, context=context) as model:
            plain = model.generate(PROMPT, max_tokens=30)
        small = Setup(tiny_file, context)
        stream = small.stream(max_tokens=30)
        list(stream)
        assert stream.completion().tokens == plain.tokens
        assert stream.completion().text == plain.text
        assert stream.completion().finish_reason == "length"


def test_tokens_nobody_took_are_lost_with_their_stream(setup: Setup) -> None:
    old = setup.stream(max_tokens=9)
    next(old)
    new = setup.stream(max_tokens=9)
    with pytest.raises(UsageError, match="this stream ended"):
        next(old)
    assert len(old.completion().tokens) == 1
    assert len(list(new)) == 9
    assert old.completion().stats["cached_prompt_tokens"] == 0
    assert new.completion().stats["cached_prompt_tokens"] == len(PROMPT) - 1


def test_engine_closes_its_decoder(setup: Setup) -> None:
    setup.engine.close()
    assert setup.decoder.closed


# ---- wait points -----------------------------------------------------------------------------


class Arrival:
    """Data that is there after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.blocked = 0

    def ready(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def block(self) -> None:
        self.blocked += 1


def test_no_idle_work_where_nothing_is_waited_for() -> None:
    waits, done = Waits(), []
    waits.idle = lambda: done.append(1) or True  # type: ignore[func-returns-value]
    waits.until(Arrival(0).ready, pytest.fail)
    assert not done and waits.waited_s == waits.used_s == 0


def test_idle_work_is_done_piece_by_piece_until_the_data_comes() -> None:
    waits, done, data = Waits(), [], Arrival(5)
    waits.idle = lambda: done.append(1) or True  # type: ignore[func-returns-value]
    waits.until(data.ready, data.block)
    assert len(done) == 4 and not data.blocked  # the first look, and one before each piece
    assert waits.waited_s >= waits.used_s > 0


@pytest.mark.parametrize("pieces", [None, 0, 2])
def test_a_wait_sleeps_when_there_is_nothing_left_to_do(pieces: int | None) -> None:
    waits, data, done = Waits(), Arrival(10), []
    if pieces is not None:
        waits.idle = lambda: len(done) < pieces and (done.append(1) or True)  # type: ignore[func-returns-value]
    waits.until(data.ready, data.block)
    assert data.blocked == 1 and len(done) == (pieces or 0)
