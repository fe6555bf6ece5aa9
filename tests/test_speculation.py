"""Speculation changes how fast tokens come, and nothing else."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import edgert
from edgert.config import SamplingParams
from edgert.converters.exits import fingerprint
from edgert.converters.safetensors_source import open_shard
from edgert.decoding import TokenSequence
from edgert.engine import Engine
from edgert.errors import MemoryBudgetError, ModelFileError, OptionError
from edgert.format import ErtFile
from edgert.planner import plan
from edgert.runtime import Model
from edgert.sampling import Choice, Sampler
from edgert.speculation import drafting
from edgert.speculation.decoder import Speculation
from edgert.state import Weights
from tests import tiny_models
from tests.conftest import Outcome

TWINS: bool = numba.config.DISABLE_JIT
COUNT = 16 if TWINS else 44
PROMPTS = ("Once upon", "abcabcabcab", "the cat and the dog and the cat")
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.1, "seed": 5},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 6},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 7},
)
CALIBRATION = {"temperature": 1.0, "confidence": [0.0], "tokens": [1], "agreed": [1]}

# The draft of each target: another precision, another seed, another size, and one of another context.
TARGETS = (
    "llama_mqa_odd_sizes",
    "mistral_window",
    "qwen2_gqa_tied",
    "qwen3_alternating_windows",
    "qwen2_moe_shared",
    "olmoe_mha",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Converts a tiny model, with exits after all layers but the last; each once."""
    folder, made = tmp_path_factory.mktemp("speculation"), dict[tuple[str, str], Path]()

    def make(name: str, quant: str) -> Path:
        if (name, quant) not in made:
            source = folder / name
            if not source.exists():
                tiny_models.write_folder(source, name)
                if name != tiny_models.SHARDED:
                    write_lens(source, tiny_models.CONFIGS[name]["num_hidden_layers"])
            path = folder / f"{name}-{quant}.ert"
            edgert.convert(source, path, quant=quant)  # type: ignore[arg-type]
            made[name, quant] = path
        return made[name, quant]

    return make


def write_lens(source: Path, layers: int) -> None:
    """Exits that read the hidden state as the last layer's would be: with small layers, nearly right."""
    norm = load_file(source / "model.safetensors")["model.norm.weight"].astype(np.float32)
    tensors = {}
    for layer in range(1, layers):
        tensors[f"exits.{layer}.matrix"] = np.zeros((norm.size, norm.size), np.float32)
        tensors[f"exits.{layer}.norm"] = np.ones(norm.size, np.float32)
        tensors[f"exits.{layer}.output_norm"] = norm
    exits = {str(layer): CALIBRATION for layer in range(1, layers)}
    stored = open_shard(source / "model.safetensors")["model.norm.weight"]
    metadata = {"model": fingerprint(stored), "exits": json.dumps(exits)}
    save_file(tensors, source / "exits.safetensors", metadata)


@contextmanager
def guessing(
    path: Path, draft: Any, *, always: bool = True, threads: int = 1, **options: Any
) -> Iterator[Model]:
    """A model that guesses ahead: at every step, unless told otherwise."""
    file = ErtFile.open(path)
    tree, learn = options.pop("tree", 12), options.pop("learn", False)
    made = drafting(file, draft, tree=tree, threads=threads, learn=learn)
    with Model(
        file,
        plan(file.spec, file.size, threads=threads, **options),
        made.decoder(file.spec, always),
    ) as model:
        yield model


def same(plain: edgert.Completion, guessed: edgert.Completion) -> None:
    """The same tokens, text, log-probabilities and end."""
    assert guessed.tokens == plain.tokens
    assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
    assert (guessed.logprobs, guessed.top_logprobs) == (plain.logprobs, plain.top_logprobs)


@pytest.mark.parametrize("target", TARGETS[:1] if TWINS else TARGETS)
@pytest.mark.parametrize("drafter", ["lookup", "exit", "model", "lookup+model"])
def test_greedy_tokens_are_those_of_plain_decoding(
    files: Callable[[str, str], Path], target: str, drafter: str
) -> None:
    if drafter == "exit" and target == tiny_models.SHARDED:
        pytest.skip("this one has no exits")
    path = files(target, "q8")
    names = [str(files(target, "q4")) if name == "model" else name for name in drafter.split("+")]
    taken = 0
    with edgert.load(path, threads=1) as plain, guessing(path, names) as guesser:
        for prompt in PROMPTS:
            done = guesser.generate(prompt, max_tokens=COUNT, logprobs=2)
            same(plain.generate(prompt, max_tokens=COUNT, logprobs=2), done)
            taken += sum(done.stats["taken"].values())
            assert done.stats["draft"] == drafter
    assert taken > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("quant", ["f32", "f16", "q8", "q4"])
@pytest.mark.compiled
def test_precision_and_threads_do_not_matter(
    files: Callable[[str, str], Path], quant: str, threads: int
) -> None:
    path = files("llama_mqa_odd_sizes", quant)
    draft = ["lookup", files("llama_mqa_odd_sizes", "q4")]
    with edgert.load(path, threads=1) as plain, guessing(path, draft, threads=threads) as guesser:
        for prompt in PROMPTS:
            same(plain.generate(prompt, max_tokens=COUNT), guesser.generate(prompt, max_tokens=COUNT))


@pytest.mark.parametrize("kv", ["f16"] if TWINS else ["f16", "q8", "q4"])
@pytest.mark.parametrize("options", SAMPLED[1:2] if TWINS else SAMPLED)
@pytest.mark.parametrize("drafter", ["lookup", "exit", "model"])
def test_sampled_tokens_are_those_of_plain_decoding_with_the_same_seed(
    files: Callable[[str, str], Path], drafter: str, options: dict[str, Any], kv: Any
) -> None:
    path = files("llama_mqa_odd_sizes", "f32")
    draft = str(files("llama_mqa_odd_sizes", "q8")) if drafter == "model" else drafter
    with edgert.load(path, threads=1, kv=kv) as plain, guessing(path, draft, kv=kv) as guesser:
        for prompt in PROMPTS[: 1 if TWINS else 3]:
            wanted = dict(options, max_tokens=COUNT, logprobs=1)
            same(plain.generate(prompt, **wanted), guesser.generate(prompt, **wanted))


@pytest.mark.parametrize("tree", [3] if TWINS else [2, 3, 64])
@pytest.mark.parametrize("always", [True, False])
def test_the_bundled_model_with_itself_as_draft(tmp_path: Path, tree: int, always: bool) -> None:
    folder = Path(str(resources.files("edgert") / "assets" / "draft"))
    edgert.convert(folder, tmp_path / "target.ert", "q8")
    edgert.convert(folder, tmp_path / "target.draft.ert", "q4")
    prompt, count = "Once upon a time", 12 if TWINS else 120
    with edgert.load(tmp_path / "target.ert", threads=1) as plain:
        expected = plain.generate(prompt, max_tokens=count)
    with guessing(tmp_path / "target.ert", "auto", always=always, tree=tree) as guesser:
        done = guesser.generate(prompt, max_tokens=count)
        same(expected, done)
        stats = done.stats
        assert stats["draft"] == "lookup+model"
        assert 1 <= stats["accepted_per_step"] <= tree
        assert stats["verified"] >= sum(stats["taken"].values())
        if always and tree == 64:
            assert stats["accepted_per_step"] > 3
        if always:
            events = list(guesser.stream(prompt, max_tokens=count))
            assert sum(event.source == "draft" for event in events) > count / 3
            assert {event.source for event in events} == {"draft", "model"}


def test_a_sequence_that_goes_on_and_one_that_does_not(files: Callable[[str, str], Path]) -> None:
    """Caches are kept between prompts, the draft's as well: what was accepted, and what was refused."""
    path, draft = files("llama_mqa_odd_sizes", "q8"), files("llama_mqa_odd_sizes", "q4")
    with edgert.load(path, threads=1) as plain, guessing(path, ["lookup", draft]) as guesser:
        prompt = plain.tokenizer.encode("Once upon")
        for extra in ("", " a", "zz"):
            expected = plain.generate(prompt, max_tokens=9)
            same(expected, guesser.generate(prompt, max_tokens=9))
            prompt = [*prompt, *expected.tokens, *plain.tokenizer.encode(extra, add_special=False)]
        same(plain.generate("abc", max_tokens=9), guesser.generate("abc", max_tokens=9))
        stream = guesser.stream("Once upon", max_tokens=9)
        next(stream)
        same(plain.generate("Once upon", max_tokens=9), guesser.generate("Once upon", max_tokens=9))


@pytest.mark.compiled
@pytest.mark.parametrize("drafter", ["lookup", "exit", "model"])
def test_the_end_of_the_context_and_of_the_answer(files: Callable[[str, str], Path], drafter: str) -> None:
    path = files("llama_mqa_odd_sizes", "q8")
    draft = str(files("llama_mqa_odd_sizes", "q4")) if drafter == "model" else drafter
    prompt = "aaaaaaaa"
    for context in range(len(prompt) + 1, len(prompt) + 8):
        with (
            edgert.load(path, threads=1, context=context) as plain,
            guessing(path, draft, context=context) as guesser,
        ):
            same(plain.generate(prompt, max_tokens=50), guesser.generate(prompt, max_tokens=50))
    with edgert.load(path, threads=1) as plain, guessing(path, draft) as guesser:
        whole = plain.generate(prompt, max_tokens=12)
        for count in range(1, 12):
            same(plain.generate(prompt, max_tokens=count), guesser.generate(prompt, max_tokens=count))
        stop = whole.text[5:7]
        same(
            plain.generate(prompt, max_tokens=12, stop=stop),
            guesser.generate(prompt, max_tokens=12, stop=stop),
        )


@pytest.mark.compiled
def test_an_end_token_among_the_guesses_ends_the_answer(tmp_path: Path) -> None:
    """Every token the model says is an end token in turn, so one of them is met inside a tree."""
    config = dict(tiny_models.CONFIGS["llama_mqa_odd_sizes"])
    tensors = tiny_models.weights(config, 3)
    for end in range(30, 60, 6):
        folder = tmp_path / str(end)
        tiny_models.write_model(folder, config | {"eos_token_id": [2, end, end + 1, end + 2]}, tensors)
        edgert.convert(folder, folder / "m.ert", "f32")
        with (
            edgert.load(folder / "m.ert", threads=1) as plain,
            guessing(folder / "m.ert", ["lookup", folder / "m.ert"]) as guesser,
        ):
            for prompt in PROMPTS:
                same(plain.generate(prompt, max_tokens=25), guesser.generate(prompt, max_tokens=25))


# ---- the distribution ------------------------------------------------------------------------

CHOICES = 3  # top-k: few enough tokens that every text of DEPTH tokens comes often enough to count
DEPTH = 3


def exact_shares(model: Model, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every text of DEPTH tokens, from the logits."""
    sampler, shares = Sampler(params, model.spec.vocab), {(): 1.0}
    for depth in range(DEPTH):
        longer = {}
        for text, share in shares.items():
            logits = model.logits([*prompt, *text])[-1]
            chosen = sampler.distribution(logits, prompt, text)
            for token in np.flatnonzero(chosen).tolist():
                longer[(*text, token)] = share * float(chosen[token])
        shares = longer
        assert len(shares) <= CHOICES ** (depth + 1)
    return shares


def surprise(counts: dict[tuple[int, ...], int], shares: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations Pearson's chi-square lies above its mean; texts that cannot be: inf."""
    total = sum(counts.values())
    if any(text not in shares for text in counts):
        return float("inf")
    chi = sum((counts.get(text, 0) - total * share) ** 2 / (total * share) for text, share in shares.items())
    freedom = len(shares) - 1
    return float((chi - freedom) / np.sqrt(2 * freedom))


def drawn(engine: Engine, prompt: list[int], params: SamplingParams, runs: int) -> dict[tuple[int, ...], int]:
    """How often each text came, with seeds from the operating system."""
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(runs):
        engine.start(prompt, Sampler(params, engine.forward.spec.vocab))
        while len(engine.sequence.tokens) < len(prompt) + DEPTH:
            engine.step()
        text = tuple(engine.sequence.tokens[len(prompt) : len(prompt) + DEPTH])
        counts[text] = counts.get(text, 0) + 1
    return counts


def believe_the_draft(
    choose: Callable[..., Choice],
    sequence: TokenSequence,
    logits: NDArray[np.float32],
    path: Sequence[int] = (),
) -> Choice:
    """A wrong rule: behind an accepted guess, the most probable token."""
    if path:
        return Choice(int(logits.argmax()), 0.0, ())
    return choose(sequence, logits, path)


@pytest.mark.compiled
@pytest.mark.parametrize("drafter", ["lookup", "exit", "model"])
@pytest.mark.parametrize("broken", [False, True])
def test_sampled_texts_have_the_distribution_of_the_target(
    files: Callable[[str, str], Path], drafter: str, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the seeds: a right verification is refused once in some 10^9 runs, a wrong one is found."""
    if broken:
        wrong = partial(believe_the_draft, TokenSequence.choose)
        monkeypatch.setattr(TokenSequence, "choose", lambda *arguments: wrong(*arguments))
    path = files("llama_mqa_odd_sizes", "f32")
    draft = str(files("llama_mqa_odd_sizes", "q8")) if drafter == "model" else drafter
    params = SamplingParams(temperature=1.3, top_k=CHOICES, top_p=0.98, max_tokens=DEPTH)
    with edgert.load(path, threads=1) as plain:
        prompt = plain.tokenizer.encode("abcabcabc")
        shares = exact_shares(plain, prompt, params)
    assert min(shares.values()) * 3000 > 5  # each text often enough for Pearson's approximation
    with ErtFile.open(path) as file:
        decoder = drafting(file, draft, tree=8, threads=1).decoder(file.spec, always=True)
        engine = Engine(Weights.of_file(file), plan(file.spec, file.size, threads=1), decoder)
        found = surprise(drawn(engine, prompt, params, 3000), shares)
        engine.close()
    assert (found > 20) if broken else (found < 8)


# ---- what is asked for -----------------------------------------------------------------------


def test_a_draft_with_another_tokenizer_is_refused(files: Callable[[str, str], Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_models.write_folder(other, "llama_head_dim")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    changed = json.loads(text)
    vocab = changed["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    (other / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    edgert.convert(other, tmp_path / "other.ert", "q4")
    target = files("llama_mqa_odd_sizes", "q8")
    first = min(vocab["x"], vocab["y"])
    with pytest.raises(ModelFileError, match=rf"token {first} is '[xy]', but '[xy]' in .*train draft"):
        edgert.load(target, draft=tmp_path / "other.ert")


def test_a_draft_of_other_spelling_but_the_same_tokens_is_taken(
    files: Callable[[str, str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_models.write_folder(other, "llama_head_dim")
    text = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    (other / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    edgert.convert(other, tmp_path / "other.ert", "q4")
    with edgert.load(files("llama_mqa_odd_sizes", "q8"), draft=tmp_path / "other.ert") as model:
        assert model.generate("Once upon", max_tokens=4).stats["draft"] == "model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "exit"}, "has no exits to draft with; train them with `edgert train exits`"),
        ({"draft": "lookup", "tree": 1}, "tree is 1; expected 2 to 64 nodes"),
        ({"draft": "lookup", "tree": 65}, "tree is 65; expected 2 to 64 nodes"),
        ({"draft": []}, "draft names nothing"),
        ({"draft": ["a.ert", "b.ert"]}, "draft names 2 files; expected at most one"),
        ({"tree": 8}, "belong to a draft; give draft as well"),
        ({"draft_store": "s.npy"}, "belong to a draft; give draft as well"),
    ],
)
def test_wrong_drafts_are_refused(tiny_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        edgert.load(tiny_file, **options)


def test_the_draft_counts_towards_the_memory(files: Callable[[str, str], Path]) -> None:
    target, draft = files("llama_mqa_odd_sizes", "q8"), files("llama_mqa_odd_sizes", "q4")
    with pytest.raises(MemoryBudgetError) as alone:
        edgert.load(target, ram="1MiB")
    with pytest.raises(MemoryBudgetError, match=r"the draft [0-9]+ MiB") as both:
        edgert.load(target, ram="1MiB", draft=draft)
    assert "the draft" not in str(alone.value) and str(alone.value) != str(both.value)


def test_the_store_is_written_at_the_end_and_read_again(tiny_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "drafts.npy"
    for _ in range(2):
        with edgert.load(tiny_file, threads=1, draft="lookup", draft_store=store) as model:
            model.generate("Once upon", max_tokens=20)
    assert len(np.load(store)) > 20
    store.write_bytes(b"damaged")
    with pytest.raises(ModelFileError, match="not a store of drafts"):
        edgert.load(tiny_file, draft="lookup", draft_store=store)


def test_the_command_drafts_and_says_what_it_did(tiny_file: Path, cli: Callable[..., Outcome]) -> None:
    plain = json.loads(cli("run", tiny_file, "-p", "ababab", "-n", 30, "--json").out)
    for draft in (["lookup"], ["auto"], [tiny_file], ["lookup", tiny_file]):
        options = [word for one in draft for word in ("--draft", one)]
        found = json.loads(
            cli("run", tiny_file, "-p", "ababab", "-n", 30, "--json", "--tree", 6, *options).out
        )
        assert found["tokens"] == plain["tokens"]
        assert {"accepted_per_step", "drafted", "verified", "fallback_steps", "reason"} <= set(found["stats"])
    shown = cli("run", tiny_file, "-p", "ababab", "-n", 30, "--draft", "lookup")
    assert "tokens per verification" in shown.err
    refused = cli("run", tiny_file, "-p", "a", "--draft", "exit")
    assert refused.status == 2 and "has no exits" in refused.err


# ---- the wait points -------------------------------------------------------------------------


def test_a_draft_goes_on_while_the_target_waits_and_only_then(
    files: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that waits for data gets larger trees for nothing, and the same tokens."""
    path, draft = files("llama_mqa_odd_sizes", "q8"), files("llama_mqa_odd_sizes", "q4")
    with edgert.load(path, threads=1) as plain:
        expected = plain.generate("abc", max_tokens=COUNT)
    drafted = []
    for looks in (0, 6):
        with guessing(path, draft, tree=6) as guesser:
            forward = guesser._engine.forward
            execute = forward._execute

            def waiting(
                first: int,
                last: int,
                looks: int = looks,
                execute: Callable[[int, int], None] = execute,
                model: Model = guesser,
            ) -> None:
                left = iter(range(looks))
                model._engine.forward.waits.until(lambda: next(left, None) is None, lambda: None)
                execute(first, last)

            monkeypatch.setattr(forward, "_execute", waiting)
            done = guesser.generate("abc", max_tokens=COUNT)
            same(expected, done)
            decoder = guesser._engine.decoder
            assert isinstance(decoder, Speculation)
            drafted.append(decoder._drafters["model"].runs)  # type: ignore[attr-defined]
            assert (forward.waits.used_s > 0) == (looks > 0)
            assert forward.waits.idle is None
    assert drafted[0] != drafted[1]


# ---- the benchmark ---------------------------------------------------------------------------


@pytest.mark.compiled
def test_bench_compares_generation_with_and_without_a_draft(
    tiny_file: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "abcabcabc"}\n{"text": "Once upon a time"}\n', encoding="utf-8")
    command = ("bench", tiny_file, "--draft", "lookup", "--text", text, "-n", 20, "-p", 8, "-r", 1, "-t", 1)
    plain, guessing = json.loads(cli(*command, "--always", "-o", "json").out)
    assert (plain["test"], guessing["test"]) == ("tg20", "tg20 lookup")
    assert plain["ts_mean"] > 0 and guessing["ts_mean"] > 0
    assert guessing["accepted_per_step"] >= 1 and guessing["speedup"] > 0
    assert "| tg20 lookup |" in cli(*command).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "lookup"], "--draft guesses at real text: give a FILE and a --text"),
        (["--draft", "lookup", "--text", "x", "-d", "5"], "--rows and --profile are not used"),
        (["--tree", "5"], "--tree, --always, --text and --last belong to --draft"),
        (["--always"], "belong to --draft"),
    ],
)
def test_bench_refuses_what_does_not_go_together(
    tiny_file: Path, cli: Callable[..., Outcome], options: list[str], message: str
) -> None:
    refused = cli("bench", tiny_file, *options)
    assert refused.status == 2 and message in refused.err


# ---- a draft that learns ---------------------------------------------------------------------

SHIFTED = (  # The Tragedy of Coriolanus, act 1, scene 1: nothing that the bundled model was made for
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "You are all resolved rather to die than to famish?",
    "First, you know Caius Marcius is chief enemy to the people.",
    "Let us kill him, and we'll have corn at our own price.",
    "One word, good citizens. We are accounted poor citizens, the patricians good.",
    "What authority surfeits on would relieve us: if they would yield us but the superfluity,",
    "The leanness that afflicts us, the object of our misery,",
    "Let us revenge this with our pikes, ere we become rakes:",
)


def write_shallow(folder: Path, layers: int) -> None:
    """The bundled model without its last layers: a draft that is often wrong in the same way."""
    source = Path(str(resources.files("edgert") / "assets" / "target"))
    folder.mkdir()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    kept = {
        name: values
        for name, values in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.compiled
def test_a_draft_learns_from_what_is_accepted_and_changes_nothing(tmp_path: Path) -> None:
    edgert.convert(Path(str(resources.files("edgert") / "assets" / "target")), tmp_path / "m.ert", "q8")
    write_shallow(tmp_path / "draft", 5)
    edgert.convert(tmp_path / "draft", tmp_path / "draft.ert", "q8")
    taken = {}
    with edgert.load(tmp_path / "m.ert", threads=1) as plain:
        expected = [plain.generate(prompt, max_tokens=80) for prompt in SHIFTED]
    for learn in (False, True):
        with guessing(tmp_path / "m.ert", str(tmp_path / "draft.ert"), learn=learn) as guesser:
            found = [guesser.generate(prompt, max_tokens=80) for prompt in SHIFTED]
        for plainly, guessed in zip(expected, found, strict=True):
            same(plainly, guessed)
        steps = sum(done.stats["verifications"] for done in found)
        taken[learn] = sum(done.stats["taken"]["model"] for done in found) / steps
    assert taken[True] > taken[False] * 1.05


def test_learning_exits_and_drafts_change_nothing(files: Callable[[str, str], Path]) -> None:
    path = files("llama_mqa_odd_sizes", "q8")
    with edgert.load(path, threads=1) as plain:
        expected = plain.generate(PROMPTS[0], max_tokens=COUNT)
    for draft in ("exit", str(files("llama_mqa_odd_sizes", "q4"))):
        with guessing(path, draft, learn=True) as guesser:
            same(expected, guesser.generate(PROMPTS[0], max_tokens=COUNT))
    with pytest.raises(OptionError, match="a lookup learns anyway"):
        edgert.load(path, draft="lookup", draft_learn=True)
