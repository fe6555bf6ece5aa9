"""What speculation gives: on trained models, at a real size, by kind of text, and when no guess is right.

    python tools/bench_speculation.py family TARGET.ert --draft DRAFT.ert --text STORIES.jsonl --last 40
    python tools/bench_speculation.py shape PROFILE.json --shape llama-3.2-1b --quant q4 -t 1
    python tools/bench_speculation.py lookup TARGET.ert --prompts spec_bench.jsonl
    python tools/bench_speculation.py nothing [TARGET.ert | --shape llama-3.2-1b]
    python tools/bench_speculation.py learn TARGET.ert --draft DRAFT.ert --text tinyshakespeare.txt --last 40

`family` writes, with --profile PROFILE.json, how sure the draft was at each place and which of its guesses
was right; `shape` replays that on random weights: a draft of random weights is run and paid for, and what
it says is replaced (a scripted drafter). Every figure compares plain decoding with guessing on the same
tokens, turn about, and checks that the tokens are the same. Prints one JSON object and a line for people.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgert.bench_draft import Both, Pair, accepted_per_step, open_pair, pairs
from edgert.config import EngineConfig, ModelSpec
from edgert.decoding import Commit, TokenSequence
from edgert.engine import Engine
from edgert.evaluate import read_documents
from edgert.format import ErtFile
from edgert.model.forward import Forward
from edgert.model.shapes import parameters, random_weights, shape
from edgert.planner import plan
from edgert.speculation.controller import Controller, Steady
from edgert.speculation.decoder import Speculation
from edgert.speculation.model_drafter import ModelDrafter
from edgert.speculation.tree import Guess, TokenTree
from edgert.state import Weights
from edgert.tokenizer import Tokenizer

Record = tuple[tuple[float, ...], int]
"""What a draft said at one place: the probabilities of its guesses, and which was right (-1: none)."""

DRAFT_SHARE = 12
"""A scripted draft has about this part of the target's weights, as the family's has."""


def draft_shape(target: ModelSpec) -> ModelSpec:
    """A decoder of a twelfth of the target's weights, with its vocabulary."""
    for width in range(target.width, 63, -64):
        small = replace(
            target,
            layers=max(2, target.layers // 4),
            width=width,
            heads=max(1, width // target.head_dim),
            kv_heads=1,
            ffn_width=width * 4,
        )
        if parameters(small) * DRAFT_SHARE <= parameters(target):
            return small
    return small


class ScriptedDrafter(ModelDrafter):
    """Runs a draft model, and says what the script says: right as often, and as sure, as a trained draft.

    `answer` is what the target will say after the prompt; off that path guesses are just as sure.
    """

    def __init__(self, forward: Forward, vocab: int, records: Sequence[Record]) -> None:
        super().__init__(forward, vocab)
        self.answer: Sequence[int] = []
        self._records, self._random = records, random.Random(1)
        self._sequence: TokenSequence | None = None

    def begin(self, sequence: TokenSequence) -> None:
        """A new sequence has begun."""
        super().begin(sequence)
        self._sequence = sequence

    def _guess(self, tree: TokenTree, node: int, logits: Any) -> list[tuple[int, float]]:
        assert self._sequence is not None
        text = [*self._sequence.tokens, *(tree.tokens[n] for n in tree.path(node))]
        right = text == list(self.answer[: len(text)]) and len(text) < len(self.answer)
        stated, rank = self._random.choice(self._records)
        for place, probability in enumerate(stated):
            token = self._random.randrange(3, self._vocab)
            if right and place == rank:
                token = self.answer[len(text)]
            elif right and token == self.answer[len(text)]:
                token = 0
            child = tree.add(node, token, Guess(self.name, probability, self.trust))
            if child not in self._rows and child not in self._open:
                self._open.append(child)
        return []


class Recorder(Speculation):
    """Notes, at every place the target passed, what the draft said there."""

    records: list[Record]

    def _judge(
        self, tree: TokenTree, nodes: list[int], path: list[int], commits: list[Commit], times: Any
    ) -> None:
        for node, commit in zip((0, *path), commits, strict=True):
            guesses = [
                (guess.stated, token)
                for token, child in tree.children[node].items()
                if (guess := tree.guesses[child]) is not None and guess.drafter == "model"
            ]
            if guesses:
                guesses.sort(reverse=True)
                tokens = [token for _, token in guesses]
                rank = tokens.index(commit.choice.token) if commit.choice.token in tokens else -1
                self.records.append((tuple(stated for stated, _ in guesses), rank))
        super()._judge(tree, nodes, path, commits, times)


def summary(found: list[Pair]) -> dict[str, Any]:
    """Medians over prompts, and what the drafters did."""
    plain = [pair.plain_s / (len(pair.tokens) - 1) for pair in found]
    guessed = [pair.guessed_s / (len(pair.tokens) - 1) for pair in found]
    taken: dict[str, int] = defaultdict(int)
    for pair in found:
        for name, count in pair.stats["taken"].items():
            taken[name] += count
    total = {
        name: sum(pair.stats[name] for pair in found)
        for name in ("drafted", "verified", "verifications", "fallback_steps", "draft_s", "verify_s")
    }
    return {
        "prompts": len(found),
        "tokens": sum(len(pair.tokens) for pair in found),
        "accepted_per_step": round(accepted_per_step(found), 3),
        "plain_us_per_token": round(statistics.median(plain) * 1e6, 1),
        "guessing_us_per_token": round(statistics.median(guessed) * 1e6, 1),
        "speedup_median": round(statistics.median(pair.speedup for pair in found), 3),
        "speedup_total": round(sum(p.plain_s for p in found) / sum(p.guessed_s for p in found), 3),
        "taken": dict(taken),
        **{name: round(value, 3) for name, value in total.items()},
        "reason": found[-1].stats["reason"],
    }


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `plan`."""
    return {"threads": args.threads, "context": None, "kv": "f16", "chunk": None, "ram": None}


def family(args: argparse.Namespace) -> dict[str, Any]:
    """Trained target and draft: steps of the most probable nodes, always; and under the controller."""
    result: dict[str, Any] = {}
    with ErtFile.open(args.target) as file:
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        texts = read_documents(args.text, args.last)
        prompts = [tokenizer.encode(text)[: args.prompt] for text in texts]
        # Alone: a profile is of the draft, and the figure of acceptance is of one verification.
        for name, always in (("always", True), ("controlled", False)):
            with closing(open_pair(file, args.draft, args.tree, always, options(args))) as both:
                decoder = both.guessing.decoder
                assert isinstance(decoder, Speculation)
                decoder.__class__ = Recorder
                assert isinstance(decoder, Recorder)
                decoder.records = []
                found = list(pairs(both.plain, both.guessing, prompts, args.count))
                result[name] = summary(found)
                if always and args.profile:
                    args.profile.write_text(json.dumps(decoder.records))
    return result


def script_pair(
    weights: Weights, args: argparse.Namespace, records: Sequence[Record], always: bool
) -> tuple[Both, ScriptedDrafter]:
    """A plain and a guessing engine over random weights, the latter with a scripted draft."""
    config = plan(weights.spec, weights.size, threads=args.threads, context=args.prompt + args.count + 80)
    small = draft_shape(weights.spec)
    draft_config = EngineConfig(config.threads, config.context, config.chunk)
    drafter = ScriptedDrafter(
        Forward(random_weights(small, args.quant), draft_config), weights.spec.vocab, records
    )
    kind = Steady if always else Controller
    decoder = Speculation([drafter], kind(["model"], args.tree))
    return Both(Engine(weights, config), Engine(weights, config, decoder)), drafter


def replay(args: argparse.Namespace, weights: Weights, records: Sequence[Record]) -> dict[str, Any]:
    """Scripted guesses against plain decoding, under the controller."""
    prompts = np.random.default_rng(0).integers(3, weights.spec.vocab, (args.repeats, args.prompt)).tolist()
    both, drafter = script_pair(weights, args, records, always=False)
    with closing(both):
        found = []
        for prompt in prompts:
            # What the target will say is found by asking it once; that run also warms it up.
            first = next(pairs(both.plain, both.plain, [prompt], args.count))
            drafter.answer = [*prompt, *first.tokens]
            found += list(pairs(both.plain, both.guessing, [prompt, prompt], args.count))
        result = summary(found)
        costs = both.guessing.decoder.controller.verify  # type: ignore[attr-defined]
        one = costs.seconds(1)
        result["row_cost"] = {n: round(costs.seconds(n) / one, 2) for n in (1, 2, 4, 8, 16, 32)}
        result["draft_parameters"] = parameters(draft_shape(weights.spec))
        result["parameters"] = parameters(weights.spec)
    return result


def at_shape(args: argparse.Namespace) -> dict[str, Any]:
    """Random weights of a real shape, guesses as right and as sure as the profile's."""
    records = [(tuple(stated), rank) for stated, rank in json.loads(args.profile.read_text())]
    return replay(args, random_weights(shape(args.shape), args.quant), records)


def nothing(args: argparse.Namespace) -> dict[str, Any]:
    """Guesses that are sure and always wrong: what the controller costs."""
    wrong: list[Record] = [((0.8, 0.1, 0.05), -1)]
    if args.target is None:
        return replay(args, random_weights(shape(args.shape), args.quant), wrong)
    with ErtFile.open(args.target) as file:
        return replay(args, Weights.of_file(file), wrong)


def lookup(args: argparse.Namespace) -> dict[str, Any]:
    """Lookup alone, by category of prompt."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for line in args.prompts.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        by_category[item["category"]].append(item["turns"][0])
    result = {}
    with ErtFile.open(args.target) as file:
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        room = file.spec.context - args.count - 1
        for category, texts in sorted(by_category.items()):
            prompts = [tokenizer.encode(text)[-room:] for text in texts[: args.most]]
            for name, always in (("always", True), ("controlled", False)):
                with closing(open_pair(file, ["lookup"], args.tree, always, options(args))) as both:
                    found = list(pairs(both.plain, both.guessing, prompts, args.count))
                    result.setdefault(category, {})[name] = summary(found)
            print(category, json.dumps(result[category]), file=sys.stderr)
    return result


def learn(args: argparse.Namespace) -> dict[str, Any]:
    """What the draft's head learns from a text it was not made for: acceptance, first half and second."""
    result: dict[str, Any] = {}
    with ErtFile.open(args.target) as file:
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        prompts = [tokenizer.encode(text)[: args.prompt] for text in passages(args.text)[-args.last :]]
        for name, learns in (("as it is", False), ("learning", True)):
            with closing(open_pair(file, args.draft, args.tree, True, options(args), learns)) as both:
                found = list(pairs(both.plain, both.guessing, prompts, args.count))
                half = len(found) // 2
                result[name] = {
                    "accepted_per_step": round(accepted_per_step(found), 3),
                    "first_half": round(accepted_per_step(found[:half]), 3),
                    "second_half": round(accepted_per_step(found[half:]), 3),
                    "guessing_us_per_token": summary(found)["guessing_us_per_token"],
                }
    return result


def passages(path: Path) -> list[str]:
    """The documents of a .jsonl; of a text, its passages of a hundred characters and more."""
    if path.suffix == ".jsonl":
        return read_documents(path)
    found: list[str] = []
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        if found and len(found[-1]) < 200:
            found[-1] += "\n\n" + paragraph
        else:
            found.append(paragraph)
    return found


def arguments() -> argparse.Namespace:
    """What is on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    works = (family, at_shape, lookup, nothing, learn)
    for name, work in zip(("family", "shape", "lookup", "nothing", "learn"), works, strict=True):
        verb = verbs.add_parser(name)
        verb.set_defaults(work=work)
        verb.add_argument("-t", "--threads", type=int, default=1)
        verb.add_argument("-n", "--count", type=int, default=128, help="tokens after each prompt")
        verb.add_argument("-p", "--prompt", type=int, default=32, help="prompt tokens")
        verb.add_argument("--tree", type=int, default=32)
        if name in ("family", "lookup", "learn"):
            verb.add_argument("target", type=Path)
        if name in ("family", "learn"):
            verb.add_argument("--draft", action="append", required=True)
            verb.add_argument("--text", type=Path, required=True)
            verb.add_argument("--last", type=int, default=40)
            verb.add_argument("--profile", type=Path)
        if name == "lookup":
            verb.add_argument("--prompts", type=Path, required=True)
            verb.add_argument("--most", type=int, default=10, help="prompts of each category")
        if name == "shape":
            verb.add_argument("profile", type=Path)
        if name == "nothing":
            verb.add_argument("target", type=Path, nargs="?")
        if name in ("shape", "nothing"):
            verb.add_argument("--shape", default="llama-3.2-1b")
            verb.add_argument("--quant", default="q4")
            verb.add_argument("-r", "--repeats", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Run one verb and print what it found."""
    args = arguments()
    print(json.dumps({"verb": args.verb, **args.work(args)}, indent=1))


if __name__ == "__main__":
    main()
