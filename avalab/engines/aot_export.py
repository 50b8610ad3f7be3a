"""Ahead-of-time compilation: a dense artefact becomes a package of machine code and weights, run without its Python.

1. `torch.export` traces `CachedStep`: any number of tokens after any number of earlier ones, and with `dynamic` any
   batch (else one sequence).
2. AOTInductor generates C++ for the traced graph, compiles it with the machine's compiler for this processor, and packs
   it with the weights into `model.pt2`. Matrix products go to the libraries that torch links.
3. Beside it: configuration, tokenizer, and `generate.py`, a program that needs torch only (`aot_program`).

Weights are stored in 32 bits or in bf16, in which it computes too. A package holds machine code: load only your own.
What it does not do: quantise, compile for another processor, or run on a GPU.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from torch.export import Dim

from avalab import exported, gguf_export, models
from avalab.artifacts import Artifact
from avalab.engines import aot_program, cached_step, dense, kinds

PROGRAM = "generate.py"
LARGEST_BATCH = 1024
WAY_OUT = "install one (apt-get install g++; conda install gxx), name it in CXX, or use another engine such as torch"


def write(artifact: Artifact, weights: str = "bf16", *, dynamic: bool = True, out: Path | None = None) -> Artifact:
    """Compile a dense artefact into `<name>+aot-<weights>` beside it or the folder `out`; one made before is reused."""
    step = {"step": "aot", "weights": weights, "dynamic": dynamic, "torch": torch.__version__}
    about = exported.Export(step, f"aot-{weights}", ("aot",))
    return exported.write(
        artifact, about, lambda folder: export(artifact.path, folder, weights, dynamic=dynamic), out=out
    )


def export(folder: Path, out: Path, weights: str = "bf16", *, dynamic: bool = True) -> None:
    """Fill `out` with the compiled package of the dense model in `folder`, its program and its tokenizer.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without a C++ compiler.
    """
    dense.check(folder, weights, known=tuple(aot_program.DTYPES), form="the compiled package")
    require_compiler()
    model = models.load(folder, dtype=aot_program.DTYPES[weights]).eval()
    shape = cached_step.sizes(model)
    told = {name: str(value) for name, value in shape.items()} | {"weights": weights}
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # torch's own deprecations, in its own code
        warnings.simplefilter("ignore")
        program = traced(model, shape, dynamic=dynamic)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(out / kinds.OWN_FILES["aot"]), inductor_configs={"aot_inductor.metadata": told}
        )
    shutil.copyfile(aot_program.__file__, out / PROGRAM)
    gguf_export.copy_beside(folder, out)


@torch.no_grad()
def traced(model, shape: dict[str, int], *, dynamic: bool) -> torch.export.ExportedProgram:
    """The model's step as a graph whose sizes are free: time, past, logits kept and, with `dynamic`, the batch."""
    arguments = cached_step.example(shape, batch=2 if dynamic else 1, time=3, past=5, dtype=model.dtype)
    time, past = Dim("time", max=shape["context"]), Dim("past", max=shape["context"])
    batch = {"batch": Dim("batch", max=LARGEST_BATCH)} if dynamic else {}
    cache = {0: past} | ({2: batch["batch"]} if dynamic else {})
    sizes = {
        "ids": {1: time} | ({0: batch["batch"]} if dynamic else {}),
        "positions": {0: time},
        "mask": {0: time, 1: Dim.AUTO},
        "kept": {0: Dim("kept", max=shape["context"])},
        "keys": cache,
        "values": cache,
    }
    return torch.export.export(cached_step.CachedStep(model), arguments, dynamic_shapes=sizes, strict=False)


def require_compiler() -> None:
    """Raise EngineUnavailable naming the C++ compiler that AOTInductor would use when it is not there."""
    wanted = [name for name in torch._inductor.config.cpp.cxx if name]
    if not any(shutil.which(name) for name in wanted):
        raise kinds.EngineUnavailable(f"engine aot needs the C++ compiler {' or '.join(wanted)}, not found: {WAY_OUT}")
