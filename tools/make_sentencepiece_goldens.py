"""Write `tests/goldens/sentencepiece.json`: a small SentencePiece model and the ids it gives.

Run `python tools/make_sentencepiece_goldens.py` where sentencepiece is installed.
"""

import base64
import io
import json
import sys
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.gguf_texts import TEXTS  # noqa: E402


def main() -> None:
    """Train as Llama's was: BPE of the text as it is, bytes for what is rare."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines() if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # SentencePiece does not read special tokens out of a text; we, like transformers, do.
    texts = [text for text in TEXTS if "<s>" not in text] + ["a<tool>b <tool>"]
    content = {
        "version": sentencepiece.__version__,
        "model": base64.b64encode(model.getvalue()).decode(),
        "texts": texts,
        "ids": [processor.encode(text) for text in texts],
        "decoded": [processor.decode(processor.encode(text)) for text in texts],
    }
    path = ROOT / "tests" / "goldens" / "sentencepiece.json"
    path.write_text(json.dumps(content, ensure_ascii=True).replace("], [", "],\n[") + "\n")


if __name__ == "__main__":
    main()
