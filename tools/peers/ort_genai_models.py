"""int4 folders for onnxruntime-genai, of random weights in a shape, by its own builder.

Runs in the peers' environment: python -m peers.ort_genai_models SPEC_JSON OUT_FOLDER
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ACCURACY_LEVEL = 4  # int8 activations: what llama.cpp and edgert compute with


def write_hf_folder(folder: Path, spec: dict[str, Any]) -> None:
    """Random weights in the shape, and a tokenizer of one word: the builder insists on one."""
    config = AutoConfig.for_model(
        spec["architecture"],
        vocab_size=spec["vocab"],
        hidden_size=spec["width"],
        intermediate_size=spec["ffn_width"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        num_key_value_heads=spec["kv_heads"],
        head_dim=spec["head_dim"],
        max_position_embeddings=spec["context"],
        rms_norm_eps=spec["norm_eps"],
        rope_theta=spec["rope_theta"],
        tie_word_embeddings=spec["tied_embeddings"],
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def main(spec_json: str, out: str) -> None:
    """Build OUT_FOLDER; it has its name only when it is complete."""
    target = Path(out)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        source, built = Path(work, "hf"), Path(work, "int4")
        write_hf_folder(source, json.loads(spec_json))
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        options = ["-p", "int4", "-e", "cpu", "--extra_options", f"int4_accuracy_level={ACCURACY_LEVEL}"]
        command = [*builder, "-m", str(source), "-o", str(built), "-c", str(Path(work, "cache")), *options]
        subprocess.run(command, check=True)
        shutil.move(built, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
