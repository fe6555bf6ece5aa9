"""Write tests/goldens/bundled.json: what the bundled model says, token by token.

    python tools/make_bundled_goldens.py

Run it when the bundled model changes, or when a change of the arithmetic is meant. It generates on
one thread; tests/test_bundled_model.py expects the same tokens from every other way to run it.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import edgert
from edgert.cli.demo import bundled_model
from edgert.config import QUANTS, KvType, Quant

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens" / "bundled.json"
COUNT = 48
# Longer than several chunks of 7 rows.
LONG = (
    "Tom and his dog Max lived in a little house near the sea. Every morning they walked along the sand "
    "and looked for shells. One windy day Max found something shiny under a big rock. He barked and "
    'barked until Tom came. "What is it, Max?" asked Tom.'
)
PROMPTS = (
    "Once upon a time",
    "Lily had a red ball. One day, the ball rolled into",
    LONG,
)


def main() -> None:
    """Generate and write."""
    with bundled_model() as folder, tempfile.TemporaryDirectory() as scratch:
        tokens = {quant: _tokens(folder, Path(scratch), quant, "f16") for quant in QUANTS}
        stored = {
            "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            "prompts": PROMPTS,
            "count": COUNT,
            "tokens": tokens,
            "tokens_q8_cache": _tokens(folder, Path(scratch), "q8", "q8"),
        }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in stored.items())
    GOLDENS.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(f"{GOLDENS.name}: {len(PROMPTS)} prompts, {', '.join(QUANTS)} and a q8 cache")


def _tokens(folder: Path, scratch: Path, quant: Quant, kv: KvType) -> list[tuple[int, ...]]:
    path = scratch / f"{quant}.ert"
    edgert.convert(folder, path, quant)
    with edgert.load(path, threads=1, kv=kv) as model:
        return [model.generate(prompt, max_tokens=COUNT).tokens for prompt in PROMPTS]


if __name__ == "__main__":
    main()
