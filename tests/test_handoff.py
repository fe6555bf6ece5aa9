"""Edge and cloud together: whatever is handed over, and however, the tokens are the whole model's."""

import importlib.util
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.config import EngineConfig
from edgert.errors import DeviceError, LinkError, ModelFileError, OptionError
from edgert.events import TokenEvent
from edgert.format import ErtFile
from edgert.handoff.setup import HandoffConfig
from edgert.kernels import target
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests.handoff_models import LAYER, Files, Server, count, random_tokens, serving, write_files
from tests.test_lowerings import TARGETS

PATIENT: dict[str, Any] = {"deadline_s": 120.0}  # on a busy machine nothing is to fall back
SAMPLED = {"max_tokens": 30, "temperature": 1.3, "top_k": 30, "seed": 5, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def files(handoff_files: Files) -> Files:
    return handoff_files


@pytest.fixture(scope="module")
def cloud(files: Files) -> Iterator[Server]:
    with serving(files.cloud) as server:
        yield server


@pytest.fixture(scope="module")
def whole_cloud(files: Files) -> Iterator[Server]:
    with serving(files.whole) as server:
        yield server


def events(
    path: Path, prompt: Sequence[int], config: HandoffConfig | None, **options: Any
) -> list[TokenEvent]:
    with edgert.load(path, threads=1, handoff=config) as model:
        return list(model.stream(prompt, **options))


def tokens(
    path: Path, prompt: Sequence[int], config: HandoffConfig | None = None, **options: Any
) -> list[int]:
    return [event.token for event in events(path, prompt, config, **options)]


# ---- everything handed over ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_tokens": 30}, SAMPLED], ids=["greedy", "sampled"])
def test_all_handed_over_is_the_whole_model(files: Files, cloud: Server, options: dict[str, Any]) -> None:
    prompt = random_tokens("one", 20, 80)
    expected = events(files.whole, prompt, None, logprobs=3, **options)
    found = events(files.edge, prompt, HandoffConfig(**PATIENT, cloud=cloud.address), logprobs=3, **options)
    assert [(e.token, e.logprob, e.top) for e in found] == [(e.token, e.logprob, e.top) for e in expected]
    assert {e.source for e in found} == {"cloud"}


def test_an_unsplit_file_serves_as_either_half(files: Files, cloud: Server, whole_cloud: Server) -> None:
    prompt = random_tokens("two", 9, 80)
    expected = tokens(files.whole, prompt, **SAMPLED)
    assert (
        tokens(files.edge, prompt, HandoffConfig(**PATIENT, cloud=whole_cloud.address), **SAMPLED) == expected
    )
    assert tokens(files.whole, prompt, HandoffConfig(**PATIENT, cloud=cloud.address), **SAMPLED) == expected
    by_one = HandoffConfig(**PATIENT, cloud=whole_cloud.address, layer=1)
    assert tokens(files.whole, prompt, by_one, **SAMPLED) == expected


def test_a_prompt_of_several_chunks_and_a_full_context(files: Files, cloud: Server) -> None:
    prompt = random_tokens("long", 50, 80)
    expected = tokens(files.whole, prompt, max_tokens=99)
    assert len(expected) == 64 - 50 + 1
    with edgert.load(
        files.edge, threads=1, chunk=8, handoff=HandoffConfig(**PATIENT, cloud=cloud.address)
    ) as model:
        done = model.generate(prompt, max_tokens=99)
    assert list(done.tokens) == expected and done.finish_reason == "length"


def test_a_prompt_that_goes_on_is_sent_only_in_its_new_part(files: Files, cloud: Server) -> None:
    prompt = random_tokens("chat", 40, 80)
    with edgert.load(files.edge, threads=1, handoff=HandoffConfig(**PATIENT, cloud=cloud.address)) as model:
        first = model.generate(prompt, **(SAMPLED | {"max_tokens": 6}))
        longer = [*prompt, *first.tokens, 7, 8, 9]
        second = model.generate(longer, **(SAMPLED | {"max_tokens": 6}))
        other = model.generate([*prompt[:20], 5], **(SAMPLED | {"max_tokens": 6}))
    assert list(second.tokens) == tokens(files.whole, longer, **(SAMPLED | {"max_tokens": 6}))
    assert list(other.tokens) == tokens(files.whole, [*prompt[:20], 5], **(SAMPLED | {"max_tokens": 6}))
    assert second.stats["bytes_up"] < first.stats["bytes_up"] / 2
    computed = [done.stats["cloud_layer_tokens"] for done in (first, second)]
    assert computed == [45, 9]  # one layer; of the second only the rows that are new


# ---- exits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["top", "margin", "entropy", "quantile"])
def test_exits_over_the_wire_are_those_of_the_whole_model(files: Files, cloud: Server, rule: Any) -> None:
    prompt = random_tokens("exits", 12, 80)
    here = HandoffConfig("local", budget=0.5, rule=rule)
    there = HandoffConfig("collaborative", cloud.address, **PATIENT, budget=0.5, rule=rule)
    expected = events(files.whole, prompt, here, **SAMPLED)
    found = events(files.edge, prompt, there, **SAMPLED)
    named = {"exit": "exit", "model": "cloud"}
    assert [(e.token, e.logprob, e.source) for e in found] == [
        (e.token, e.logprob, named[e.source]) for e in expected
    ]
    assert {e.source for e in found} == {"exit", "cloud"}


@pytest.mark.compiled
def test_each_token_is_the_choice_of_whoever_gave_it(files: Files) -> None:
    """Deferred rows leave no trace: every token follows from one pass over the whole text."""
    prompt = random_tokens("deferral", 5, 80)
    for chunk in (64, 3):
        config = HandoffConfig("local", budget=0.5)
        with edgert.load(files.whole, threads=1, chunk=chunk, handoff=config) as model:
            given = list(model.stream(prompt, max_tokens=40, repetition_penalty=1.5))
            stats = model.generate(prompt, max_tokens=40, repetition_penalty=1.5).stats
        assert {e.source for e in given} == {"exit", "model"}
        assert stats["exits"] + stats["handoffs"] == 40
        check_against_one_pass(files.whole, prompt, given, 1.5)


def check_against_one_pass(
    path: Path, prompt: list[int], given: Sequence[TokenEvent], penalty: float = 1.0
) -> None:
    """Each token is what its source, the exit or the whole model, chooses after those before it."""
    text = [*prompt, *(event.token for event in given)][:-1]
    with ErtFile.open(path) as file:
        forward = Forward(Weights.of_file(file), EngineConfig(1, 64, 64))
        try:
            exits = forward.run(text, layers=(0, LAYER), outputs=range(len(text))).copy()
            full = forward.run(text, layers=(LAYER, 3), outputs=range(len(text))).copy()
        finally:
            forward.close()
    for index, event in enumerate(given):
        row = len(prompt) - 1 + index
        logits = (exits if event.source == "exit" else full)[row].copy()
        seen = sorted(set(text[: row + 1]))
        if penalty != 1:
            values = logits[seen].astype(np.float64)
            logits = logits.astype(np.float64)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        assert int(logits.argmax()) == event.token, index


def test_an_agreement_of_one_never_exits_and_a_low_one_often_does(files: Files, cloud: Server) -> None:
    prompt = random_tokens("agreement", 12, 80)
    shares = []
    for agreement in (1.0, 0.9, 0.3):
        config = HandoffConfig(**PATIENT, cloud=cloud.address, agreement=agreement)
        found = events(files.edge, prompt, config, **SAMPLED)
        shares.append(sum(e.source == "exit" for e in found))
    assert shares[0] == 0 and shares[0] <= shares[1] <= shares[2] and shares[2] > 20


@pytest.mark.compiled
def test_a_time_for_each_token_decides_how_many_are_handed_over(files: Files, cloud: Server) -> None:
    prompt = random_tokens("time", 12, 80)
    expected = tokens(files.whole, prompt, **SAMPLED)
    config = HandoffConfig(**PATIENT, cloud=cloud.address, time_budget_s=600)
    with edgert.load(files.edge, threads=1, handoff=config) as model:
        done = model.generate(prompt, **SAMPLED)
    assert list(done.tokens) == expected and done.stats["handoffs"] == 30  # there is time for all of them
    assert done.stats["handoff_share"] == 1 and done.stats["exit_s"] > 0 and done.stats["handoff_s"] > 0
    for mode, path in (("local", files.whole), ("collaborative", files.edge)):
        config = HandoffConfig(mode, cloud.address, **PATIENT, time_budget_s=1e-7)  # type: ignore[arg-type]
        with edgert.load(path, threads=1, handoff=config) as model:
            stats = model.generate(prompt, **SAMPLED).stats
        assert stats["handoffs"] == 2 and stats["exits"] == 28  # after the prompt, and to measure one
        assert stats["handoff_share"] == 0


def test_a_schedule_leaves_ever_earlier_and_each_token_is_its_layer_s(files: Files) -> None:
    prompt = random_tokens("schedule", 20, 80)
    config = HandoffConfig("local", schedule=1)
    with edgert.load(files.whole, threads=1, chunk=8, handoff=config) as model:
        stream = model.stream(prompt, max_tokens=12, repetition_penalty=1.5)
        given = list(stream)
        stats = stream.completion().stats
        # Another text that begins the same: what left early is of no use to it.
        longer = [*prompt, *(e.token for e in given[:8])]
        again = model.generate(longer, max_tokens=1)
    levels = [3] * 4 + [2] * 4 + [1] * 4
    assert [e.source for e in given] == ["model"] * 4 + ["exit"] * 8
    assert stats["exits"] == 8 and stats["layer_tokens"] == 3 * (20 + 3) + 2 * 4 + 4
    assert again.stats["cached_prompt_tokens"] == 23
    assert list(again.tokens) == tokens(files.whole, longer, max_tokens=1)
    text = [*prompt, *(event.token for event in given)][:-1]
    with ErtFile.open(files.whole) as file:
        forward = Forward(Weights.of_file(file), EngineConfig(1, 64, 64))
        for index, (event, level) in enumerate(zip(given, levels, strict=True)):
            # An earlier row had at least these layers, so one pass through them is the same.
            row = len(prompt) - 1 + index
            forward.cache.rewind(0)
            logits = forward.run(text[: row + 1], layers=(0, level), outputs=[row])[0].astype(np.float64)
            seen = sorted(set(text[: row + 1]))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
            assert int(logits.argmax()) == event.token, index
        forward.close()


# ---- modes -----------------------------------------------------------------------------------


def test_local_answers_from_the_exit_and_opens_no_link(files: Files, cloud: Server) -> None:
    prompt = random_tokens("local", 12, 80)
    before = count(cloud, "edgert_received_bytes_total")
    # An address that is given, by a habit or a script, changes nothing.
    with edgert.load(files.edge, threads=1, handoff=HandoffConfig("local", cloud.address)) as model:
        assert "edgert-link" not in {thread.name for thread in threading.enumerate()}
        given = list(model.stream(prompt, max_tokens=30))
    assert {e.source for e in given} == {"exit"} and not any(e.fallback for e in given)
    check_against_one_pass(files.whole, prompt, given)
    assert count(cloud, "edgert_received_bytes_total") == before


def test_a_cloud_with_all_layers_answers_everything(files: Files, whole_cloud: Server) -> None:
    prompt = random_tokens("cloud", 12, 80)
    asked = count(whole_cloud, "edgert_questions_total")
    config = HandoffConfig("cloud", whole_cloud.address, **PATIENT)
    with edgert.load(files.edge, threads=1, handoff=config) as model:
        done = model.generate(prompt, **SAMPLED)
        again = model.generate([*prompt, *done.tokens[:4]], **(SAMPLED | {"max_tokens": 3}))
    assert list(done.tokens) == tokens(files.whole, prompt, **SAMPLED)
    assert list(again.tokens) == tokens(
        files.whole, [*prompt, *done.tokens[:4]], **(SAMPLED | {"max_tokens": 3})
    )
    # It went on by itself: 30 tokens, and not one question for each.
    assert count(whole_cloud, "edgert_questions_total") - asked < 10


def test_a_draft_on_the_board_is_verified_by_the_cloud_s_model(files: Files, whole_cloud: Server) -> None:
    """The draft is another model with the same tokenizer; the text is the cloud's."""
    prompt = random_tokens("draft", 12, 80)
    for options in ({"max_tokens": 30}, SAMPLED):
        expected = events(files.whole, prompt, None, logprobs=2, **options)
        with edgert.load(
            files.small, threads=1, handoff=HandoffConfig("draft", whole_cloud.address, **PATIENT)
        ) as model:
            stream = model.stream(prompt, logprobs=2, **options)
            found = list(stream)
            stats = stream.completion().stats
            longer = [*prompt, *(e.token for e in found[:9]), 5]
            again = model.generate(longer, **(SAMPLED | {"max_tokens": 5})).tokens
        assert [(e.token, e.logprob, e.top) for e in found] == [(e.token, e.logprob, e.top) for e in expected]
        assert list(again) == tokens(files.whole, longer, **(SAMPLED | {"max_tokens": 5}))
        assert {e.source for e in found} == {"draft", "cloud"}
        assert 0 < stats["accepted"] < stats["drafted"] and stats["handoffs"] < 30


def test_a_draft_without_a_cloud_goes_on_alone_and_says_so(files: Files) -> None:
    config = HandoffConfig("draft", "127.0.0.1:1", deadline_s=0.1)
    found = events(files.small, [5, 6, 7], config, max_tokens=6)
    assert {(e.source, e.fallback) for e in found} == {("model", "link")}
    assert [e.token for e in found] == tokens(files.small, [5, 6, 7], max_tokens=6)


# ---- the wire --------------------------------------------------------------------------------


def test_a_narrow_wire_costs_bytes_in_proportion_and_little_agreement(files: Files, cloud: Server) -> None:
    prompt = random_tokens("wire", 20, 80)
    expected = tokens(files.whole, prompt, max_tokens=20, repetition_penalty=1.5)
    sizes, alike = [], []
    for wire in ("f32", "f16", "int8"):
        config = HandoffConfig(**PATIENT, cloud=cloud.address, wire=wire)
        with edgert.load(files.edge, threads=1, handoff=config) as model:
            done = model.generate(prompt, max_tokens=20, repetition_penalty=1.5)
        sizes.append(done.stats["bytes_up"])
        alike.append(sum(a == b for a, b in zip(done.tokens, expected, strict=True)))
    assert alike[0] == 20
    assert sizes[0] > sizes[1] > sizes[2]
    values = 39 * 40  # rows sent, width
    assert sizes[0] - sizes[1] == pytest.approx(2 * values, abs=200)
    assert sizes[1] - sizes[2] == pytest.approx(values - 39 * 4, abs=200)


# ---- refusals --------------------------------------------------------------------------------


def test_another_model_s_edge_is_refused(files: Files, cloud: Server, tmp_path: Path) -> None:
    other = write_files(tmp_path, "f16")
    with edgert.load(other.edge, threads=1, handoff=HandoffConfig(**PATIENT, cloud=cloud.address)) as model:
        given = list(model.stream([5, 6, 7], max_tokens=2))
    assert {e.fallback for e in given} == {"refused"}
    with pytest.raises(LinkError, match="found an edge of the model"):
        tokens(other.whole, [5, 6, 7], HandoffConfig("cloud", cloud.address, **PATIENT), max_tokens=2)


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("cloud", {"cloud": "127.0.0.1:1"}, "cloud half of a model"),
        ("edge", {"cloud": "127.0.0.1:1", "layer": 1}, "layer is 1; expected 2"),
        ("whole", {"cloud": "127.0.0.1:1", "layer": 3}, "layer is 3; expected 1 to 2"),
        ("whole", {"cloud": "example.org:1"}, "give --tls FOLDER"),
        ("whole", {"cloud": "127.0.0.1"}, "expected HOST:PORT"),
        ("whole", {}, "mode collaborative needs the cloud half's address"),
        ("whole", {"mode": "local", "agreement": 2.0}, "agreement is 2; expected"),
        ("whole", {"mode": "local", "budget": -1.0}, "budget is -1; expected"),
        ("whole", {"mode": "local", "budget": 0.5, "agreement": 0.5}, "give one of them"),
        ("whole", {"mode": "local", "budget": 0.5, "time_budget_s": 1.0}, "give one of them"),
        ("whole", {"mode": "local", "time_budget_s": 0.0}, "time budget is 0 s; expected"),
        ("whole", {"mode": "local", "schedule": 3}, r"schedule is 3; expected one of the exits \[1, 2\]"),
        ("edge", {"mode": "local", "schedule": 1}, "of a whole model"),
        ("whole", {"mode": "local", "schedule": 1, "budget": 0.1}, "takes the place of"),
        ("whole", {"mode": "remote"}, "mode is 'remote'; expected one of local"),
        ("whole", {"mode": "local", "wire": "f8"}, "wire is 'f8'; expected one of f32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    files: Files, which: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((OptionError, ModelFileError), match=message):
        edgert.load(getattr(files, which), handoff=HandoffConfig(**options))


def test_without_the_packages_the_cloud_is_refused_and_exits_work(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "grpc" else found(name, *a)
    )
    with pytest.raises(DeviceError, match=r"found no grpc.*pip install 'edgert\[cloud\]'"):
        edgert.load(files.edge, handoff=HandoffConfig(cloud="127.0.0.1:1"))
    assert len(tokens(files.edge, [5, 6], HandoffConfig("local"), max_tokens=3)) == 3


# ---- two machines ----------------------------------------------------------------------------


EDGE = """
import json, sys
import edgert
from edgert.handoff.setup import HandoffConfig
from edgert.kernels import target
path, prompt, options, *configs = map(json.loads, sys.argv[1:])
for config in configs:
    with edgert.load(path, threads=1, handoff=HandoffConfig(**config)) as model:
        given = [(e.token, e.logprob, e.source) for e in model.stream(prompt, **options)]
    print(json.dumps([target.lowering().name, given]))
"""


@pytest.mark.compiled
@pytest.mark.slow
def test_an_edge_and_a_cloud_of_other_instruction_sets_are_the_whole_model(
    files: Files, cloud: Server, avx2_cache: Path
) -> None:
    """Two processes: the cloud half with the host's kernels, the edge half with those of AVX2."""
    if "avx2" not in TARGETS or target.lowering().name == "avx2":
        pytest.skip("needs a host that can run AVX2 and has more")
    prompt = random_tokens("two machines", 20, 80)
    there = {"cloud": cloud.address, "deadline_s": 600}
    arguments = [str(files.edge), prompt, SAMPLED, there, there | {"budget": 0.5}]
    environment = TARGETS["avx2"][1] | {"EDGERT_CACHE_DIR": str(avx2_cache)}
    out, _ = inputs.run_python(EDGE, *map(json.dumps, arguments), **environment)
    (kernels, everything), (_, some) = map(json.loads, out.splitlines())
    assert kernels == "avx2"
    whole = events(files.whole, prompt, None, **SAMPLED)
    assert everything == [[e.token, e.logprob, "cloud"] for e in whole]
    named = {"exit": "exit", "model": "cloud"}
    expected = events(files.whole, prompt, HandoffConfig("local", budget=0.5), **SAMPLED)
    assert some == [[e.token, e.logprob, named[e.source]] for e in expected]
    assert {source for _, _, source in some} == {"exit", "cloud"}
