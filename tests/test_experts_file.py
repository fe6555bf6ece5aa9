"""Files larger than the budget: planned, loaded, generated from, and kept to."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.config import ModelSpec, QuantSpec
from edgert.errors import MemoryBudgetError, ModelFileError, OptionError
from edgert.flash import Streaming
from edgert.flash.source import direct_reads
from edgert.format import ErtFile
from edgert.format.layout import page_padded
from edgert.format.uses import uses_in
from edgert.model.shapes import write_random
from edgert.planner import BASE_BYTES, buffer_bytes, cache_bytes, plan
from tests import kernel_inputs as inputs
from tests import tiny_models

MIB = 1 << 20


@pytest.fixture(scope="module")
def moe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 2 layers of 19 experts with a tokenizer."""
    folder = tmp_path_factory.mktemp("moe")
    tiny_models.write_folder(folder / "source", "mixtral_window_odd_sizes")
    edgert.convert(folder / "source", folder / "moe.ert", quant="q8")
    return folder / "moe.ert"


def budget(path: Path, slots: int, chunk: int | None = None) -> int:
    """Bytes of --ram that leave room for just so many experts."""
    with ErtFile.open(path) as file:
        experts = [page_padded(t.nbytes) for t in file.tensors.values() if t.role == "expert"]
        config = plan(file.spec, file.size, chunk=chunk)
        rest = file.size - sum(experts)
        fixed = BASE_BYTES + cache_bytes(file.spec, config) + buffer_bytes(file.spec, config)
        return fixed + rest + slots * max(experts)


@pytest.fixture(autouse=True)
def compiled_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan adds for compiling depends on the state of the cache."""
    monkeypatch.setattr("edgert.kernels.execute.is_cached", lambda *kind: True)


def test_a_budget_too_small_for_all_experts_streams_them(moe_file: Path) -> None:
    with edgert.load(moe_file) as model:
        assert model.config.slots == 0
        expected = model.generate("Once upon", max_tokens=20, temperature=1.0, seed=3)
        assert "expert_hits" not in expected.stats
    with edgert.load(moe_file, ram=budget(moe_file, 7)) as model:
        assert model.config.slots == 7
        found = model.generate("Once upon", max_tokens=20, temperature=1.0, seed=3)
    assert (found.tokens, found.text) == (expected.tokens, expected.text)
    stats = found.stats
    assert stats["expert_slots"] == 7
    # One expert per token and layer: the chunk's own count is not known, the 19 single tokens' is.
    assert stats["expert_hits"] + stats["misses"] >= 19 * 2
    assert stats["bytes_read"] >= stats["misses"] * 4096 > 0
    assert set(stats) >= {"prefetch_useful", "io_wait_s", "prefetch"}


def test_the_command_streams_and_says_so(moe_file: Path, cli: Callable[..., inputs.Any]) -> None:
    plain = cli("run", moe_file, "-p", "One", "-n", 5, "--json")
    tight = cli("run", moe_file, "-p", "One", "-n", 5, "--json", "--ram", budget(moe_file, 5))
    one, two = json.loads(plain.out), json.loads(tight.out)
    assert one["tokens"] == two["tokens"]
    assert two["stats"]["misses"] > 0
    assert "misses" not in one["stats"]


def test_the_command_takes_choices_and_refuses_others(moe_file: Path, cli: Callable[..., inputs.Any]) -> None:
    run = ("run", moe_file, "-p", "One", "-n", 5, "--ram", budget(moe_file, 5))
    found = cli(*run, "--json", "--experts", "readers=2", "--experts", "overlap=false")
    assert json.loads(found.out)["stats"]["readers"] == 2
    assert "APPROXIMATE" in cli(*run, "--experts", "swap_near=0.5").err
    for wrong, said in (
        ("magic=1", "--experts names 'magic'; expected one of policy, "),
        ("readers=two", "--experts readers is 'two'; expected a whole number"),
        ("overlap=0", "--experts overlap is '0'; expected true or false"),
        ("pinned=2", "pinned is 2.0; expected a share from 0 to below 1"),
    ):
        refused = cli(*run, "--experts", wrong)
        assert refused.status == 2
        assert said in refused.err


def test_what_cannot_fit_is_refused_with_the_least_that_would(moe_file: Path) -> None:
    least = budget(moe_file, 2)
    with pytest.raises(MemoryBudgetError) as caught:
        edgert.load(moe_file, ram=least - 1)
    message = str(caught.value)
    mib = -(-least // MIB)
    assert f"this needs {mib} MiB: weights without experts" in message
    assert "room for 2 of 38 experts" in message
    assert message.endswith(f"give at least {mib} MiB, or a smaller context")
    with edgert.load(moe_file, ram=least) as model:
        assert model.config.slots == 2
        assert len(model.generate("Once", max_tokens=3).tokens) == 3


def test_the_experts_that_the_calibration_text_used_most_are_kept(tmp_path: Path, moe_file: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 20, encoding="utf-8")
    tiny_models.write_folder(tmp_path / "source", "mixtral_window_odd_sizes")
    path = tmp_path / "calibrated.ert"
    edgert.convert(tmp_path / "source", path, quant="q8", calibrate=text)
    with ErtFile.open(path) as file:
        spec, tokens = file.spec, json.loads(file.metadata["calibration"])["tokens"]
        uses = uses_in(file.metadata, spec)
    assert uses is not None
    assert uses.sum(axis=1).tolist() == [tokens * spec.active_experts] * spec.layers
    ram = budget(path, 9)
    with edgert.load(path, ram=ram) as model:
        expected = model.generate("Once upon", max_tokens=12).tokens
    with edgert.load(path, ram=ram, streaming=Streaming(pinned=0.5)) as model:
        found = model.generate("Once upon", max_tokens=12)
        store = model._engine.forward.store
        assert store is not None
        most = np.argsort(-uses, axis=None, kind="stable")[:4]
        assert (store.slots.slot_of.reshape(-1)[most] >= 0).all()
    assert found.tokens == expected
    assert found.stats["experts_pinned"] == 4
    with pytest.raises(OptionError, match="does not say which experts are used most; convert the model"):
        edgert.load(moe_file, ram=budget(moe_file, 9), streaming=Streaming(pinned=0.5))


@pytest.mark.parametrize("text", ["", "[]", "[[1],[2]]", "3", '{"a":1}', "[" * 99])
def test_uses_of_another_form_are_refused(text: str) -> None:
    spec = ModelSpec(
        "mixtral", 2, 32, 1, 1, 32, 32, 32, 32, 1e-5, experts=3, active_experts=1, expert_width=32
    )
    with pytest.raises(ModelFileError, match="expected a count for each of 3 experts of 2 layers"):
        uses_in({"expert_uses": text}, spec)


def test_approximations_are_said_to_be_some(moe_file: Path) -> None:
    """With room for every other expert and anything accepted in their place, nothing new is read."""
    choices = Streaming(swap_near=0.999, drop_below=0.999, predictor="none")
    with edgert.load(moe_file, ram=budget(moe_file, 20), streaming=choices) as model:
        first = model.generate("Once upon", max_tokens=20, temperature=1.0, seed=3).stats
        assert first["approximate"] is True
        assert first["experts_swapped"] > 0
        assert first["misses"] < first["expert_hits"]
    with edgert.load(moe_file, ram=budget(moe_file, 20)) as model:
        assert "approximate" not in model.generate("Once upon", max_tokens=2).stats


@pytest.mark.parametrize("name", ["mixtral_gqa_tied", "gpt_oss_no_biases_odd_sizes"])  # no biases of q, k, v
def test_a_file_in_fewer_bits_stands_in_for_missing_experts(name: str, tmp_path: Path) -> None:
    """With all of it standing in for all of the experts, the text is that of its experts, biases included."""
    tiny_models.write_folder(tmp_path / "source", name)
    large, small = tmp_path / "large.ert", tmp_path / "small.ert"
    edgert.convert(tmp_path / "source", large, quant="q8")
    # The same file in all but its experts.
    with ErtFile.open(large) as file:
        each = {name: "q4" for name, tensor in file.tensors.items() if tensor.role == "expert"}
    edgert.convert(tmp_path / "source", small, quant=QuantSpec("q8", "q8", each))
    drawn = {"max_tokens": 24, "temperature": 2.0, "seed": 3}
    choices = Streaming(stand_ins=str(small), stand_in_below=1.0, predictor="none")
    with edgert.load(small) as model:
        expected = model.generate("Once upon", **drawn)
    with edgert.load(large) as model:
        assert model.generate("Once upon", **drawn).tokens != expected.tokens
    with edgert.load(large, ram=budget(large, 3, 1), streaming=choices, chunk=1) as model:
        found = model.generate("Once upon", **drawn)
    assert found.tokens == expected.tokens
    assert found.stats["approximate"] is True
    assert found.stats["experts_stood_in"] == found.stats["expert_hits"] + found.stats["misses"]
    few = Streaming(stand_ins=str(small), stand_in_below=0.4)
    with edgert.load(large, ram=budget(large, 3, 1), streaming=few, chunk=1) as model:
        stats = model.generate("Once upon", **drawn).stats
    assert 0 < stats["experts_stood_in"] < stats["expert_hits"] + stats["misses"]


def test_stand_ins_of_another_model_or_of_more_bits_are_refused(tmp_path: Path, moe_file: Path) -> None:
    tiny_models.write_folder(tmp_path / "source", "mixtral_window_odd_sizes")
    own, larger, other = tmp_path / "own.ert", tmp_path / "larger.ert", tmp_path / "other.ert"
    edgert.convert(tmp_path / "source", own, quant="q4")
    edgert.convert(tmp_path / "source", larger, quant="q8")
    tiny_models.write_folder(tmp_path / "another", "mixtral_gqa_tied")
    edgert.convert(tmp_path / "another", other, quant="q4")
    for path, said in (
        (larger, "larger than those of .*; convert the source in fewer bits"),
        (other, "holds another model than .*; expected stand-ins for its experts"),
        (tmp_path / "none.ert", "none.ert"),
    ):
        choices = Streaming(stand_ins=str(path), stand_in_below=0.5)
        with pytest.raises(ModelFileError, match=said):
            edgert.load(own, ram=budget(own, 9), streaming=choices)


def test_choices_that_do_not_exist_are_refused() -> None:
    for wrong in (
        *({"policy": "fifo"}, {"predictor": "magic"}, {"prefetch": "off"}, {"pinned": 1.0}),
        *({"readers": 17}, {"readers": -1}, {"swap_near": 1.0}, {"drop_below": -0.1}),
        *({"stand_in_below": 0.5}, {"stand_ins": "small.ert"}, {"stand_ins": "s.ert", "stand_in_below": 2}),
    ):
        with pytest.raises(OptionError, match="expected"):
            Streaming(**wrong)  # type: ignore[arg-type]


def test_doctor_tells_whether_reads_pass_the_page_cache(cli: Callable[..., inputs.Any]) -> None:
    found = cli("doctor").out
    line = next(line for line in found.splitlines() if line.startswith("flash"))
    assert ("refuses O_DIRECT" in line) == (not direct_reads(Path.cwd()))


PEAK = """
import json, sys
import edgert
from edgert.resident import peak_rss_bytes
path, ram = sys.argv[1], int(sys.argv[2])
with edgert.load(path, ram=ram, context=512, threads=2) as model:
    done = model.generate(list(range(0, 2000, 5)), max_tokens=24, temperature=2.0, seed=1)
    slots = model.config.slots
print(json.dumps([slots, peak_rss_bytes(), done.stats]))
"""


@pytest.mark.compiled
def test_resident_memory_stays_under_the_budget(tmp_path: Path) -> None:
    """A file of 470 MB in 270 MiB, of which Python and the kernels are allowed 200."""
    spec = ModelSpec(
        *("olmoe", 4, 512, 8, 8, 64, 512, 2000, 512, 1e-5), experts=128, active_experts=4, expert_width=1024
    )
    path = tmp_path / "large.ert"
    write_random(path, spec, "q4")
    assert path.stat().st_size > 440e6
    ram = 270 * MIB
    inputs.run_python("from edgert.warmup import warm_up; warm_up()")  # compiling takes memory of its own
    out, _ = inputs.run_python(PEAK, str(path), str(ram))
    slots, peak, stats = json.loads(out.splitlines()[-1])
    assert 8 <= slots < 200
    assert stats["bytes_read"] > 1.5 * slots * 884736  # the arena was full, and its experts replaced
    assert peak < ram
