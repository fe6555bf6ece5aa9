"""`edgert run` and `edgert chat`."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from edgert.cli.options import (
    FILE,
    draft_options,
    engine_options,
    experts_option,
    handoff_config,
    handoff_options,
    sampling_options,
    sparsity_option,
    streaming_of,
)
from edgert.events import Completion
from edgert.generation import Generation
from edgert.resident import peak_rss_bytes
from edgert.runtime import Model, load

INTERRUPTED = 130


@click.command("run")
@click.argument("file", type=FILE)
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue. [default: standard input]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text.")
@click.option("--check-tensors", is_flag=True, help="Compare every checksum of the file first.")
@sampling_options
@draft_options
@handoff_options
@engine_options
@sparsity_option
@experts_option
def run_command(file: Path, prompt: str | None, as_json: bool, **options: Any) -> int:
    """Continue a text: stream it to stdout, one line of timing to stderr."""
    text = sys.stdin.read() if prompt is None else prompt
    began = time.perf_counter()
    with _open(file, options) as model:
        loaded = time.perf_counter() - began
        generation = model.stream(text, **_sampling(options))
        finished = _drain(generation, show=not as_json)
        done = generation.completion()
    if as_json:
        print(json.dumps(_as_json(done, loaded), ensure_ascii=False))
    else:
        print(flush=True)
        print(timing_line(done, loaded), file=sys.stderr)
    return 0 if finished else INTERRUPTED


@click.command("chat")
@click.argument("file", type=FILE)
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@sampling_options
@draft_options
@handoff_options
@engine_options
@sparsity_option
@experts_option
def chat_command(file: Path, system: str | None, **options: Any) -> int:
    """Talk with a model, in its own chat template. Ctrl-C stops an answer, Ctrl-D ends."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with _open(file, options) as model:
        model.chat_prompt([*messages, {"role": "user", "content": "Hi"}])  # refuse a missing template at once
        while True:
            try:
                said = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print(file=sys.stderr)
                return INTERRUPTED
            messages.append({"role": "user", "content": said})
            generation = model.stream(model.chat_prompt(messages), **_sampling(options))
            _drain(generation, show=True)
            print(flush=True)
            done = generation.completion()
            messages.append({"role": "assistant", "content": done.text})
            print(timing_line(done, None), file=sys.stderr)


def timing_line(done: Completion, load_s: float | None) -> str:
    """What a generation took, on one line."""
    t = done.timings
    loaded = "" if load_s is None else f"load {load_s:.2f} s | "
    steps, over = done.stats.get("accepted_per_step"), done.stats.get("handoffs")
    draft = "" if steps is None else f"{steps:.2f} tokens per verification | "
    if done.stats.get("approximate"):
        draft += "APPROXIMATE experts | "
    exits = "" if over is None else f"{done.stats['exits']} from exits, {over} handed over | "
    if done.stats.get("fallbacks"):
        exits += f"{done.stats['fallbacks']} WITHOUT AN ANSWER ({done.stats['link_error']}) | "
    return (
        f"[{loaded}prompt {done.prompt_tokens} tokens, {t.prefill_tok_s:.1f} tok/s | first token "
        f"{t.first_token_s * 1000:.0f} ms | {len(done.tokens)} tokens, {t.decode_tok_s:.1f} tok/s | "
        f"{draft}{exits}{done.finish_reason}]"
    )


def _open(file: Path, options: dict[str, Any]) -> Model:
    names = (
        "threads",
        "ram",
        "context",
        "kv",
        "chunk",
        "check_tensors",
        "sparsity",
        "tree",
        "draft_store",
        "draft_learn",
    )
    given = {name: options[name] for name in names if name in options}
    handoff = handoff_config(options)
    if handoff is not None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC prints of its own is not for users
    streaming = streaming_of(options["experts"])
    return load(file, draft=options["draft"] or None, handoff=handoff, streaming=streaming, **given)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    return {name: options[name] for name in (*names, "seed", "stop")}


def _drain(generation: Generation, show: bool) -> bool:
    """Take all events, showing their text; False if Ctrl-C ended them, what came is kept."""
    try:
        for event in generation:
            if show:
                print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        return False
    return True


def _as_json(done: Completion, load_s: float) -> dict[str, Any]:
    t = done.timings
    return {
        "text": done.text,
        "tokens": list(done.tokens),
        "prompt_tokens": done.prompt_tokens,
        "finish_reason": done.finish_reason,
        "timings": {
            "load_s": load_s,
            "first_token_s": t.first_token_s,
            "prefill_tok_s": t.prefill_tok_s,
            "decode_tok_s": t.decode_tok_s,
        },
        "memory": {"peak_rss_bytes": peak_rss_bytes()},
        "stats": done.stats,
    }
