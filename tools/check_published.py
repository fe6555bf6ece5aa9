"""Hold edgert against transformers on a published model: greedy tokens in float32, and perplexities.

    python tools/check_published.py MODEL_FOLDER --text stories.jsonl --last 200

Needs the `train` extra (torch, transformers). Exit status 1 if a token differs, or if q8 is more than
1% worse than f32.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import edgert
from edgert.config import QUANTS
from edgert.evaluate import evaluate, read_documents

PROMPTS = ("Once upon a time", "The little dog", "One day, Lily")
NEW_TOKENS = 200
Q8_LIMIT = 1.01


def reference_tokens(folder: Path, prompt: str) -> tuple[list[int], list[int]]:
    """(prompt ids, greedy continuation) of transformers in float32, running past end-of-sequence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist()


def our_tokens(model: edgert.Model, ids: list[int]) -> list[int]:
    """Greedy continuation from the library's logits, also running past end-of-sequence."""
    tokens = list(ids)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    return tokens[len(ids) :]


def compare_tokens(folder: Path, file: Path) -> bool:
    """Print, per prompt, how many of the greedy tokens agree."""
    good = True
    with edgert.load(file) as model:
        for prompt in PROMPTS:
            ids, expected = reference_tokens(folder, prompt)
            same_ids = model.tokenizer.encode(prompt) == ids
            equal = sum(a == b for a, b in zip(our_tokens(model, ids), expected, strict=True))
            print(f"{prompt!r}: {equal} of {NEW_TOKENS} greedy tokens equal, prompt ids equal: {same_ids}")
            good &= same_ids and equal == NEW_TOKENS
    return good


def main() -> int:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--last", type=int)
    options = parser.parse_args()
    documents = read_documents(options.text, options.last)
    perplexity = {}
    with tempfile.TemporaryDirectory() as scratch:
        files = {quant: Path(scratch) / f"{quant}.ert" for quant in QUANTS}
        for quant, file in files.items():
            edgert.convert(options.folder, file, quant)
        good = compare_tokens(options.folder, files["f32"])
        for quant, file in files.items():
            with edgert.load(file) as model:
                perplexity[quant] = evaluate(model, documents).perplexity
            worse = perplexity[quant] / perplexity["f32"] - 1
            print(f"{quant}: perplexity {perplexity[quant]:.4f} ({worse:+.2%} against f32)")
    return 0 if good and perplexity["q8"] <= perplexity["f32"] * Q8_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
