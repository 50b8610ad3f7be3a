"""What every engine is, which artefacts it reads, and how it says that it cannot.

1. An engine's file has one public function, `load(artifact, ...)`. It imports its library, opens the artefact and
   returns an `Engine`: two functions over a `state`, which `close` empties. They take and give token ids, so that what
   is compared between engines is never a tokenizer.
2. `READERS` is the one table of which engines read which kind of artefact; `kind` finds it from a folder's files.
   `facts` reads context, vocabulary and end tokens beside the weights, never from the engine's library.
3. Most engines are a `load` and a reader of tokens (`from_reader`). `greedy` chooses from the logits of one step: the
   mask of a grammar, the end tokens, the loop.
4. A library's native crash ends the process that calls it. `usable` therefore lets a child process open an artefact of
   a format with some options first, and run a few tokens; a signal becomes EngineUnavailable, or other options that the
   child survives. What was found is kept by processor, library version, format and options. The tiny model in the same
   block type stands in for a large GGUF file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import multiprocessing
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from avalab.data import grammars
from avalab.data.grammars import CallGrammar
from avalab.engines import gguf
from avalab.lab import artifacts, assets, llamacpp_library, process
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, Unavailable
from avalab.lab.run import ROOT, write_atomically
from avalab.models import checkpoint, gguf_layout
from avalab.models.stops import stop_tokens

READERS: dict[str, tuple[str, ...]] = {
    "dense": ("torch", "vllm", "tensorrt"),
    "bitsandbytes": ("torch", "vllm"),
    "compressed-tensors": ("torch", "vllm"),
    "torchao": ("torch",),
    "adapter": ("torch",),
    "gguf": ("torch", "openvino", "llamacpp"),
    "openvino": ("openvino",),
    "onnx": ("onnx",),
    "onnx-graph": ("onnxruntime",),
    "aot": ("aot",),
    "executorch": ("executorch",),
}

OWN_FILES = {
    "adapter": checkpoint.ADAPTER_CONFIG,
    "openvino": "openvino_model.xml",
    "onnx": "genai_config.json",
    "aot": "model.pt2",
    "executorch": "model.pte",
    "onnx-graph": "model.onnx",  # ONNX Runtime GenAI has one too
}


CHOOSES_ITSELF = ("vllm", "tensorrt")  # engines whose logits stay inside


class EngineUnavailable(Unavailable):
    """The engine's library or device is missing, or the library crashes here; the message names the way round."""


class NotSupported(InputError):
    """The engine cannot do this; the message names what can."""


@dataclass(frozen=True)
class Facts:
    """What stands beside the weights: longest sequence, number of logits, tokens that end an answer."""

    context: int
    vocabulary: int
    stops: tuple[int, ...]


def artifact_kind(folder: Path) -> str:
    """A key of `READERS`. Raises ValueError for a folder without a model, or one quantised by an unknown method."""
    for name, file in OWN_FILES.items():
        if (folder / file).is_file():
            return name
    if list(folder.glob("*.gguf")):
        return "gguf"
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no artefact: it holds neither config.json nor a .gguf file")
    quantised = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    found = quantised.get("quant_method", "dense")
    if found not in READERS:
        raise InputError(f"{folder} is quantised by {found!r}; read are {', '.join(READERS)}")
    return found


def folder_for(engine: str, artifact: Artifact | Path) -> Path:
    """The artefact's folder. Raises NotSupported naming the engines that can load it when `engine` cannot."""
    folder = Path(artifact.path if isinstance(artifact, Artifact) else artifact)
    found = artifact_kind(folder)
    if engine not in READERS[found]:
        able = ", ".join(READERS[found]) or "no engine"
        reads = ", ".join(name for name, engines in READERS.items() if engine in engines)
        raise NotSupported(f"{engine} cannot load {folder.name} ({found}); {able} can. {engine} loads: {reads}")
    return folder


def require(engine: str, modules: str | Sequence[str], install: str, *, gpu: bool = False) -> None:
    """Raise EngineUnavailable with the install command for a library that is missing, or where a GPU is needed."""
    wanted = [modules] if isinstance(modules, str) else modules
    if missing := [module for module in wanted if importlib.util.find_spec(module) is None]:
        raise EngineUnavailable(f"engine {engine} needs the package {', '.join(missing)}; install it: {install}")
    if gpu and not torch.cuda.is_available():
        raise EngineUnavailable(f"engine {engine} needs an NVIDIA GPU; on a processor use openvino, llamacpp or torch")


def model_facts(folder: Path, *, context: int | None = None) -> Facts:
    """Context (at most the one given), vocabulary and end tokens of an artefact; an adapter has its base's."""
    if artifact_kind(folder) == "adapter":
        return model_facts(checkpoint.base_of(artifacts.load_artifact(folder, verify=False)).path, context=context)
    file = {} if (folder / "config.json").is_file() else {"gguf_file": gguf_file(folder).name}
    config = AutoConfig.from_pretrained(folder, **file).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    longest = min(context or config.max_position_embeddings, config.max_position_embeddings)
    return Facts(longest, config.vocab_size, stop_tokens(config if file else folder, tokenizer))


def gguf_file(folder: Path) -> Path:
    """The one GGUF file of a folder. Raises ValueError for none, several, or one that is damaged (file and offset)."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{folder} has to hold one .gguf file, found {', '.join(f.name for f in files) or 'none'}")
    gguf_layout.check(files[0])
    return files[0]


def check_source(folder: Path, weights: str, *, known: Sequence[str], form: str, packed: str = "") -> None:
    """Raise ValueError for weights that a form of export does not have, or a model that it cannot read.

    `packed` is what a compressed-tensors artefact may be exported as: nothing, one of the weights, or "any".
    """
    if weights not in known:
        raise InputError(f"no weights {weights!r} for {form}; choose one of {', '.join(known)}")
    found = artifact_kind(folder)
    if found == "dense" and weights != gguf.KEPT:
        return
    if found == "compressed-tensors" and packed in ("any", weights):
        return
    if weights == gguf.KEPT:
        raise InputError(
            f"{folder.name} is {found} and holds no packed integers to keep; rtn, gptq, awq and ava make some"
        )
    way = f"export its integers with weights {packed}, or" if found == "compressed-tensors" and packed else "export"
    raise InputError(
        f"{folder.name} is {found}, and {form} is made of dense models; {way} the model that it was made from"
    )


@dataclass(frozen=True)
class Request:
    """One generation. `stops` empty: exactly `max_new_tokens`; `on_token` is called as each one is known.

    `choose` picks the next token from its logits; None is the most likely one.
    """

    prompt: list[int]
    max_new_tokens: int
    grammar: CallGrammar | None = None
    stops: tuple[int, ...] = ()
    on_token: Callable[[int], object] = field(default=lambda token: None)
    choose: Callable[[Tensor], int] | None = None


@dataclass(frozen=True)
class Engine:
    """A loaded artefact. `new_tokens(state, request)`, `all_logits(state, tokens)` or None where there are none.

    `note` says which options were changed to open it, where the library crashes with those that were asked for.
    """

    name: str
    folder: Path
    facts: Facts
    state: dict
    new_tokens: Callable[[dict, Request], list[int]]
    all_logits: Callable[[dict, list[int]], Tensor] | None
    note: str = ""

    def logits(self, tokens: Sequence[int]) -> Float[Tensor, "time vocab"]:
        """Next-token logits after each token, in float32. Raises ValueError for a sequence it cannot read."""
        self._check(tokens, 0)
        if self.all_logits is None:
            raise NotSupported(f"{self.name} gives no logits; torch, openvino and llamacpp do")
        return self.all_logits(self.state, list(tokens)).float()[:, : self.facts.vocabulary]

    def generate(
        self,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        grammar: CallGrammar | None = None,
        *,
        on_token: Callable[[int], object] = lambda token: None,
        past_end: bool = False,
        choose: Callable[[Tensor], int] | None = None,
    ) -> list[int]:
        """Greedy continuation, without the token that ends it; with `past_end`, exactly `max_new_tokens` tokens.

        `choose` picks each token from its logits instead, as `sampler` does.
        Raises ValueError for an empty prompt, an unknown token, or more tokens than the model's context holds;
        NotSupported for `choose` in an engine that keeps its logits.
        """
        if choose and self.name in CHOOSES_ITSELF:
            raise NotSupported(f"{self.name} chooses tokens itself and draws none; torch, llamacpp and onnx do")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens has to be 1 or more, got {max_new_tokens}")
        self._check(prompt_tokens, max_new_tokens)
        stops = () if past_end else self.facts.stops
        request = Request(list(prompt_tokens), max_new_tokens, grammar, stops, on_token, choose)
        return self.new_tokens(self.state, request)

    def close(self) -> None:
        """Let go of the weights; any further verb raises ValueError."""
        for held in self.state.values():
            if callable(getattr(held, "close", None)):
                held.close()
        self.state.clear()

    def _check(self, tokens: Sequence[int], more: int) -> None:
        if not self.state:
            raise InputError(f"this {self.name} engine of {self.folder.name} is closed; load it again")
        if not len(tokens) or not 0 <= min(tokens) <= max(tokens) < self.facts.vocabulary:
            shown = f"ids {min(tokens)} to {max(tokens)}" if len(tokens) else "none"
            raise InputError(f"tokens have to be ids below {self.facts.vocabulary}, at least one; got {shown}")
        if len(tokens) + more > self.facts.context:
            raise InputError(f"{len(tokens)} + {more} tokens exceed the model's context of {self.facts.context}")


def from_reader(name: str, folder: Path, facts: Facts, state: dict, reader: Callable) -> Engine:
    """The engine whose library only reads tokens and gives logits.

    `reader(state, capacity, every)` begins a sequence of at most `capacity` tokens. It returns a function that reads
    tokens after those read before, and gives the logits of each of them, or, unless `every` one is asked for, at least
    those of the last, which is the last row.
    """

    def new_tokens(state: dict, request: Request) -> list[int]:
        read = reader(state, len(request.prompt) + request.max_new_tokens, False)
        return greedy(lambda tokens: read(tokens)[-1], request)

    def all_logits(state: dict, tokens: list[int]) -> Tensor:
        return reader(state, len(tokens), True)(tokens)

    return Engine(name, folder, facts, state, new_tokens, all_logits)


def greedy(step: Callable[[list[int]], Float[Tensor, "vocab"]], request: Request) -> list[int]:
    """The most likely token at each step, or the one that is chosen, within the grammar.

    `step` reads tokens and gives the last one's logits.
    """
    mask = grammars.logits_mask([request.grammar]) if request.grammar else None
    tokens, read = [], request.prompt
    while len(tokens) < request.max_new_tokens:
        logits = step(read)
        if mask:
            logits = mask(torch.tensor([read]), logits[None].float())[0]
        token = request.choose(logits) if request.choose else int(logits.argmax())
        if token in request.stops:
            break
        tokens.append(token)
        request.on_token(token)
        read = [token]
    return tokens


def sampler(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """A choice of tokens by chance, the same for a seed. Raises ValueError for a temperature that is not positive."""
    if not temperature > 0:
        raise InputError(f"the temperature of a draw is above 0, got {temperature}; greedy answers need none")
    chance = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        return int(torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=chance))

    return choose


# --- opened by a child process first ---------------------------------------------------------------------------------

NATIVE = {  # engines whose libraries are checked, and the distributions whose versions matter; torch itself needs none
    "openvino": ("openvino", "openvino-genai"),
    "onnx": ("onnxruntime-genai",),
    "onnxruntime": ("onnxruntime",),
    "llamacpp": (),  # whichever build of llama.cpp is opened
    "aot": ("torch",),
    "executorch": ("executorch",),
}

OTHERWISE = {"llamacpp": {"build": llamacpp_library.WHEEL}}  # with what else a library may survive

CHECKS = assets.CACHE / "engine-checks"

CHECK_SECONDS = 900  # for the largest artefact that is opened

SMALL_BYTES = 64 * 2**20  # an artefact up to this size is opened itself

TINY = ROOT / "data" / "tiny-llama"

OUT_OF_MEMORY = "SIGKILL"  # a matter of the moment: not kept

CPUINFO = Path("/proc/cpuinfo")


def usable(
    name: str, load: Callable[..., Engine], artifact: Artifact | Path, options: Mapping[str, object]
) -> tuple[dict[str, object], str]:
    """Options with which the engine opens an artefact of this format without a crash; a note, also logged, on others.

    Threads are left to the engine where the number asked for crashes it. In a child process, whose end is its caller's
    to explain, nothing is checked. Raises EngineUnavailable with the signal's name where no options are left,
    NotSupported for an artefact that the engine does not read.
    """
    folder, options = folder_for(name, artifact), dict(options)
    if name not in NATIVE or multiprocessing.parent_process():
        return options, ""
    try:
        versions = _versions(name, options)
        form = _format(folder)
    except (metadata.PackageNotFoundError, Unavailable, ValueError):  # no library, or a damaged file: `load` says so
        return options, ""
    about = [_processor(), versions, name, form]
    death = _death(load, folder, options, about)
    if not death:
        return options, ""
    shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "its own options"
    said = f"{versions} dies with {death} on this processor when it opens {form} with {shown}"
    for others, changed in _ways_round(name, options):
        if not _death(load, folder, others, [about[0], _versions(name, others), *about[2:]]):
            note = f"{changed}: {said}"
            logging.getLogger(__name__).warning(note)
            return others, note
    able = [other for other in READERS[artifact_kind(folder)] if other != name]
    way = f"use {' or '.join(able)}, or " if able else ""
    raise EngineUnavailable(f"{said}; {way}export the model in another format (what was found is kept in {CHECKS})")


def _versions(name: str, options: Mapping[str, object]) -> str:
    """The libraries that an engine opens with these options, and their versions."""
    if name == "llamacpp":
        return llamacpp_library.find(str(options.get("build", ""))).shown
    return " ".join(f"{package} {metadata.version(package)}" for package in NATIVE[name])


def _ways_round(name: str, options: dict[str, object]) -> Iterator[tuple[dict[str, object], str]]:
    """Other options for a library that dies with those asked for, and what was changed."""
    if options.get("threads"):
        yield options | {"threads": 0}, f"threads were left to {name}"
    if other := OTHERWISE.get(name, {}):
        with contextlib.suppress(Unavailable):
            if _versions(name, options | other) != _versions(name, options):
                yield options | other, f"{name} was opened with {', '.join(f'{k}={v}' for k, v in other.items())}"


def open_and_run(request: dict) -> dict:
    """Open a folder by `load` (`module:function`) with `options` and run it: what a child does to see if it dies."""
    module, _, function = request["load"].partition(":")
    opened = getattr(importlib.import_module(module), function)(Path(request["folder"]), **request["options"])
    prompt = [token % opened.facts.vocabulary for token in (1, 2, 3)]
    opened.generate(prompt, 2, past_end=True)
    if request["logits"] and opened.all_logits:
        opened.logits(prompt)
    return {}


def _death(load: Callable, folder: Path, options: dict, about: list[str]) -> str:
    """The signal that ends a child which opens the artefact with these options, or nothing; what was found is kept."""
    name, about = about[-2], [*about, sorted(options.items())]
    file = CHECKS / f"{name}-{artifacts.sha256_of_text(json.dumps(about, default=str))[:24]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # not there, or damaged
        return json.loads(file.read_text(encoding="utf-8"))["signal"]
    found = ""
    try:
        with _stand_in(folder) as opened:
            request = {
                "load": f"{load.__module__}:{load.__qualname__}",
                "folder": str(opened.resolve()),
                "options": options,
                "logits": _bytes(opened) <= SMALL_BYTES,
            }
            label = f"opening {folder.name} in {name}"
            process.call(f"{__name__}:open_and_run", request, limit_seconds=CHECK_SECONDS, label=label)
    except process.Killed as error:
        found = error.signal
    except (RuntimeError, ValueError):
        return ""  # an error that the engine itself raises again, in this process
    if found != OUT_OF_MEMORY:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"about": about, "signal": found}, indent=1, default=str))
    return found


@contextlib.contextmanager
def _stand_in(folder: Path) -> Iterator[Path]:
    """The folder itself, or for a large GGUF file of one block type the tiny model's: it is not opened twice."""
    block = (
        ""
        if artifact_kind(folder) != "gguf" or _bytes(folder) <= SMALL_BYTES
        else gguf.block_of_file(gguf_file(folder))
    )
    if not block or not TINY.is_dir():
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        gguf.export(TINY, Path(temporary) / "tiny.gguf", block)
        gguf.copy_beside(TINY, Path(temporary))
        yield Path(temporary)


def _format(folder: Path) -> str:
    """How an artefact's weights are stored, as far as the kernels that open it differ."""
    if (found := artifact_kind(folder)) == "gguf":
        return f"gguf of {', '.join(sorted(gguf_layout.check(gguf_file(folder))))}"
    card = folder / artifacts.CARD
    return json.loads(card.read_text())["format"] if card.is_file() else f"{found} of {_bytes(folder)} bytes"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _processor() -> str:
    """The processor's model and flags, which decide which kernels a library chooses."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    told = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    return f"{platform.machine()} {told.get('model name', '')} {told.get('flags', '')}"
