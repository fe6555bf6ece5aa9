"""Models by their name on the Hub: what is fetched, what a cut leaves, what is said of failures."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgert
from edgert.converters.hub import PIECE, HubModel
from edgert.errors import UsageError
from tests import gguf_files, hub_server, test_convert_hf, tiny_models
from tests.hub_server import COMMIT, Hub

NAME = "org/tiny"
NEEDED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "model.safetensors",
}


def write_model(folder: Path) -> Path:
    """A model as people publish it, with files beside it that no conversion reads."""
    tiny_models.write_folder(folder, "llama_gqa_tied")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    for name in ("README.md", "pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not to be fetched")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server.serving(Hub({NAME: write_model(tmp_path / "published")})) as hub:
        yield hub


def python(
    hub: Hub, tmp_path: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A process of its own: huggingface_hub reads the environment once."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    own |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=kept | own | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def edgert_command(
    hub: Hub, tmp_path: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`edgert` with these arguments."""
    return python(hub, tmp_path, "-m", "edgert", *arguments, **environment)


def test_only_what_a_conversion_reads_is_fetched_and_once(hub: Hub, tmp_path: Path) -> None:
    done = edgert_command(hub, tmp_path, "convert", f"hf://{NAME}@v1", "-o", tmp_path / "m.ert")
    assert done.returncode == 0, done.stderr
    assert hub.asked_for() == NEEDED
    folder = tmp_path / "home" / "edgert" / f"org--tiny@{COMMIT}"
    assert {path.name for path in folder.iterdir()} == NEEDED
    edgert.convert(folder, tmp_path / "again.ert")
    assert (tmp_path / "m.ert").read_bytes() == (tmp_path / "again.ert").read_bytes()
    with edgert.load(tmp_path / "m.ert", threads=1):
        pass
    hub.ranges.clear()
    done = edgert_command(hub, tmp_path, "convert", f"hf://{NAME}", "-o", tmp_path / "m.ert", "--quant", "q8")
    assert done.returncode == 0 and not hub.ranges


def test_what_came_before_a_cut_is_kept_within_a_run_and_between_runs(tmp_path: Path) -> None:
    config = test_convert_hf.CONFIG | {"vocab_size": 48000, "hidden_size": 64, "head_dim": 16}
    published = test_convert_hf.write_folder(tmp_path / "published", config)
    size = (published / "model.safetensors").stat().st_size
    assert size > PIECE + 4096
    hub = Hub({NAME: published}, cut_after=PIECE + 1000, refuse_after_cut=True)
    command = ("convert", f"hf://{NAME}", "-o", tmp_path / "m.ert", "--quant", "q4")
    with hub_server.serving(hub):
        done = edgert_command(hub, tmp_path, *command)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "what was fetched is kept" in done.stderr and not (tmp_path / "m.ert").exists()
        # The first piece is there; this run is cut once more, and asks again by itself.
        hub.cut_after, hub.refuse_after_cut = PIECE + 2000, False
        hub.ranges.clear()
        done = edgert_command(hub, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    weights = [(first, count) for name, first, count in hub.ranges if name == "model.safetensors"]
    assert weights == [(PIECE, 2000), (PIECE, size - PIECE)]
    fetched = tmp_path / "home" / "edgert" / f"org--tiny@{COMMIT}" / "model.safetensors"
    assert fetched.read_bytes() == (published / "model.safetensors").read_bytes()


def test_a_plan_fetches_headers_alone(hub: Hub, tmp_path: Path) -> None:
    folder = hub.models[NAME]
    tiny_models.write_folder(folder, tiny_models.SHARDED)
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) == 2
    (folder / "model.safetensors").unlink(missing_ok=True)
    done = edgert_command(hub, tmp_path, "convert", f"hf://{NAME}", "-o", "m.ert", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert (
        planned["tensors"]
        == json.loads(
            edgert_command(hub, tmp_path, "convert", folder, "-o", "m.ert", "--dry-run", "--json").stdout
        )["tensors"]
    )
    for name in shards:
        header = 8 + int.from_bytes((folder / name).read_bytes()[:8], "little")
        assert hub.sent(name) <= header + 8 < (folder / name).stat().st_size
    assert not (tmp_path / "home" / "edgert").exists()


def test_a_gguf_file_is_named_behind_the_model(hub: Hub, tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "source", "llama_gqa_tied")
    (hub.models[NAME] / "q8").mkdir()
    gguf_files.export(tmp_path / "source", hub.models[NAME] / "q8" / "m.gguf", "Q8_0", parts=8)
    parts = sorted(path.name for path in (hub.models[NAME] / "q8").iterdir())
    assert len(parts) > 1
    source = f"hf://{NAME}/q8/{parts[1]}"
    done = edgert_command(hub, tmp_path, "convert", source, "-o", tmp_path / "m.ert")
    assert done.returncode == 0, done.stderr
    assert hub.asked_for() == set(parts)


def test_the_token_of_the_environment_is_sent(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    command = ("convert", f"hf://{NAME}", "-o", tmp_path / "m.ert")
    without = edgert_command(hub, tmp_path, *command)
    assert without.returncode == 1 and "set HF_TOKEN" in without.stderr
    done = edgert_command(hub, tmp_path, *command, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stderr + done.stdout


FAILURES = {
    "hf://org/absent": "NotAModelError hf://org/absent: found no such model",
    f"hf://{NAME}@v9": f"NotAModelError hf://{NAME}@v9: found no revision v9",
    f"hf://{NAME}/absent.gguf": "found no 'absent.gguf' among its",
    "hf://org/gated": "ConversionError hf://org/gated: found a model whose owner asks for consent",
    "hf://org/pickled": "UnsupportedError hf://org/pickled: found PyTorch pickles",
    "hf://org/ggufs": "name it: hf://org/ggufs/m.gguf",
}
CONVERT_EACH = """
import sys, edgert
for source in sys.argv[2:]:
    try:
        edgert.convert(source, sys.argv[1])
    except edgert.EdgertError as error:
        print(type(error).__name__, error)
"""


def test_what_the_hub_does_not_give_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.models["org/gated"], hub.gated = hub.models[NAME], {"org/gated"}
    for name, file in (("pickled", "pytorch_model.bin"), ("ggufs", "m.gguf")):
        hub.models[f"org/{name}"] = tmp_path / name
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"0")
    done = python(hub, tmp_path, "-c", CONVERT_EACH, tmp_path / "m.ert", *FAILURES)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(FAILURES)
    for line, said in zip(lines, FAILURES.values(), strict=True):
        assert said in line
    assert not (tmp_path / "m.ert").exists()


def test_damage_on_the_way_is_found_by_the_hash_the_hub_states(hub: Hub, tmp_path: Path) -> None:
    hub.states_wrong_hash = True
    done = edgert_command(hub, tmp_path, "convert", f"hf://{NAME}", "-o", tmp_path / "m.ert")
    assert done.returncode == 1 and "found model.safetensors damaged" in done.stderr
    assert not list((tmp_path / "home").rglob("model.safetensors*"))


def test_no_network_and_the_offline_switch_are_said(hub: Hub, tmp_path: Path) -> None:
    command = ("convert", f"hf://{NAME}", "-o", tmp_path / "m.ert")
    offline = edgert_command(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE" in offline.stderr
    hub.endpoint = "http://127.0.0.1:9"  # nobody listens there
    done = edgert_command(hub, tmp_path, *command)
    assert done.returncode == 1 and "check the network" in done.stderr
    assert offline.stderr.count("\n") == done.stderr.count("\n") == 1


def test_no_room_is_said_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.states_size = 1 << 55
    done = edgert_command(hub, tmp_path, "convert", f"hf://{NAME}", "-o", tmp_path / "m.ert")
    assert done.returncode == 1 and "make room" in done.stderr and done.stderr.count("\n") == 1
    assert "model.safetensors" not in hub.asked_for()


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a/b/c", "hf://a/../b.gguf", "hf://a/b@", "hf://a/b/../c.gguf"]
)
def test_names_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected hf://ORG/NAME"):
        HubModel.parse(text)


def test_a_name_is_a_model_a_revision_and_a_file() -> None:
    model = HubModel.parse("hf://org/name-1.5@refs/pr/7/folder/m.Q4_K_M.gguf")
    assert (model.repo, model.revision, model.file) == ("org/name-1.5", "refs/pr/7", "folder/m.Q4_K_M.gguf")
    assert HubModel.parse("hf://gpt2").repo == "gpt2"
