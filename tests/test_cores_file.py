"""Cores in files and generations: converted, streamed, verified, and refused where they cannot be."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import edgert
from edgert.calibration.cost import sparsity_cost
from edgert.config import EngineConfig
from edgert.errors import ModelFileError, OptionError, UsageError
from edgert.evaluate import evaluate
from edgert.flash import FileSource
from edgert.format import ErtFile
from edgert.format.verify import check
from edgert.handoff.setup import HandoffConfig
from edgert.model.forward import Forward
from edgert.neurons import open_streamed
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import tiny_models
from tests.test_neuron_streams import Memory, totals

TEXT = "the cat sat on the mat and the dog ran to the cat " * 3
PROMPT = [int(t) for t in inputs.whole("core prompt", 0, 60, 24)]
SAMPLED: dict[str, Any] = {"max_tokens": 20, "temperature": 1.2, "seed": 3}
QUICK: bool = numba.config.DISABLE_JIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with SiLU that goes on with 30% of its neurons, and the same whole; the text beside them."""
    folder = tmp_path_factory.mktemp("core")
    tiny_models.write_folder(folder / "model", "llama_gqa_tied")
    (folder / "text.txt").write_text(TEXT)
    edgert.convert(
        folder / "model", folder / "m.ert", "q8", sparsity="core:0.3", calibrate=folder / "text.txt"
    )
    return folder


def told(path: Path, prompt: Any = PROMPT, **options: Any) -> Any:
    with edgert.load(path, threads=1, **options) as model:
        return model.generate(prompt, **SAMPLED)


def test_behind_the_prompt_the_file_reads_that_share(folder: Path) -> None:
    with ErtFile.open(folder / "m.ert") as file:
        assert file.spec.core == 0.3 and file.spec.neurons
        assert file.tensors["layers.0.gate"].layout == "rows1"
    assert check(folder / "m.ert") > 10
    found, whole = told(folder / "m.ert"), told(folder / "m.ert", sparsity="none")
    assert found.stats["gates_read"] == found.stats["neurons_read"] == pytest.approx(0.3, abs=0.02)
    assert found.tokens != whole.tokens
    assert "gates_read" not in whole.stats
    for chunk in (5, 8) if QUICK else (1, 5, 8, 23):
        assert told(folder / "m.ert", chunk=chunk).tokens == found.tokens


def test_logits_are_those_of_a_prompt(folder: Path) -> None:
    with edgert.load(folder / "m.ert", threads=1) as model:
        found = model.logits(PROMPT)
        behind = model.log_likelihoods(PROMPT, prompt=18)
    with edgert.load(folder / "m.ert", threads=1, sparsity="none") as model:
        inputs.same(found, model.logits(PROMPT))
        whole = model.log_likelihoods(PROMPT)
    inputs.same(behind[:18], whole[:18])
    assert (behind[18:] != whole[18:]).all()


def test_verified_the_output_is_that_of_the_whole_model(folder: Path) -> None:
    whole, drafted = told(folder / "m.ert", sparsity="none"), told(folder / "m.ert", draft="sparse")
    assert drafted.tokens == whole.tokens
    assert drafted.stats["drafted"] > 0


def test_other_drafts_change_nothing_either(folder: Path) -> None:
    """What they guess is checked by the core; also where a prompt is one token, or all but one is cached."""
    for prompt in (PROMPT, PROMPT[:1]):
        assert told(folder / "m.ert", prompt, draft="lookup").tokens == told(folder / "m.ert", prompt).tokens
    with edgert.load(folder / "m.ert", threads=1, draft="lookup") as model:
        first, again = (model.generate(PROMPT, **SAMPLED) for _ in range(2))
    assert first.tokens == again.tokens
    assert again.stats["cached_prompt_tokens"] == len(PROMPT) - 1


def test_what_was_said_before_changes_no_answer(folder: Path) -> None:
    """A conversation goes on where its last prompt ended: what the core computed behind it is not kept."""
    with edgert.load(folder / "m.ert", threads=1, chunk=10) as model:
        first = model.generate(PROMPT, **SAMPLED)
        longer = [*PROMPT, *first.tokens, 5, 6, 7]
        second = model.generate(longer, **SAMPLED)
        assert second.stats["cached_prompt_tokens"] == len(PROMPT)
        half = model.stream([9, *PROMPT[1:]], **SAMPLED)
        next(iter(half))
        third = model.generate([*PROMPT[:20], 3, 4], **SAMPLED)
        assert third.stats["cached_prompt_tokens"] == 0
    assert second.tokens == told(folder / "m.ert", longer).tokens
    assert third.tokens == told(folder / "m.ert", [*PROMPT[:20], 3, 4]).tokens


def test_from_flash_a_core_is_read_once(folder: Path) -> None:
    """The same bits; and what the first token behind a prompt brought is all that the others need."""
    with ErtFile.open(folder / "m.ert") as file:
        config = EngineConfig(1, 64, 32, predict=True)
        with closing(Forward(Weights.of_file(file), config)) as model:
            expected = _go_on(model)
        slots = file.spec.ffn_width
        weights, store = open_streamed(file, slots, edgert.Streaming(), FileSource(folder / "m.ert"))
        with closing(Forward(weights, config, store)) as model:
            missed = []
            inputs.same(_go_on(model, lambda: missed.append(totals(model)["misses"])), expected)
        core = round(0.3 * file.spec.ffn_width) * file.spec.layers
    assert missed[0] == missed[-1] == core <= slots


def _go_on(model: Forward, after: Any = lambda: None) -> Any:
    model.run(PROMPT)
    model.freeze()
    found = []
    for token in range(6):
        found.append(model.run([token], outputs=[0])[0].copy())
        after()
    return np.stack(found)


def test_a_prompt_that_could_not_be_read_counts_once(folder: Path) -> None:
    with ErtFile.open(folder / "m.ert") as file:
        config = EngineConfig(1, 64, 32, predict=True)
        with closing(Forward(Weights.of_file(file), config)) as model:
            expected = _go_on(model)
        memory = Memory(file.data)
        last = file.tensors[f"layers.{file.spec.layers - 1}.neurons"]
        weights, store = open_streamed(file, file.spec.ffn_width, edgert.Streaming(), memory)
        with closing(Forward(weights, config, store)) as model:
            memory.bad = lambda at: OSError(5, "broken") if at >= last.offset else None
            with pytest.raises(ModelFileError, match="broken"):
                model.run(PROMPT)
            memory.bad = lambda at: None
            inputs.same(_go_on(model), expected)


@pytest.mark.compiled
def test_its_cost_is_that_behind_a_prompt(folder: Path) -> None:
    cost = sparsity_cost(folder / "m.ert", folder / "text.txt")
    assert cost.whole != cost.sparse
    with edgert.load(folder / "m.ert", threads=1) as model:
        found = evaluate(model, [TEXT], prompt=20)
        with pytest.raises(UsageError, match="give the number of tokens that are the prompt"):
            evaluate(model, [TEXT])
        with pytest.raises(UsageError, match="shorter than 1001 tokens"):
            evaluate(model, [TEXT], prompt=1000)
    with edgert.load(folder / "m.ert", threads=1, sparsity="none") as model:
        assert evaluate(model, [TEXT], prompt=20).tokens == found.tokens < evaluate(model, [TEXT]).tokens


@pytest.mark.compiled
def test_the_command_says_what_it_costs(folder: Path, tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "m.ert"
    arguments = (folder / "model", "-o", out, "--quant", "q4", "--sparsity", "core:0.4")
    assert "needs a text to say what it costs" in cli("convert", *arguments).err
    done = cli("convert", *arguments, "--calibrate", folder / "text.txt")
    assert done.status == 0, done.err
    assert "with core:0.4: perplexity on the text" in done.out
    assert (
        "cores, 40% of the neurons: behind a prompt only those that it used most" in cli("inspect", out).out
    )
    assert json.loads(cli("inspect", out, "--json").out)["spec"]["core"] == 0.4
    evaluated = cli("eval", out, "--text", folder / "text.txt", "--prompt", 20, "--json")
    assert json.loads(evaluated.out)["perplexity"] > 1
    failed = cli("eval", out, "--text", folder / "text.txt")
    assert failed.status == 2 and "sparsity none" in failed.err


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    for share in ("core:0", "core:1.5", "core:much"):
        with pytest.raises(OptionError, match="expected a share above 0 and up to"):
            edgert.convert(
                *(folder / "model", tmp_path / "m.ert", "q8"), sparsity=share, calibrate=folder / "text.txt"
            )
    with pytest.raises(OptionError, match=r"sparsity is core:0\.3 for a model with silu in f16"):
        edgert.convert(
            *(folder / "model", tmp_path / "m.ert", "f16"), sparsity="core:0.3", calibrate=folder / "text.txt"
        )
    with pytest.raises(OptionError, match=r"sparsity is core:0\.3 with predictors"):
        edgert.converters.neurons.with_sparsity(_spec(folder), "q8", "core:0.3", True, (32, 32))
    with pytest.raises(OptionError, match="which a hand-off cannot; give sparsity none"):
        edgert.load(folder / "m.ert", handoff=HandoffConfig("local"))


def _spec(folder: Path) -> Any:
    with ErtFile.open(folder / "m.ert") as file:
        return file.spec
