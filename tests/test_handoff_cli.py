"""The command's part of a hand-off: run, cloud, certs and calibrate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgert.format import ErtFile
from tests.conftest import Outcome
from tests.handoff_models import Files, serving

Cli = Callable[..., Outcome]


def test_run_hands_over_and_says_how_much(handoff_files: Files, cli: Cli) -> None:
    plain = cli("run", handoff_files.whole, "-p", "abc", "-n", 8, "--json")
    with serving(handoff_files.cloud) as server:
        options = ("-p", "abc", "-n", 8, "-c", 64, "--deadline", 120, "--cloud", server.address)
        done = cli("run", handoff_files.edge, *options, "--json")
        shown = cli("run", handoff_files.edge, *options, "--agreement", "0.5")
    assert json.loads(done.out)["text"] == json.loads(plain.out)["text"]
    stats = json.loads(done.out)["stats"]
    assert stats["handoffs"] == 8 and stats["exits"] == stats["fallbacks"] == 0
    names = ("bytes_up", "bytes_down", "cloud_layer_tokens", "link_wait_s")
    assert all(stats[name] > 0 for name in names)
    assert "from exits," in shown.err and "WITHOUT" not in shown.err


def test_run_says_that_nobody_answered(handoff_files: Files, cli: Cli) -> None:
    done = cli("run", handoff_files.edge, "-p", "abc", "-n", 3, "--cloud", "127.0.0.1:1", "--deadline", 0.1)
    assert done.status == 0
    assert "3 WITHOUT AN ANSWER (127.0.0.1:1: nothing listens there)" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "collaborative"), "needs the cloud half's address"),
        (("--cloud", "example.org:80"), "give --tls FOLDER"),
        (("--mode", "local", "--draft", "lookup"), "give one of them"),
        (("--mode", "local", "--deadline", "-1"), "deadline is -1"),
        (("--mode", "local", "--budget", "soon"), "--budget is 'soon'; expected a share"),
        (("--mode", "local", "--budget", "0ms"), "time budget is 0 s"),
        (("--mode", "local", "--budget", "20"), "budget is 20; expected a share"),
    ],
)
def test_run_refuses_what_does_not_fit(
    handoff_files: Files, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    done = cli("run", handoff_files.edge, "-p", "abc", *arguments)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--listen", "0.0.0.0:0"), "is not this machine, and there are no certificates"),
        (("--listen", "nonsense"), "expected HOST:PORT"),
        (("--places", "0"), "--places is 0; expected at least 1"),
        (("--waiting", "much"), "a size of 'much'"),
        (("--tls", "nowhere"), "cannot be read"),
    ],
)
def test_cloud_refuses_what_does_not_fit(
    handoff_files: Files, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    done = cli("cloud", handoff_files.cloud, *arguments)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1


def test_cloud_says_what_it_cannot_serve(handoff_files: Files, cli: Cli) -> None:
    done = cli("cloud", handoff_files.edge)
    assert done.status == 1 and "found the edge half of a model (layers 0 to 2)" in done.err
    assert done.err.count("\n") == 1
    with serving(handoff_files.cloud) as server:
        done = cli("cloud", handoff_files.cloud, "--listen", server.address)
        assert done.status == 1 and f"cannot listen on {server.address}; choose a free port" in done.err
        taken = cli("cloud", handoff_files.cloud, "--listen", "127.0.0.1:0", "--metrics", server.address)
        assert taken.status == 1 and f"metrics cannot be served on {server.address}" in taken.err
        assert done.err.count("\n") == taken.err.count("\n") == 1


def test_cloud_promises_its_memory_before_it_serves(handoff_files: Files, cli: Cli) -> None:
    done = cli("cloud", handoff_files.cloud, "--places", 10**6, "--ram", "1GiB")
    assert done.status == 1 and "ram is 1024 MiB, but this needs" in done.err


def test_certs_are_made_once(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "tls"
    made = cli("certs", folder, "--client", "anna")
    names = {"ca.key", "ca.pem", "server.key", "server.pem", "anna.key", "anna.pem"}
    assert {Path(line).name for line in made.out.split()} == names == {p.name for p in folder.iterdir()}
    before = (folder / "server.pem").read_bytes()
    assert {Path(line).name for line in cli("certs", folder, "--client", "ben").out.split()} == {
        *("ben.key", "ben.pem")
    }
    assert (folder / "server.pem").read_bytes() == before
    assert cli("certs", folder, "--client", "ca").status == 2
    assert cli("certs", folder, "--days", "0").status == 2


def test_calibrate_counts_every_rule_and_keeps_the_tensors(
    handoff_files: Files, tmp_path: Path, cli: Cli
) -> None:
    copy, text = tmp_path / "m.ert", tmp_path / "t.jsonl"
    shutil.copy(handoff_files.whole, copy)
    text.write_text("\n".join(json.dumps({"text": t}) for t in ("abcabc", "the cat", "xyz" * 30)))
    done = cli("calibrate", copy, "--text", text, "--documents", 2)
    assert done.status == 0
    assert [line.split()[0] for line in done.out.splitlines()[1::2]] == [
        "top",
        "margin",
        "entropy",
        "quantile",
    ]
    with ErtFile.open(copy) as after, ErtFile.open(handoff_files.whole) as before:
        assert {n: t.sha256 for n, t in after.tensors.items()} == {
            n: t.sha256 for n, t in before.tensors.items()
        }
        counted = len("abcabc") + len("the cat")
        assert sum(after.exits[2].tokens) == counted != sum(before.exits[2].tokens)
        rules = json.loads(after.metadata["exit_rules"])
        assert set(rules) == {"margin", "entropy", "quantile"} and set(rules["margin"]) == {"1", "2"}
    refused = cli("calibrate", handoff_files.edge, "--text", text)
    assert refused.status == 2 and "found no whole model with exits" in refused.err
