"""The sub-command `recover`: a low-bit artefact is trained through its rounding; its bytes stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avalab.cli_options import AsJson, Profile, Seed, print_records


def recover(
    artifact: Annotated[Path, typer.Argument(help="Folder of an rtn, gptq, awq or ava artefact.")],
    out: Annotated[Path, typer.Option(help="Folder of the new artefact, of the same bytes.")],
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of the bf16 original; without, the base that lies beside it.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of calibration text to learn from.")] = 8192,
    kind: Annotated[str, typer.Option(help="scales, weights, blocks, torchao, or both: blocks, then scales.")] = "both",
    steps: Annotated[int, typer.Option(min=1, help="Of each block.")] = 40,
    learning_rate: Annotated[float, typer.Option(help="End to end, at the end of the warm-up.")] = 3e-3,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train codes and scales of a low-bit model towards its bf16 original; stopped, it goes on when run again."""
    from avalab import artifacts, models, qat
    from avalab.block_training import Blocks
    from avalab.experiment import Run
    from avalab.train import Schedule

    if out.exists() and not (out / artifacts.CARD).is_file():
        raise ValueError(f"{out} exists and is not an artefact; name a new folder")
    run, start = Run("avalab_recover", profile, seed), artifacts.load(artifact)
    whole = artifacts.load(teacher or artifact.parent / start.card["base"]["name"])
    read = qat.windows(run, models.load_tokenizer(start), tokens=tokens)
    how = {"schedule": Schedule(learning_rate=learning_rate), "blocks": Blocks(steps=steps)}
    if kind == "both":
        blocks = qat.Recipe(kind="blocks", **how)
        start = qat.train_quantized(
            start, whole, read, run=run, out=run.artifacts_dir / f"{start.name}+blocks", recipe=blocks
        )
    recipe = qat.Recipe(kind="scales" if kind == "both" else kind, **how)
    found = qat.train_quantized(start, whole, read, run=run, out=out.resolve(), recipe=recipe)
    qat.record_recovery(run, out.name, found)
    print_records(run, as_json)
    if not as_json:
        print(f"{found.path}: {found.bytes / 1e6:.1f} MB, as before")
