"""Every export compared with its source when it is written: an engine that computes another model keeps no file.

1. `against` is the check that `artifacts.write_export` asks of every exporter: it opens the folder that was just filled
   in its engine, and the source in torch, in float32.
2. Both read one prompt. It is long, and goes past the context that the model was trained on where its positions are
   scaled. The last `TAIL` positions are compared: root mean square of the difference of logits over their spread.
3. How far they may be apart is measured, not guessed: `FACTOR` times what the same rounding does to the source in torch
   (`coarse`), and `FLOOR` for the order of additions. Where the export's own numbers are known (`stored`), the source
   has those, and only the arithmetic is left.
4. Greedy tokens after the prompt have to be the source's. One that differs counts where the source's logits of the two
   are further apart than the tolerance explains. An engine without logits is held to this alone.

Difference, tolerance, the number of tokens and the engine stand in the card. Where an engine for the format is not
installed (llama.cpp), the next one reads the file: for GGUF that is torch with the gguf package's own decoding, which
sees the tensors and not what the header says of positions.
"""

from __future__ import annotations

import copy
import functools
import importlib
import pydoc_data.topics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab.kernels import block_types, formats
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import ProcessFailed, Unavailable
from avalab.models import checkpoint, gguf_layout

TAIL, GREEDY = 32, 8  # positions and tokens that are compared

PROMPT = 192  # tokens, where positions are not scaled

LONGEST = 4608  # tokens of a prompt that goes past the original context

LARGEST = 2**28  # logits that an engine may have to hand over: a GiB

FLOOR, FACTOR = 2e-3, 3.0

OPTIONS = {"torch": {"dtype": torch.float32}, "llamacpp": {"context": LONGEST + GREEDY}}

MARGIN = 6.0  # times the tolerance: logits of two tokens that may change places

COARSE = ("", "bf16", *(name for name, row in block_types.FORMATS.items() if row.scale_rule))


@dataclass(frozen=True)
class Check:
    """Which engines may read the export, the first one that is installed, and what it is allowed to lose there.

    An engine's value is one of `COARSE`: what numbers and arithmetic are like; "" is float32. `stored` gives the
    numbers that the export holds for a parameter, where they are known. `least` is allowed whatever torch says.
    """

    engines: Mapping[str, str]
    stored: Callable[[str, Tensor], Tensor] | None = None
    least: float = FLOOR


def against(source: Artifact, check: Check) -> Callable[[Path], dict]:
    """The check of an export of an artefact: a function of its folder that says what was found, for the card.

    Raises ProcessFailed where the export computes another model.
    """
    return functools.partial(_compare, source, check)


def _compare(source: Artifact, check: Check, folder: Path) -> dict:
    model = exact_model(source)
    tokenizer = checkpoint.load_tokenizer(source)
    return compare(model, tokenizer, folder, check, name=source.name)


def exact_model(source: Artifact) -> PreTrainedModel:
    """An artefact's model as `exact` has it."""
    return exact(checkpoint.load_dense(source.path, dtype=torch.float32))


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """A model moved to float32, in place, with every part of its attention: fused kernels leave out caps of scores."""
    nn.Module.to(model, torch.float32)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, check: Check, *, name: str
) -> dict:
    """What the card says of an export's folder beside a float32 model, whose numbers may be changed."""
    engine = _opened(folder, check.engines)
    try:
        prompt = long_prompt(model, tokenizer, engine.facts.context - GREEDY)
        found = None if engine.all_logits is None else engine.logits(prompt)[-TAIL:]
        tokens = engine.generate(prompt, GREEDY, past_end=True)
    finally:
        engine.close()
    apply_numbers(model, check.stored)
    expected = _logits(model, prompt + tokens)
    tolerance = check.least + FACTOR * _loss(model, prompt + tokens, expected, check.engines[engine.name])
    before, after = expected[: -len(tokens)][-TAIL:], expected[-len(tokens) - 1 : -1]
    said = {"checked_in": engine.name, "checked_tokens": len(prompt), "logit_tolerance": round(tolerance, 6)}
    if found is not None:
        said["logit_difference"] = round(difference(found, before[-len(found) :]), 6)
        if not said["logit_difference"] <= tolerance:
            raise ProcessFailed(
                f"the export of {name} computes another model: in {engine.name} its logits differ by "
                f"{said['logit_difference']:.2g} of their spread after {len(prompt)} tokens, rounding explains "
                f"{tolerance:.2g}; nothing was kept"
            )
    said["greedy_tokens"] = f"{agreeing(after, tokens, tolerance, name=name)} of {len(tokens)}"
    return said


def _opened(folder: Path, engines: Collection[str]):
    """The folder in the first engine that is installed. Raises EngineUnavailable, the last one's, where none is."""
    for engine in engines:
        try:  # by its name: the engines' own files import this one
            options = OPTIONS.get(engine, {})
            return importlib.import_module(f"avalab.engines.{engine}").load(folder, **options)
        except Unavailable:
            if engine == [*engines][-1]:
                raise
    raise AssertionError("no engine to check an export in")


def long_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    """Tokens of English text: `PROMPT`, or past the original context of scaled positions, within `room`."""
    config = model.config.get_text_config()
    original = gguf_layout.original_context(config)
    wanted = min(original + TAIL, LONGEST) if original else PROMPT
    size = max(1, min(max(wanted, PROMPT), room, LARGEST // config.vocab_size))
    ids = tokenizer(pydoc_data.topics.topics["specialnames"], add_special_tokens=False).input_ids
    ids = [token for token in ids[: LONGEST * 2] if token < config.vocab_size] or list(range(config.vocab_size))
    return (ids * (size // len(ids) + 1))[:size]


@torch.no_grad()
def apply_numbers(model: PreTrainedModel, stored: Callable[[str, Tensor], Tensor] | None) -> None:
    """Replace every parameter, in place, by what an export holds for it."""
    if stored:
        for name, parameter in model.named_parameters():
            parameter.copy_(stored(name, parameter))


@torch.inference_mode()
def _logits(model: PreTrainedModel, tokens: list[int]) -> Float[Tensor, "time vocab"]:
    """Logits of the last positions of a sequence: those compared, and those of the tokens behind them."""
    ids = torch.tensor([tokens], device=model.device)
    return model(ids, use_cache=False, logits_to_keep=min(len(tokens), TAIL + GREEDY)).logits[0].float().cpu()


def _loss(model: PreTrainedModel, tokens: list[int], expected: Tensor, coarse: str) -> float:
    """The difference that coarser numbers and 16-bit arithmetic make in torch."""
    if not coarse:
        return 0.0
    other = copy.deepcopy(model)
    if coarse != "bf16":
        apply_numbers(other, lambda name, value: rounded(value, coarse))
    return difference(_logits(nn.Module.to(other, torch.bfloat16), tokens), expected)


def rounded(value: Float[Tensor, "..."], block: str) -> Float[Tensor, "..."]:
    """A matrix in one of GGUF's simple block types, decoded; anything else as it is."""
    format = block_types.FORMATS[block]
    if value.ndim != 2 or not block_types.fits_blocks(format, value.shape[1]):
        return value
    return formats.round_to_nearest(value.float(), format)


def difference(found: Float[Tensor, "time vocab"], expected: Float[Tensor, "time vocab"]) -> float:
    """Root mean square of the difference over that of the logits, both less their mean; the mean over positions.

    What softmax does not see, a constant on all logits, does not count.
    """
    apart, spread = (
        (part - part.mean(-1, keepdim=True)).pow(2).mean(-1).sqrt() for part in (found.float() - expected, expected)
    )
    return float((apart / spread.clamp(min=torch.finfo(torch.float32).tiny)).mean())


def agreeing(expected: Float[Tensor, "time vocab"], tokens: list[int], tolerance: float, *, name: str) -> int:
    """How many greedy tokens are those of `expected`, the source's logits before each of them.

    Raises ProcessFailed for a token that the tolerance does not explain.
    """
    spread = expected.std(-1)
    for place, token in enumerate(tokens):
        gap = float(expected[place].max() - expected[place, token])
        if gap > MARGIN * tolerance * float(spread[place]):
            raise ProcessFailed(
                f"the export of {name} computes another model: greedy token {place + 1} is {token} and not "
                f"{int(expected[place].argmax())}, whose logit is {gap:.2g} greater; nothing was kept"
            )
    return sum(int(row.argmax()) == token for row, token in zip(expected, tokens, strict=True))
