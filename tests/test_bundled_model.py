"""The bundled model: exact text in every precision, and how well it predicts stories.

`python tools/make_bundled_goldens.py` writes the expected tokens anew.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgert
from edgert.cli.demo import FAMILY, WAYS, bundled_model
from edgert.config import QUANTS, EngineConfig, Quant
from edgert.evaluate import evaluate
from edgert.format import ErtFile, ErtWriter, declared
from edgert.kernels import packing
from edgert.model.forward import Forward
from edgert.state import Weights
from edgert.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "goldens" / "bundled.json"
NOISE = 0.002  # of the ratio of two perplexities on TEXT, where both are a percent or less from exact

# Held out for certain: they were written for this test.
TEXT = """\
Once upon a time, there was a small duck named Pip. Pip lived by a blue pond with his mom. Every day he swam
in a circle and sang a song. One morning the pond was hard and white. "Mom, the water is broken!" he cried.
His mom laughed. "It is only ice," she said. "When the sun is warm, it will be water again." Pip waited and
waited. When the sun came out, he jumped in with a big splash.

Anna had a yellow kite. She took it to the hill with her brother Sam. The wind was strong and the kite flew
high. Then the string broke! The kite flew over the trees and Anna began to cry. Sam said, "Do not be sad.
We can look for it." They walked and walked. At last they saw the kite in a bush. It was not torn at all.
Anna hugged her brother and they went home happy.

There was a little bear who did not like to share. He had a jar of sweet honey. A rabbit came and asked,
"Can I have some, please?" The bear said no. A mouse came and asked too. The bear said no again. Then the
bear wanted to play, but nobody was there. He felt very alone. So he took his honey to the rabbit and the
mouse, and they all ate together. It tasted better that way.

Ben wanted to bake a cake for his grandma. He put flour and eggs in a big bowl. The flour went up his nose
and he sneezed. Now there was flour on the floor, on the cat and on the wall. His dad came in and smiled.
"Let me help you clean," he said. They cleaned the kitchen and made the cake together. Grandma said it was
the best cake in the world.

One night the moon was very bright. Mia could not sleep, so she looked out of the window. She saw a fox in
the garden. The fox was looking for food. Mia went to the kitchen and found some bread. She put it on the
step and went back to bed. In the morning the bread was gone, and there was a pretty feather in its place.

Max the truck was old and slow. The other trucks laughed at him. One day there was a lot of snow. The fast
trucks were stuck and could not move. Max came slowly up the road. He pulled the first truck out, then the
second, then the third. "Thank you, Max," they said. "You are slow, but you are strong." From that day they
never laughed at him again.

Lucy lost her tooth at school. She put it in her pocket and ran home to show it to her mom. But when she
looked in her pocket, there was only a hole. Lucy was upset. She wrote a note that said, "Dear fairy, my
tooth fell out, but I lost it. I am sorry." She put the note under her pillow. In the morning she found a
coin and a tiny note that said, "I believe you."

A green frog sat on a leaf. He wanted to jump to the other side of the river, but it was far away. His
friend the turtle said, "You can ride on my back." The frog sat on the turtle and they swam across. It took
a long time, but the frog was safe and dry. On the other side he caught a fat fly and gave half of it to the
turtle.

Tim did not want to go to bed. He hid under the table. His mom looked in the closet and behind the door.
"Where is Tim?" she asked. Tim tried not to laugh. Then the dog came and licked his face. Tim laughed out
loud. "There you are!" said his mom. She picked him up and carried him to bed, and he was asleep before the
story ended.

In a quiet village there lived an old man who made toys. He made a wooden horse and gave it to a girl named
Rose. Rose loved the horse and took it everywhere. One day a wheel came off. Rose took the horse back to the
old man. He found a new wheel and put it on. "Now it is even better," he said. Rose gave him a flower to say
thank you.

Sara and her friends built a castle of sand. It had three towers and a deep hole around it. Then a big wave
came and washed one tower away. "Oh no!" said Sara. Her friends wanted to stop. But Sara said, "Let us build
it again, farther from the water." They worked hard until the sun went down. The new castle was bigger than
the old one.

There once was a cat who was afraid of mice. All the other cats thought it was funny. One day a mouse came
to the cat and said, "I am afraid of you, too." The cat was surprised. They sat down and talked. Soon they
were not afraid any more. Now they drink milk from the same bowl, and the other cats do not know what to
say.

Jack found a seed in the park. He put it in a pot and gave it water each day. Nothing happened for a long
time. "It is only a stone," said his sister. But Jack did not give up. One morning there was a little green
leaf. It grew and grew, and in the summer there was a big sunflower. His sister said she was sorry, and Jack
gave her some of the new seeds.

It was raining and Nina could not go outside. She was bored. Her grandpa gave her a box full of old buttons.
There were round ones and square ones, red ones and gold ones. Nina put them in lines and made a face, a
fish and a ship. When the rain stopped she did not even see it. "Can we play with the buttons again
tomorrow?" she asked.

A little train had to go up a hill with many cars. Halfway up it stopped. "I am too tired," it said. A bird
sat down on its roof and began to sing. The train liked the song so much that it forgot it was tired. Slowly
the wheels began to turn, and soon it was at the top. "Thank you, bird," said the train, and it blew its
whistle all the way down.
"""
STORIES = [" ".join(story.split()) for story in TEXT.split("\n\n")]


@pytest.fixture(scope="module")
def goldens() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(GOLDENS.read_text(encoding="utf-8"))
    return stored


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with bundled_model() as found:
        yield found


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Quant], Path]:
    """The model as an .ert file, converted once for each precision."""
    scratch = tmp_path_factory.mktemp("bundled")

    def converted(quant: Quant) -> Path:
        path = scratch / f"{quant}.ert"
        if not path.exists():
            edgert.convert(folder, path, quant)
        return path

    return converted


def test_goldens_are_those_of_this_model(folder: Path, goldens: dict[str, Any]) -> None:
    blob = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(blob).hexdigest() == goldens["model_sha256"]
    assert all(
        len(answer) <= goldens["count"] for answers in goldens["tokens"].values() for answer in answers
    )


@pytest.mark.compiled
@pytest.mark.parametrize(("threads", "chunk"), [(1, None), (2, None), (1, 1), (2, 7)])
@pytest.mark.parametrize("quant", ["f32", "f16", "q8", "q4"])
def test_greedy_tokens_are_exact(
    file: Callable[[Quant], Path], goldens: dict[str, Any], quant: Quant, threads: int, chunk: int | None
) -> None:
    with edgert.load(file(quant), threads=threads, chunk=chunk) as model:
        assert answers(model, goldens) == goldens["tokens"][quant]


@pytest.mark.compiled
@pytest.mark.parametrize(("threads", "chunk"), [(1, None), (2, 7)])
def test_greedy_tokens_of_a_q8_cache_are_exact(
    file: Callable[[Quant], Path], goldens: dict[str, Any], threads: int, chunk: int | None
) -> None:
    with edgert.load(file("q8"), threads=threads, chunk=chunk, kv="q8") as model:
        assert answers(model, goldens) == goldens["tokens_q8_cache"]


def answers(model: edgert.Model, goldens: dict[str, Any]) -> list[list[int]]:
    return [list(model.generate(p, max_tokens=goldens["count"]).tokens) for p in goldens["prompts"]]


def test_first_tokens_are_exact_without_the_jit_too(
    file: Callable[[Quant], Path], goldens: dict[str, Any]
) -> None:
    """With the JIT this is the compiled kernels again; without it, their twins."""
    with edgert.load(file("q4"), threads=1) as model:
        found = model.generate(goldens["prompts"][0], max_tokens=8).tokens
    assert list(found) == goldens["tokens"]["q4"][0][:8]


@pytest.mark.compiled
def test_sampled_text_is_the_same_on_any_threads(file: Callable[[Quant], Path]) -> None:
    found = []
    for threads in (1, 2, 3):
        with edgert.load(file("q4"), threads=threads) as model:
            options = {"max_tokens": 60, "temperature": 0.8, "top_p": 0.95, "seed": 1}
            found.append(model.generate("Once upon a time", **options).text)
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.compiled
def test_streamed_text_is_whole_words_of_the_decoded_tokens(file: Callable[[Quant], Path]) -> None:
    with edgert.load(file("q4")) as model:
        stream = model.stream("Lily saw a", max_tokens=60)
        pieces = [event.text for event in stream]
        done = stream.completion()
        assert "".join(pieces) == done.text == model.tokenizer.decode(done.tokens)
        assert "\ufffd" not in done.text


@pytest.fixture(scope="module")
def q4_0(file: Callable[[Quant], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with every matrix rounded as GGUF's Q4_0 does."""
    path = tmp_path_factory.mktemp("q4_0") / "q4_0.ert"
    write_q4_0(file("f32"), path)
    return path


def write_q4_0(source: Path, target: Path) -> None:
    gguf = pytest.importorskip("gguf")
    with ErtFile.open(source) as file:
        quants = {decl.name: "q4" for decl in declared(file.spec) if decl.role == "matrix"}
        with ErtWriter(target, file.spec, quants, file.tokenizer_json(), file.metadata) as writer:
            for name, tensor in file.tensors.items():
                if tensor.role == "vector":
                    writer.write(name, file.raw(name))
                elif tensor.role == "matrix":
                    weights = packing.unpack("f32", file.raw(name), *tensor.shape)
                    rounded = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_0)
                    values, scales = unpacked_q4_0(rounded)
                    expected = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q4_0)
                    wide = np.repeat(scales.astype(np.float32), 32, axis=1)
                    np.testing.assert_array_equal(values * wide, expected)
                    writer.write(name, packing.pack("q4", values, scales))
            writer.finish()


def unpacked_q4_0(rounded: NDArray[np.uint8]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Values [N, K] and scales [N, K/32] of blocks of a float16 and 16 bytes, low nibbles first."""
    blocks = rounded.reshape(len(rounded), -1, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return (nibbles.astype(np.int8) - np.int8(8)).reshape(len(rounded), -1), scales


def perplexity(path: Path) -> float:
    with edgert.load(path) as model:
        return evaluate(model, STORIES).perplexity


@pytest.fixture(scope="module")
def exact(file: Callable[[Quant], Path]) -> float:
    """The perplexity of the weights in f32."""
    return perplexity(file("f32"))


@pytest.mark.compiled
def test_stories_are_predicted_well(exact: float) -> None:
    assert exact < 25  # a uniform guess would be 4096


@pytest.mark.compiled
def test_f16_costs_nothing_and_q8_less_than_one_percent(file: Callable[[Quant], Path], exact: float) -> None:
    assert perplexity(file("f16")) == pytest.approx(exact, rel=2e-4)
    assert perplexity(file("q8")) == pytest.approx(exact, rel=0.01)


@pytest.mark.compiled
def test_q4_is_no_worse_than_plain_q4_0(file: Callable[[Quant], Path], q4_0: Path) -> None:
    """By perplexity to within the noise of so short a text, and by divergence, which has none."""
    assert perplexity(file("q4")) <= perplexity(q4_0) * (1 + NOISE)
    expected = predictions(file("f32"))
    assert divergence(expected, file("q4")) < divergence(expected, q4_0)


def predictions(path: Path) -> list[NDArray[np.float64]]:
    """Log-probabilities [T, V] after each token of each story."""
    with edgert.load(path) as model:
        logits = [model.logits(model.tokenizer.encode(story)).astype(np.float64) for story in STORIES]
    return [rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)) for rows in logits]


def divergence(expected: list[NDArray[np.float64]], path: Path) -> float:
    """Kullback-Leibler divergence from the exact predictions, in nats per token."""
    found = predictions(path)
    total = sum(float((np.exp(p) * (p - q)).sum()) for p, q in zip(expected, found, strict=True))
    return total / sum(len(p) for p in expected)


# ---- the family ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every bundled model, converted without loss."""
    scratch, files = tmp_path_factory.mktemp("family"), {}
    for name in FAMILY:
        files[name] = scratch / f"{name}.ert"
        with bundled_model(name) as folder:
            edgert.convert(folder, files[name], "f16")
    return files


def test_the_family_speaks_the_same_tokens_and_has_cards() -> None:
    tokenizers = set()
    for name in FAMILY:
        with bundled_model(name) as found:
            tokenizers.add((found / "tokenizer.json").read_bytes())
            assert (found / "README.md").read_text(encoding="utf-8").startswith(f"# {name}\n")
    assert len(tokenizers) == 1


@pytest.mark.compiled
@pytest.mark.parametrize("name", FAMILY)
def test_every_member_predicts_stories(name: str, family: dict[str, Path]) -> None:
    assert perplexity(family[name]) < 40  # a uniform guess would be 4096


@pytest.mark.compiled
def test_the_draft_guesses_what_the_target_says(family: dict[str, Path]) -> None:
    expected, found = predictions(family["target"]), predictions(family["draft"])
    pairs = list(zip(expected, found, strict=True))
    agreed = sum((p.argmax(-1) == q.argmax(-1)).sum() for p, q in pairs)
    assert agreed / sum(len(p) for p in expected) > 0.45


@pytest.mark.compiled
def test_exits_that_are_sure_say_what_the_whole_model_says(family: dict[str, Path]) -> None:
    """On text that neither training nor calibration saw, by the file's own promise."""
    with ErtFile.open(family["target"]) as file:
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        forward = Forward(Weights.of_file(file), EngineConfig(1, file.spec.context, 64))
        sure = agreed = 0
        for story in STORIES:
            forward.cache.rewind(0)
            ids = tokenizer.encode(story)[:64]
            layer = file.spec.exits[-1]
            logits = forward.run(ids, layers=(0, layer), outputs=range(len(ids))).astype(np.float64)
            whole = forward.run(ids, layers=(layer, file.spec.layers), outputs=range(len(ids)))
            scaled = np.exp((logits - logits.max(-1, keepdims=True)) / file.exits[layer].temperature)
            is_sure = scaled.max(-1) / scaled.sum(-1) >= 0.8
            sure += int(is_sure.sum())
            agreed += int((logits.argmax(-1) == whole.argmax(-1))[is_sure].sum())
        promised = file.exits[layer].above(0.8)[1]
        forward.close()
    assert sure > 100
    assert agreed / sure > promised - 0.08  # two standard errors of so few


@pytest.mark.slow
@pytest.mark.compiled
def test_demo_shows_equal_tokens_everywhere(cli: Callable[..., Any]) -> None:
    done = cli("demo")
    assert (done.status, done.err) == (0, "")
    assert "Once upon a time" in done.out
    rows = [line for line in done.out.splitlines() if re.match(r"(target|draft|moe) .* \d+\b", line)]
    assert [row.split("  ")[0].split()[0] for row in rows] == [way.model for way in WAYS]
    firsts = {way.model: way for way in reversed(WAYS)}.values()
    for way, row in zip(WAYS, rows, strict=True):
        assert way in firsts or "  all " in f"{row} " or "approximate" in row
    shown = [line.split()[0] for line in done.out.splitlines() if line.split()[:1]]
    assert set(QUANTS) <= set(shown)
