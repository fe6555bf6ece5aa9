"""Write `docs/architectures.md`: every architecture, and how far its logits lie from transformers'.

    python tools/report_architectures.py

Converts each tiny model of `tests/tiny_configs.py` without loss, runs it, and compares with the logits that
transformers gave for it (`tests/goldens`, written by `tools/make_goldens.py`). Needs neither torch nor
transformers.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import edgert
from edgert.converters.architectures import VARIANTS
from edgert.converters.gguf.architectures import ARCHITECTURES
from edgert.converters.gguf.described import DESCRIBED

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
sys.path.insert(0, str(ROOT))

from tests import tiny_models  # noqa: E402

PUBLISHED = {
    "llama": "Llama 1 to 3, SmolLM 1 and 2, TinyLlama, Yi",
    "mistral": "Mistral 7B, Nemo; of Small 3.1 (`mistral3`) the language model",
    "ministral": "Ministral 8B",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M and 1B; of 4B to 27B (`gemma3`) the language model",
    "phi3": "Phi 3 and 4, mini and medium",
    "smollm3": "SmolLM3",
    "granite": "Granite 3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "glm4": "GLM 4 9B and 32B of 2025",
    "exaone4": "EXAONE 4",
    "starcoder2": "StarCoder 2",
    "stablelm": "StableLM 3B, 2 1.6B",
    "cohere": "Command R, Aya",
    "cohere2": "Command R7B, Command A",
    "gpt2": "GPT-2",
    "gpt_neox": "Pythia, GPT-NeoX",
    "opt": "OPT but 350M",
    "falcon": "Falcon 1 and 2, falcon-rw",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "qwen2_moe": "Qwen 1.5 and 2 with experts",
    "qwen3_moe": "Qwen 3 with experts",
    "granitemoe": "Granite 3 with experts",
    "gpt_oss": "gpt-oss 20B and 120B, in MXFP4 as published or not",
    "deepseek_v2": "DeepSeek-V2, V2-Lite, Coder-V2",
    "deepseek_v3": "DeepSeek-V3 and R1 in 8-bit floats as published or not, Moonlight",
}
"""Models of each architecture, for those who know a name and not its `model_type`."""

HEAD = """# Architectures

Every architecture that `edgert convert` reads, by the `model_type` of its `config.json`. An option that
changes the arithmetic is computed or refused, never ignored. Written by

    python tools/report_architectures.py

"worst" is the largest difference of any logit from transformers {transformers} (float32, eager attention),
over tiny random models that between them turn on every option (`tests/tiny_configs.py`); their logits have
a standard deviation of about 1. Weights are f32 and keys and values f16, whose rounding is nearly all of it.
`tools/make_goldens.py` refuses a model in which an option could be left out unnoticed (less than 0.01 in the
logits).

| model_type | published models | GGUF | tiny models | worst |
| --- | --- | --- | ---: | ---: |
"""

TAIL = """

## What falls short

- phi3 with LongRoPE: the file's context is `original_max_position_embeddings` (4096), where the short factors
  hold; transformers goes on with the long ones.
- falcon with ALiBi: slopes times positions are float32, as in llama.cpp; transformers rounds them to bfloat16
  (which shows from 256 positions on, or where slopes are no powers of two), and its eager attention (5.23)
  adds them twice, so that these two models are compared with its default attention.
- deepseek_v2 and deepseek_v3: the cache holds, for each token and layer, the latent twice (in a key of 576
  numbers, beside its rotated part, and as a value of 512): 1088 numbers, where keys and values of all heads
  would be 5120 (V2-Lite) or 40960 (V3) and one copy of the latent would be 576. A prompt is computed in the
  same wide form, because the bits of a row must not depend on the rows beside it: for each key and head 1088
  products instead of 320. What guesses further tokens is left out.
- 8-bit floats are read where each block of a matrix has a scale (`weight_block_size`), of any architecture;
  other kinds of `quantization_config` but gpt_oss's are refused. q8 is another rounding of them, of
  Gaussian weights by 0.5 %, where the floats themselves have lost 2.6 %.
- gpt_oss: q8 keeps MXFP4 without loss (8.5 bits for each weight), and no smaller type can: the values of
  E2M1 are multiples -12 .. 12 of a half, 25 steps, of which q4m has 16 (one group in five of Gaussian
  weights needs no more). q4 is another rounding on top of it, of Gaussian weights by 6.5 % (q4m 6.2 %),
  where MXFP4 itself has lost 11.5 %; `edgert convert` prints the error of a model.
- Refused for what they compute: deepseek_v2 with `norm_topk_prob` (transformers 5.23 has taken the field
  out of its model, and so does not say whether the scaling factor then applies), stablelm with
  `qk_layernorm` (2 12B), cohere with `use_qk_norm` (Command R+), opt with `word_embed_proj_dim` or norms
  behind (350M), gpt2 with `scale_attn_by_inverse_layer_idx`, and every model_type that is not in the table.
- Models for pictures and text are converted without what sees pictures.
"""


def main() -> None:
    """Measure and write."""
    index = json.loads((GOLDENS / "index.json").read_text(encoding="utf-8"))
    worst: dict[str, list[float]] = defaultdict(list)
    for name, config in tiny_models.CONFIGS.items():
        worst[config["model_type"]].append(difference(name, index))
        print(f"{name:34} {worst[config['model_type']][-1]:.1e}")
    gguf: dict[str, list[str]] = defaultdict(list)
    for known, architecture in ARCHITECTURES.items():
        for model_type in (architecture.dense, architecture.experts):
            gguf[model_type].append(known)
    for known, described in DESCRIBED.items():
        gguf[described.model_type].append(known)
    gguf["deepseek_v3"] = gguf["deepseek_v2"]
    gguf["mistral"] = gguf["llama"]
    rows = [
        f"| {kind} | {PUBLISHED[kind]} | {', '.join(gguf[kind]) or '-'} | {len(worst[kind])} | "
        f"{max(worst[kind]):.1e} |"
        for kind in VARIANTS
    ]
    text = HEAD.format(transformers=index["transformers"]) + "\n".join(rows) + TAIL
    (ROOT / "docs" / "architectures.md").write_text(text, encoding="utf-8")


def difference(name: str, index: dict[str, Any]) -> float:
    """The largest difference of a logit at the stored positions."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "model.ert"
        tiny_models.write_folder(source, name)
        edgert.convert(source, target, quant="f32")
        with edgert.load(target, threads=1) as model:
            found = model.logits(index["tokens"])[index["positions"]]
    expected = np.load(GOLDENS / f"{name}.npy")
    return float(np.abs(found - expected).max())


if __name__ == "__main__":
    main()
