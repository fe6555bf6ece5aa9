"""Options that several verbs share, and how numbers are shown."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from edgert.config import KV_TYPES
from edgert.errors import OptionError
from edgert.flash.config import Streaming
from edgert.format import ExitCalibration
from edgert.handoff.setup import HandoffConfig, Mode

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def engine_options(function: Command) -> Command:
    """--threads, --ram, --context, --kv and --chunk: how a model is executed."""
    for option in (
        click.option("--chunk", type=int, help="Prompt tokens per forward pass."),
        click.option(
            "--kv",
            type=click.Choice(KV_TYPES),
            default="f16",
            show_default=True,
            help="Precision of cached keys and values.",
        ),
        click.option(
            "-c",
            "--context",
            type=int,
            help="Positions of the KV cache. [default: the model's, at most 8192]",
        ),
        click.option("--ram", metavar="SIZE", help="Refuse to exceed this memory, e.g. 2GiB."),
        click.option(
            "-t", "--threads", type=int, help="Threads. [default: all cores, fewer for a small model]"
        ),
    ):
        function = option(function)
    return function


def sparsity_option(function: Command) -> Command:
    """--sparsity: whether a file's thresholds apply."""
    return click.option(
        "--sparsity",
        type=click.Choice(["auto", "none"]),
        default="auto",
        show_default=True,
        help="Of a file converted with a share of zeros, predictors or cores: none computes all of it.",
    )(function)


def experts_option(function: Command) -> Command:
    """--experts: how experts are read from the file, field by field of `edgert.Streaming`."""
    return click.option(
        "--experts",
        "experts",
        multiple=True,
        metavar="NAME=VALUE",
        help="Of experts, or neurons, that --ram does not hold: a field of edgert.Streaming, e.g. "
        "pinned=0.25; may be repeated. swap_near, drop_below and stand_in_below change the text "
        "(docs/experts.md).",
    )(function)


def streaming_of(values: tuple[str, ...]) -> Streaming | None:
    """A Streaming of texts like "pinned=0.25"; None for none. Raises OptionError for other texts."""
    types: dict[str, type[Any]] = {field.name: type(field.default) for field in fields(Streaming)}
    given: dict[str, Any] = {}
    for text in values:
        name, _, value = text.partition("=")
        kind = types.get(name)
        if kind is None:
            raise OptionError(f"--experts names {name!r}; expected one of {', '.join(types)}, as NAME=VALUE")
        try:
            given[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise OptionError(f"--experts {name} is {value!r}; expected {expected}") from None
    return Streaming(**given) if given else None


def draft_options(function: Command) -> Command:
    """--draft, --tree and --draft-store: who guesses ahead. The output is the same with any of them."""
    for option in (
        click.option(
            "--draft-store", type=FILE, metavar="FILE", help="Keep what lookup saw here, between runs."
        ),
        click.option("--draft-learn", is_flag=True, help="Let the draft learn from what is accepted."),
        click.option("--tree", type=int, metavar="N", help="Most guesses checked at once. [default: 32]"),
        click.option(
            "--draft",
            multiple=True,
            metavar="FILE|lookup|exit|sparse|auto",
            help="Guess ahead with a draft model's file, by looking up, with the model's own exits, with "
            "its small activations left out, or with all there is; may be repeated.",
        ),
    ):
        function = option(function)
    return function


def handoff_options(function: Command) -> Command:
    """--cloud, --mode and what decides between an exit, the layers behind it and the cloud."""
    for option in (
        click.option(
            "--client",
            default="client",
            show_default=True,
            help="Name of this client's certificate in --tls.",
        ),
        click.option("--tls", type=FILE, metavar="FOLDER", help="Certificates (`edgert certs`)."),
        click.option(
            "--deadline",
            type=float,
            default=2.0,
            show_default=True,
            help="Seconds to wait for the cloud before the exit answers.",
        ),
        click.option(
            "--wire",
            type=click.Choice(["f32", "f16", "int8"]),
            default="f32",
            show_default=True,
            help="Precision of hidden values on the wire; f32 is exact.",
        ),
        click.option(
            "--schedule",
            type=int,
            metavar="LAYER",
            help="Leave ever earlier, down to this exit, sure or not.",
        ),
        click.option("--layer", type=int, help="Of a file that was not split: where the upper layers begin."),
        click.option(
            "--exit-rule",
            type=click.Choice(["top", "margin", "entropy", "quantile"]),
            default="top",
            show_default=True,
            help="What makes an exit sure.",
        ),
        click.option(
            "--budget",
            metavar="SHARE|TIME",
            help="Hand over at most this share of tokens (0.2), or so many that a token takes this time on "
            "average (20ms, 0.5s).",
        ),
        click.option(
            "--agreement",
            type=float,
            metavar="SHARE",
            help="Answer from an exit as long as this share of tokens is the whole model's. [default: 1]",
        ),
        click.option(
            "--mode",
            type=click.Choice(["local", "collaborative", "draft", "cloud"]),
            help="collaborative asks the cloud where the exit is not sure; local sends nothing, ever; draft "
            "guesses what a larger model there says; cloud leaves everything to it. [default: collaborative "
            "with --cloud, else local]",
        ),
        click.option("--cloud", metavar="HOST:PORT", help="The cloud half (`edgert cloud`)."),
    ):
        function = option(function)
    return function


def parse_budget(text: str) -> tuple[float | None, float | None]:
    """(share, None) of "0.2", (None, seconds) of "20ms" or "0.5s"; raises OptionError for other texts."""
    match = re.fullmatch(r"(\d*\.?\d+)\s*(ms|s|)", text.strip())
    if match is None:
        raise OptionError(
            f"--budget is {text!r}; expected a share of tokens from 0 to 1, or a time such as 20ms"
        )
    number = float(match[1])
    return (number, None) if not match[2] else (None, number / 1000 if match[2] == "ms" else number)


def handoff_config(options: dict[str, Any]) -> HandoffConfig | None:
    """What the options say; None where nothing of a hand-off was asked for."""
    wanted = ("cloud", "mode", "agreement", "budget", "layer", "schedule")
    if all(options[name] is None for name in wanted):
        return None
    mode: Mode = options["mode"] or ("local" if options["cloud"] is None else "collaborative")
    share, seconds = (None, None) if options["budget"] is None else parse_budget(options["budget"])
    return HandoffConfig(
        mode=mode,
        cloud=options["cloud"],
        agreement=options["agreement"],
        budget=share,
        time_budget_s=seconds,
        rule=options["exit_rule"],
        layer=options["layer"],
        schedule=options["schedule"],
        wire=options["wire"],
        deadline_s=options["deadline"],
        tls=options["tls"],
        client=options["client"],
    )


def sampling_options(function: Command) -> Command:
    """How tokens are chosen; names and meanings are those of the field."""
    for option in (
        click.option("--stop", multiple=True, help="Stop before this text; may be repeated."),
        click.option("--seed", type=int, help="Seed of the sampling. [default: random]"),
        click.option("--presence-penalty", type=float, default=0.0, help="Subtracted from seen tokens."),
        click.option("--repetition-penalty", type=float, default=1.0, help="Divides seen tokens. [1: off]"),
        click.option("--min-p", type=float, default=0.0, help="Least probability, relative to the best."),
        click.option("--top-p", type=float, default=1.0, help="Nucleus sampling. [1: off]"),
        click.option("--top-k", type=int, default=0, help="Only the k best tokens. [0: off]"),
        click.option("--temperature", type=float, default=0.0, help="0 always takes the best. [default: 0]"),
        click.option("-n", "--max-tokens", type=int, default=128, show_default=True, help="Most new tokens."),
    ):
        function = option(function)
    return function


def size_text(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def trust_text(exit_: ExitCalibration) -> str:
    """An exit for people: its temperature, how often it is right, and how often where it is sure."""
    sure = ((least, *exit_.above(least)) for least in exit_.confidence if least in (0.5, 0.8, 0.9, 0.95))
    where = ", ".join(f"{right:.1%} where >= {least:g} ({share:.0%} of them)" for least, share, right in sure)
    return f"temperature {exit_.temperature:.2f}: right for {exit_.above(0)[1]:.1%} of tokens; sure, {where}"
