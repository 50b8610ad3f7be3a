"""Ahead-of-time compilation: a dense artefact as a package of machine code and weights, run without its Python.

1. `torch.export` traces `CachedStep`, the model as one function of tensors with its key-value cache an argument: any
   number of tokens after any number of earlier ones, and with `dynamic` any batch (else one sequence).
2. AOTInductor generates C++ for the traced graph, compiles it with the machine's compiler for this processor, and packs
   it with the weights (32 bits, or bf16, in which it computes too) into `model.pt2`.
3. Beside it: configuration, tokenizer, and `generate.py`, a program that needs torch only: the source of `opened`,
   `reader` and `main` below, which the engine runs too.

A package holds machine code for the kind of processor that it was compiled on: load only your own.
"""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from avalab.engines import checks, engine
from avalab.engines import gguf as gguf_file
from avalab.engines.checks import Check
from avalab.engines.engine import Engine
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import checkpoint


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open a compiled package; `threads` 0 leaves torch's own choice.

    Raises ValueError for a package that torch cannot load.
    """
    folder = engine.folder_for("aot", artifact)
    if threads:
        torch.set_num_threads(threads)
    file = folder / engine.OWN_FILES["aot"]
    try:
        package, sizes = opened(str(file))
    except RuntimeError as error:
        raise InputError(f"torch cannot load the package {file}: {str(error).strip().splitlines()[0]}") from error
    return engine.from_reader("aot", folder, engine.model_facts(folder), {"package": package, "sizes": sizes}, _reader)


def _reader(state: dict, capacity: int, every: bool) -> Callable[[list[int]], Tensor]:
    step = reader(state["package"], state["sizes"], capacity)
    return lambda tokens: step(torch.tensor([tokens]), every=every)[0]


# --- what is compiled ------------------------------------------------------------------------------------------------

PROGRAM = "generate.py"

LARGEST_BATCH = 1024

WAY_OUT = "install one (apt-get install g++; conda install gxx), name it in CXX, or use another engine such as torch"


def write(artifact: Artifact, weights: str = "bf16", *, dynamic: bool = True, out: Path | None = None) -> Artifact:
    """Compile an artefact into `<name>+aot-<weights>` beside it or the folder `out`; one made before is reused.

    Packed integers are decoded: the package has the dense model's size.
    """
    step = {"step": "aot", "weights": weights, "dynamic": dynamic, "torch": torch.__version__}
    about = artifacts.Export(step, f"aot-{weights}", ("aot",))
    check = checks.against(artifact, Check({"aot": "bf16" if weights == "bf16" else ""}))
    return artifacts.write_export(
        artifact, about, lambda folder: export(artifact.path, folder, weights, dynamic=dynamic), check, out=out
    )


def export(folder: Path, out: Path, weights: str = "bf16", *, dynamic: bool = True) -> None:
    """Fill `out` with the compiled package of the dense or packed model in `folder`, its program and its tokenizer.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without a C++ compiler.
    """
    engine.check_source(folder, weights, known=tuple(DTYPES), form="the compiled package", packed="any")
    wanted = [name for name in torch._inductor.config.cpp.cxx if name]
    if not any(shutil.which(name) for name in wanted):
        raise engine.EngineUnavailable(f"engine aot needs the C++ compiler {' or '.join(wanted)}, not found: {WAY_OUT}")
    model = checkpoint.load_dense(folder, dtype=DTYPES[weights])
    shape = sizes(model)
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # torch's own deprecations, in its own code
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(
            traced(model, shape, dynamic=dynamic),
            package_path=str(out / engine.OWN_FILES["aot"]),
            inductor_configs={
                "aot_inductor.metadata": {name: str(size) for name, size in shape.items()} | {"weights": weights}
            },
        )
    (out / PROGRAM).write_text(program_text())
    gguf_file.copy_beside(folder, out)


# --- the program -----------------------------------------------------------------------------------------------------

HEADER = '''"""Run a compiled package: greedy tokens after a prompt of token ids. It needs torch, no model's code.

    python generate.py model.pt2 16 504 338 28      # 16 tokens after the prompt 504 338 28

The program keeps the key-value cache, one buffer of prompt plus answer with time first, and hands the package the part
that is filled. A package holds machine code for the kind of processor that it was compiled on: run only your own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}'''

FOOTER = """if __name__ == "__main__":
    main(*sys.argv[1:])
"""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def opened(file: str) -> tuple[Callable, dict[str, str]]:
    """A package's function and the sizes that were stored in it."""
    package = torch._inductor.aoti_load_package(file)
    return package, package.get_metadata()


def reader(package: Callable, sizes: dict[str, str], capacity: int, *, batch: int = 1) -> Callable:
    """A function that reads tokens (batch, time) after those read before: logits of the last one, or of `every` one.

    `capacity` is the number of tokens that can be read in all.
    """
    dtype = DTYPES[sizes["weights"]]
    layers, heads, dim = (int(sizes[name]) for name in ("layers", "heads", "dim"))
    keys, values = (torch.empty(capacity, layers, batch, heads, dim, dtype=dtype) for _ in range(2))
    read = 0

    def step(ids: torch.Tensor, *, every: bool = False) -> torch.Tensor:
        nonlocal read
        time = ids.shape[1]
        mask = torch.full((time, read + time), -torch.inf).triu(read + 1).to(dtype)
        places = torch.arange(time)
        kept = places if every else places[-1:]
        # What is compiled takes tensors as they lay in the example: without gaps.
        logits, *new = package(ids.contiguous(), places + read, mask, kept, keys[:read], values[:read])
        for buffer, part in zip((keys, values), new, strict=True):
            buffer[read : read + time] = part
        read += time
        return logits

    return step


def main(file: str, count: str, *prompt: str) -> None:
    """Print `count` greedy tokens after `prompt`."""
    package, sizes = opened(file)
    step, ids, tokens = reader(package, sizes, len(prompt) + int(count)), torch.tensor([list(map(int, prompt))]), []
    while len(tokens) < int(count):
        ids = step(ids)[:, -1:].argmax(-1)
        tokens.append(int(ids))
    print(*tokens)


def program_text() -> str:
    """The program that runs a package without the lab: the functions of this section, and what they import."""
    return "\n\n\n".join([HEADER, *(inspect.getsource(part).strip() for part in (opened, reader, main)), FOOTER])


# --- a model as one function of tensors ------------------------------------------------------------------------------


class CachedStep(nn.Module):
    """The model as `forward(ids, positions, mask, kept, keys, values)`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, kept: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at the places `kept` of `ids`, and what to append to keys and values.

        `ids` (batch, time), `positions` (time), `mask` (time, past + time), added to scores; `keys` and `values`
        (past, layer, batch, head, dim). Shapes stand here, as checking them would tie the sizes that are to be free.
        """
        past = keys.shape[0]
        cache = DynamicCache(config=self.model.config)
        for layer, pair in enumerate(zip(*(part.permute(1, 2, 3, 0, 4) for part in (keys, values)), strict=True)):
            cache.update(*pair, layer)
        output = self.model(
            ids,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            logits_to_keep=kept,
        )
        new = [[getattr(layer, part)[:, :, past:] for layer in cache.layers] for part in ("keys", "values")]
        return output.logits, *(torch.stack(part).permute(3, 0, 1, 2, 4) for part in new)


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """What a program has to know to keep the cache: layers, heads, dim, context and vocabulary."""
    config = model.config.get_text_config()
    return {
        "layers": config.num_hidden_layers,
        "heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
    }


def example(shape: dict[str, int], *, batch: int, time: int, past: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments of `CachedStep.forward` of some sizes, every logit kept: what an exporter traces the model with."""
    cache = torch.zeros(past, shape["layers"], batch, shape["heads"], shape["dim"], dtype=dtype)
    ids, places = torch.zeros(batch, time, dtype=torch.int64), torch.arange(time)
    mask = torch.zeros(time, past + time, dtype=dtype)
    return ids, places + past, mask, places, cache, cache.clone()


@torch.no_grad()
def traced(model, shape: dict[str, int], *, dynamic: bool) -> torch.export.ExportedProgram:
    """The model's step as a graph whose sizes are free: time, past, logits kept and, with `dynamic`, the batch.

    Raises ValueError for a family whose code fixes one of these sizes.
    """
    from torch._dynamo.exc import UserError  # slow to import
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    arguments = example(shape, batch=2 if dynamic else 1, time=3, past=5, dtype=model.dtype)
    time, past, kept = (Dim(name, max=shape["context"]) for name in ("time", "past", "kept"))
    batch = Dim("batch", max=LARGEST_BATCH)
    cache = {0: past} | ({2: batch} if dynamic else {})
    free = {
        "ids": {1: time} | ({0: batch} if dynamic else {}),
        "positions": {0: time},
        "mask": {0: time, 1: Dim.AUTO},
        "kept": {0: kept},
        "keys": cache,
        "values": cache,
    }
    try:
        return torch.export.export(CachedStep(model), arguments, dynamic_shapes=free, strict=False)
    except (UserError, GuardOnDataDependentSymNode, ConstraintViolationError) as error:
        said = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{model.config.model_type} models of this kind are not compiled ahead of time, torch.export says: {said} "
            "They run in torch as they are, and `avalab export` has other formats"
        ) from error
