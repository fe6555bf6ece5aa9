"""`edgert cloud`, `edgert certs` and `edgert calibrate`."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import click

from edgert.cli.options import FILE, engine_options
from edgert.errors import DeviceError, ModelFileError, UsageError
from edgert.evaluate import read_documents
from edgert.format import ErtFile
from edgert.format.rewrite import rewrite
from edgert.handoff.calibration import as_metadata, calibrate
from edgert.handoff.rules import RULES
from edgert.handoff.setup import check_cloud_installed
from edgert.handoff.thresholds import threshold_for_agreement
from edgert.kernels import target
from edgert.model.forward import Forward
from edgert.planner import parse_size, plan
from edgert.state import Weights
from edgert.tokenizer import Tokenizer


@click.command("cloud")
@click.argument("file", type=FILE)
@click.option(
    "--listen", default="127.0.0.1:7411", show_default=True, metavar="HOST:PORT", help="Where to serve."
)
@click.option(
    "--tls", type=FILE, metavar="FOLDER", help="Certificates (`edgert certs`); needed off loopback."
)
@click.option("--metrics", metavar="HOST:PORT", help="Answer Prometheus here.")
@click.option(
    "--places", type=int, default=16, show_default=True, metavar="N", help="Sessions held at a time."
)
@click.option(
    "--per-client", type=int, default=16, show_default=True, metavar="N", help="Sessions of one client."
)
@click.option(
    "--waiting",
    default="256MiB",
    show_default=True,
    metavar="SIZE",
    help="Most memory of rows not computed yet.",
)
@click.option(
    "--idle",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Until an unused place is lost.",
)
@click.option(
    "--replicas",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="So many processes, replicas of Ray Serve behind one gateway; all limits are each one's own.",
)
@click.option(
    "--drain",
    type=float,
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="For open questions, when it is told to end.",
)
@engine_options
def cloud_command(
    file: Path,
    listen: str,
    tls: Path | None,
    metrics: str | None,
    places: int,
    per_client: int,
    waiting: str,
    idle: float,
    replicas: int,
    drain: float,
    **options: Any,
) -> None:
    """Serve the upper layers of a model, or all of it, to edges. Ctrl-C lets open questions finish."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC prints of its own is not for users
    check_cloud_installed()
    from edgert.handoff.metrics import Metrics
    from edgert.handoff.server import ServerConfig, serve
    from edgert.handoff.sessions import Limits
    from edgert.handoff.transport import Address, Certificates

    for name, value in (("--places", places), ("--per-client", per_client), ("--replicas", replicas)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    limits = Limits(per_client=per_client, waiting_bytes=parse_size(waiting), idle_s=idle)
    address = Address.parse(listen)
    certificates = None if tls is None else Certificates.read(tls, "server")
    answering = None if metrics is None else Address.parse(metrics)
    with ErtFile.open(file) as opened:
        spec = opened.spec
        if spec.last_layer < spec.layers:
            raise ModelFileError(
                f"{file}: found the edge half of a model (layers 0 to {spec.last_layer}), expected the cloud "
                "half or a whole one; this one is for `edgert run --cloud`"
            )
        engine = plan(spec, opened.size, sequences=places, **options)

        def ready(port: int) -> None:
            held = f"layers {spec.first_layer} to {spec.last_layer} of {spec.layers}"
            safe = "no TLS" if tls is None else "mutual TLS"
            room = f"{places} places of {engine.context}"
            many = "" if replicas == 1 else f"{replicas} replicas of "
            kernels = target.lowering().name
            print(
                f"edgert: {file} ({held}) at {Address(address.host, port)}, {safe}, {many}{room}, {kernels}",
                flush=True,
            )

        if replicas > 1:
            _check_ray_installed()
            from edgert.handoff.cluster import ClusterConfig, serve_replicas

            cluster = ClusterConfig(address, replicas, certificates, limits, drain, answering)
            asyncio.run(serve_replicas(file, engine, cluster, ready))
            return
        counters = Metrics()
        config = ServerConfig(address, certificates, limits, drain)
        forward = Forward(Weights.of_file(opened), engine)
        if answering is not None:
            counters.serve(answering.host, answering.port)
        try:
            asyncio.run(serve(opened, forward, config, ready, counters))
        finally:
            forward.close()


def _check_ray_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise DeviceError("found no ray, which replicas need; install it: pip install 'edgert[cluster]'")


@click.command("certs")
@click.argument("folder", type=FILE)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    default=("localhost", "127.0.0.1"),
    show_default=True,
    help="Name or address of the server; may be repeated.",
)
@click.option(
    "--client",
    "clients",
    multiple=True,
    default=("client",),
    show_default=True,
    help="Name of a client; may be repeated.",
)
@click.option("--days", type=int, default=365, show_default=True, help="How long they hold.")
def certs_command(folder: Path, hosts: tuple[str, ...], clients: tuple[str, ...], days: int) -> None:
    """Make a small private authority with certificates for a server and its clients."""
    if importlib.util.find_spec("cryptography") is None:
        raise DeviceError(
            "found no cryptography, which certificates need; install it: pip install 'edgert[cloud]'"
        )
    from edgert.handoff.certs import write_certificates

    if days < 1:
        raise UsageError(f"--days is {days}; expected at least 1")
    for path in write_certificates(folder, hosts, clients, days):
        print(path)


@click.command("calibrate")
@click.argument("file", type=FILE)
@click.option("--text", "text_file", type=FILE, required=True, help='A text, or .jsonl of {"text": ...}.')
@click.option("--documents", type=int, default=200, show_default=True, help="Only so many of the text.")
@click.option("-o", "--output", type=FILE, metavar="OUT.ert", help="Where to write. [default: FILE itself]")
@engine_options
def calibrate_command(
    file: Path, text_file: Path, documents: int, output: Path | None, **options: Any
) -> None:
    """Count on a text how far each exit rule can be trusted; stored in the file, before it is split."""
    with ErtFile.open(file) as opened:
        spec, json_bytes = opened.spec, opened.tokenizer_json()
        if not spec.exits or spec.part or json_bytes is None:
            raise UsageError(
                f"{file}: found no whole model with exits and a tokenizer; see `edgert train exits`"
            )
        tokenizer = Tokenizer(json_bytes)
        texts = (tokenizer.encode(text) for text in read_documents(text_file)[:documents])
        forward = Forward(Weights.of_file(opened), plan(spec, opened.size, **options))
        try:
            found = calibrate(forward, {k: opened.exits[k].temperature for k in spec.exits}, texts)
        finally:
            forward.close()
        rewrite(opened, output or file, as_metadata(found))
    print(
        f"{'rule':<10}{'exit':>5}"
        + "".join(f"{f'agree {a:g}':>14}" for a in _SHOWN)
        + "   (share answered by the exit)"
    )
    for name in RULES:
        for layer, counts in found[name].items():
            shares = (counts.above(threshold_for_agreement(counts, a))[0] for a in _SHOWN)
            print(f"{name:<10}{layer:>5}" + "".join(f"{share:>14.1%}" for share in shares))
    print(
        f"{output or file}: calibrated on {sum(found['top'][spec.exits[0]].tokens)} tokens", file=sys.stderr
    )


_SHOWN = (0.9, 0.95, 0.98, 0.99, 0.999)
