"""What a family goes through: each verb of the command line on a tiny model, and what has to be true of the result.

A row of `VERBS` is a command as a user gives it and a check whose right value comes from elsewhere: transformers and
PEFT load the folder that was handed in, round its weights to bf16 and compute in float32. A check that fails raises
`Differs`; anything else that a command raises is its own.

- The bf16 form: the same logits. An adapter's base was rounded after the sum, which costs a little.
- What was compressed: finite logits, not further from the base's than a format of so few bits explains; and a file
  that is smaller by a share of the blocks' weights, or a card that says how little was reached.
- What was exported: the same logits where the engine gives them, and greedy tokens that the reference would choose or
  finds as likely. The prompt is longer than the model's sliding window and than the context it was scaled from; where
  a file allows for less, it is cut to that, and the cell remarks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from avalab import engines
from avalab.cli import compress, measure, options, train
from avalab.compress.quantize import METHODS
from avalab.lab import artifacts, process
from avalab.lab.artifacts import Artifact
from avalab.lab.run import ROOT, Run
from avalab.measure.families import make_model
from avalab.models import checkpoint

PROFILE = "smoke"

PROMPT_TOKENS, NEW_TOKENS = 96, 12

# KL divergence at most, as a share of that between the model's answers at neighbouring tokens, which have nothing in
# common: of float32 in another order, an adapter rounded into bf16, an engine's rounding, 8 bits, 4 bits, 2 or 3 bits.
# Random weights have no slack: four bits cost them a fifth, FP4 in the four blocks of the SmolLM3 row 0.41, which is
# what its formula costs in plain torch, too (the artefact is 0.004 nats from that).
SAME, MERGED, EXPORTED, EIGHT_BITS, FOUR_BITS, FEW_BITS = 2e-5, 0.002, 0.002, 0.02, 0.5, 0.9

NEAR, FAR = 0.15, 0.5  # of the logits' standard deviation: what rounding may decide, exact and in 8 bits

REACHED = 0.2  # of the blocks' bytes in bf16; eight bits save a half

EXAMPLES = 12


class Differs(Exception):
    """A result is not what the reference says."""


@dataclass
class Subject:
    """A family's model folder, and a folder for what is made of it."""

    family: str
    folder: Path
    scratch: Path

    @property
    def run(self) -> Run:
        return Run("families", PROFILE, model=str(self.folder))

    @property
    def base(self) -> Artifact:
        return checkpoint.base_artifact(self.run)

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The model as transformers and PEFT load it, its weights rounded to bf16, to compute in float32.

        Attention is the eager one: the others drop Gemma 2's soft cap without a word.
        """
        from peft import AutoPeftModelForCausalLM

        is_adapter = (self.folder / checkpoint.ADAPTER_CONFIG).is_file()
        loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
        with process.quietly():
            model = loader.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().float())
        return model.eval()

    @cached_property
    def prompt(self) -> list[int]:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(5, 1000, (PROMPT_TOKENS,), generator=draw).tolist()

    @torch.no_grad()
    def reference(self, tokens: list[int]) -> Float[Tensor, "time vocab"]:
        return self.plain(torch.tensor([tokens])).logits[0].float()

    def new(self, name: str) -> Path:
        """A folder name that nothing has; a killed attempt may have left one."""
        return self.scratch / f"{name.replace(' ', '-')}-{len(list(self.scratch.iterdir()))}"


# --- checks ----------------------------------------------------------------------------------------------------------


def divergence(reference: Float[Tensor, "time vocab"], found: Float[Tensor, "time words"]) -> float:
    """Mean KL divergence in nats a token, over the words that both have. Raises Differs for what is not finite."""
    words = min(reference.shape[-1], found.shape[-1])
    if not torch.isfinite(found).all():
        raise Differs("logits are not finite")
    p, q = (F.log_softmax(logits[..., :words].double(), -1) for logits in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _near(subject: Subject, logits: Float[Tensor, "time vocab"], most: float, prompt: list[int] | None = None) -> str:
    expected = subject.reference(prompt or subject.prompt)
    kl, unrelated = divergence(expected, logits), divergence(expected, expected.roll(1, 0))
    if not kl <= most * unrelated:
        allowed = f"{most * unrelated:.2g} at most, {unrelated:.2g} is unrelated"
        raise Differs(f"logits are {kl:.3g} nats a token from those of transformers ({allowed})")
    return f"KL {kl:.2g}"


@torch.no_grad()
def _in_torch(artifact: Artifact, prompt: list[int], dtype: torch.dtype) -> Float[Tensor, "time vocab"]:
    return checkpoint.load_model(artifact, dtype=dtype)(torch.tensor([prompt])).logits[0].float()


def _in_engine(subject: Subject, artifact: Artifact | Path, engine: str, most: float, near: float = NEAR) -> str:
    """What an engine's logits and greedy tokens say beside the reference's."""
    opened = engines.load(engine, artifact)
    room = opened.facts.context - NEW_TOKENS
    prompt, remark = subject.prompt[-room:], f"; context {opened.facts.context}" if room < PROMPT_TOKENS else ""
    try:
        tokens = opened.generate(prompt, NEW_TOKENS, past_end=True)
        logits = opened.logits(prompt) if opened.all_logits else None
    finally:
        opened.close()
    expected = subject.reference(prompt + tokens)[len(prompt) - 1 : -1]
    behind = expected.amax(-1) - expected[torch.arange(len(tokens)), torch.tensor(tokens)]
    said = [] if logits is None else [_near(subject, logits, most, prompt)]
    behind = behind / expected.std()
    if not behind.max() <= near:
        place = int((behind > near).nonzero()[0])
        raise Differs(f"greedy token {place + 1} is {behind[place]:.2g} deviations behind the one of transformers")
    return ", ".join([*said, f"{len(tokens)} tokens"]) + remark


# --- verbs -----------------------------------------------------------------------------------------------------------


def load(subject: Subject) -> str:
    """The bf16 form has the logits of plain transformers."""
    most = MERGED if (subject.folder / checkpoint.ADAPTER_CONFIG).is_file() else SAME
    return _near(subject, _in_torch(subject.base, subject.prompt, torch.float32), most)


def quantize(subject: Subject, method: str, **parameters: object) -> str:
    """The artefact loads where its card says, and is not further from the base than its bits explain."""
    out = subject.new(f"quantize {method}")
    compress.quantize(method, out, model=str(subject.folder), profile=PROFILE, **parameters)
    made = artifacts.load_artifact(out)
    _smaller(subject, made)
    most = FEW_BITS if "q2" in method or "q3" in method else FOUR_BITS
    named = made.card["engines"]
    if "torch" in named and made.format != "gguf":
        return _near(subject, _in_torch(made, subject.prompt, torch.bfloat16), most)
    return _in_engine(subject, made, next(name for name in named if name != "torch"), most, near=float("inf"))


def _smaller(subject: Subject, made: Artifact) -> None:
    """Raise Differs for weights about as large as the base's, unless the card says that little was reached.

    Files of other engines hold embeddings and positions wider than the base does, which outweighs so small blocks.
    """
    if not list(made.path.glob("*.safetensors")):
        return
    inside = [p for name, p in subject.plain.named_parameters() if p.dim() > 1 and re.search(r"\.\d+\.", name)]
    blocks = sum(2 * parameter.numel() for parameter in inside)
    saved, share = subject.base.bytes - made.bytes, made.card["measured"].get("reached_share", 1.0)
    if saved < REACHED * blocks and share > REACHED:
        raise Differs(f"{saved:,} bytes fewer than the base, of {blocks:,} in blocks, and the card does not say why")


def prune(subject: Subject, score: str, pattern: str) -> str:
    """Weights are gone, and what is left computes."""
    out = subject.new(f"prune {score} {pattern.replace(':', 'of')}")
    compress.prune(score, pattern=pattern, sparsity=0.5, out=out, model=str(subject.folder), profile=PROFILE)
    made = artifacts.load_artifact(out)
    if not 0 < made.card["measured"]["sparsity"] < 1:
        raise Differs(f"sparsity is {made.card['measured']['sparsity']:.3g}, not about a half")
    divergence(subject.reference(subject.prompt), _in_torch(made, subject.prompt, torch.bfloat16))
    return f"{made.card['measured']['sparsity']:.0%} gone"


def finetune(subject: Subject, method: str) -> str:
    """The merged model computes, and is another one than its base."""
    out, data = subject.new(f"finetune {method}"), subject.scratch / "chats.jsonl"
    if not data.exists():
        lines = (ROOT / "data" / "synthetic_datasets" / "single_call.jsonl").read_text(encoding="utf-8").splitlines()
        data.write_text("\n".join(lines[:EXAMPLES]) + "\n", encoding="utf-8")
    train.finetune(out, data, model=str(subject.folder), method=method, rank=4, profile=PROFILE)
    return _moved(subject, out)


def distill(subject: Subject) -> str:
    """A student of the same family, of other weights, computes after training and is nobody's copy."""
    student, out = make_model(subject.family, subject.new("student"), seed=1), subject.new("taught")
    train.distill(str(subject.folder), str(student), out, tokens=512, row_tokens=64, rank=4, profile=PROFILE)
    return _moved(subject, out)


def _moved(subject: Subject, folder: Path) -> str:
    made = artifacts.load_artifact(folder)
    kl = divergence(subject.reference(subject.prompt), _in_torch(made, subject.prompt, torch.bfloat16))
    if not kl > 0:
        raise Differs("training changed nothing")
    return f"KL to the base {kl:.2g}"


def run_as_is(subject: Subject, engine: str) -> str:
    """The base artefact in an engine that reads transformers' folders."""
    return _in_engine(subject, subject.base, engine, EXPORTED)


def export(subject: Subject, to: str, weights: str, engine: str, most: float = EXPORTED) -> str:
    """The exported file answers as transformers does, in an engine that reads it."""
    out = subject.new(f"export {to} {weights}")
    compress.export(subject.base.path, to, out, weights, profile=PROFILE)
    return _in_engine(subject, artifacts.load_artifact(out), engine, most, NEAR if most == EXPORTED else FAR)


def evaluate(subject: Subject) -> str:
    """One case of each category is asked and judged."""
    measure.evaluate(subject.base.path, limit=1, profile=PROFILE, as_json=True)
    return ""


def chat(subject: Subject) -> str:
    """One turn with the built-in tools: the model's answer is the last message, or a call and its result are."""
    from avalab.measure.answers import Respondent
    from avalab.serve import chat as terminal
    from avalab.serve.tools import built_in

    said = iter(["What is 17 plus 25?", terminal.QUIT])
    shown: list[str] = []
    messages = terminal.converse(
        Respondent(subject.base),
        built_in(),
        mode="free",
        read=lambda _: next(said),
        say=lambda line: shown.append(line),
    )
    if not any(message["role"] == "assistant" for message in messages):
        raise Differs(f"no answer: {' '.join(shown[1:])}")
    return f"{len(messages)} messages"


@dataclass(frozen=True)
class Verb:
    """A column of the matrix: the group it is shown in, what is run, what decides its result, and seconds at most."""

    group: str
    run: Callable[[Subject], str]
    code: tuple[Callable | str, ...] = ()
    limit_seconds: int = 120


def _export(to: str, weights: str, engine: str, most: float = EXPORTED) -> Verb:
    made = partial(export, to=to, weights=weights, engine=engine, most=most)
    return Verb("export", made, (compress.EXPORTERS[to].write, engines.ENGINES[engine]), 240)


def _quantize(method: str, **parameters: object) -> Verb:
    return Verb("quantize", partial(quantize, method=method, **parameters), (METHODS[method].compress,), 240)


VERBS: dict[str, Verb] = {
    "load": Verb("use", load),
    "eval": Verb("use", evaluate),
    "chat": Verb("use", chat),
    "finetune": Verb("use", partial(finetune, method="lora")),
    "finetune qlora": Verb("use", partial(finetune, method="qlora")),
    "distill": Verb("use", distill),
    "gguf f32, torch": _export("gguf", "f32", "torch"),
    "gguf q8_0, openvino": _export("gguf", "q8_0", "openvino", EIGHT_BITS),
    "gguf f32, llamacpp": _export("gguf", "f32", "llamacpp"),
    "openvino": _export("openvino", "f16", "openvino"),
    "onnx, onnxruntime": _export("onnx", "dense", "onnxruntime"),
    "onnx-genai, onnx": _export("onnx-genai", "fp32", "onnx"),
    "aot": _export("aot", "fp32", "aot"),
    "executorch": _export("executorch", "fp32", "executorch"),
    "vllm": Verb("export", partial(run_as_is, engine="vllm"), (engines.ENGINES["vllm"],)),
    "tensorrt": Verb("export", partial(run_as_is, engine="tensorrt"), (engines.ENGINES["tensorrt"],)),
    **{f"quantize {method}": _quantize(method) for method in options.METHODS if method not in ("autoround", "ava")},
    "quantize autoround": _quantize("autoround", iterations=2),
    "quantize ava": _quantize("ava", bits_per_weight=8.0),
    "quantize ava gguf": _quantize("ava", bits_per_weight=8.0, format="gguf"),
    "quantize ava onnx": _quantize("ava", bits_per_weight=14.0, format="onnx"),
    **{
        f"prune {score}": Verb("prune", partial(prune, score=score, pattern="unstructured"))
        for score in options.SCORES[:-1]
    },
    "prune influence": Verb("prune", partial(prune, score="influence", pattern="layers")),
    **{
        f"prune {pattern}": Verb("prune", partial(prune, score="magnitude", pattern=pattern))
        for pattern in options.PATTERNS[1:]
    },
}

SLOW = (  # verbs that a model takes over from another of the same weights
    *("onnx, onnxruntime", "onnx-genai, onnx", "aot", "quantize autoround", "quantize nncf-int4"),
    *("quantize onnx-k-quant", "quantize ava gguf", "quantize ava onnx"),
    *(f"quantize {method}" for method in options.METHODS if method.startswith("gguf-")),
)
