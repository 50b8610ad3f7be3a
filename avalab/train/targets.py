"""What a teacher said about each token of some rows, computed once and kept in a few bytes a token.

Two forms of a next-token distribution p = softmax(z / T) of the teacher:

- `sampled`: `count` draws of vocabulary entries by p, kept as ids and how often each came. Their shares are an unbiased
  estimate of p, so the gradient of the cross-entropy from them is the dense one's on average, rare entries included;
  the k most probable would teach that there are no others. Draws are systematic (Madow and Madow 1944), one random
  offset and then equal steps along the cumulated p: an entry comes floor(count p) or ceil(count p) times, which varies
  less than independent draws do. Source: Anshumann et al. 2025, arXiv 2503.16870.
- `topk`: the `count` most probable entries with p in float16; the loss takes all others as one event (`kernels`).

A file holds, for the tokens that are scored: how many entries each has, their ids (2 bytes, a third one where the
vocabulary needs it), their counts (1 byte) or p (2 bytes), and the teacher's entropy (2 bytes), which turns the loss
into a divergence. Its header names the rows by hash, the teacher and the form: targets for other rows are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from avalab.data.packing import IGNORED, Rows, one_row_batch
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import checkpoint, predict
from avalab.models.attention import apply_packed_attention
from avalab.train.recipes import FORMS


@dataclass(frozen=True)
class TargetForm:
    """How much of a distribution is kept."""

    name: str = "sampled"
    count: int = 50  # draws, or most probable entries: at most 255
    temperature: float = 1.0
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        if self.name not in FORMS or not 1 <= self.count <= 255 or not self.temperature > 0:
            raise InputError(
                f"targets {self.name!r} of {self.count} entries at temperature {self.temperature}; choose one of "
                f"{', '.join(FORMS)}, 1 to 255 entries and a positive temperature"
            )


def attach_targets(run: Run, rows: Rows, teacher: Artifact, form: TargetForm) -> tuple[Rows, float]:
    """The rows with `target_ids`, `target_weights` and `target_entropy`, and the file's bytes per scored token.

    Computed once: the file in the run's cache is named after rows, teacher and form, and read when it is there.
    """
    about = header(rows, teacher, form)
    name = artifacts.sha256_of_text(json.dumps(about, sort_keys=True))[:16]
    path = run.artifacts_dir / "cache" / f"targets-{name}.safetensors"
    if not path.is_file():
        words = checkpoint.tokenizer_words(teacher)
        write_targets(path, rows, checkpoint.load_model(teacher, run.device, packed=False), about, words=words)
    scored = sum(int((row["labels"] != IGNORED).sum()) for row in rows)
    return load_targets(path, rows), path.stat().st_size / max(1, scored)


def header(rows: Rows, teacher: Artifact, form: TargetForm) -> dict:
    """What a file of targets says about itself; the code's hash because older draws are not trusted."""
    code = code_of(attach_targets)[:12]
    return {"rows": rows_sha256(rows), "teacher": teacher.sha256, "code": code, **asdict(form)}


def rows_sha256(rows: Rows) -> str:
    """Identity of rows: tokens, labels and where examples begin."""
    parts = [[row[name].tolist() for name in ("input_ids", "labels", "boundaries")] for row in rows]
    return artifacts.sha256_of_text(json.dumps(parts))


@torch.inference_mode()
def write_targets(path: Path, rows: Rows, teacher: PreTrainedModel, about: dict, *, words: int | None = None) -> None:
    """Compute the targets of all rows, among the first `words` entries, and keep them under `path`."""
    apply_packed_attention(teacher)
    generator = torch.Generator().manual_seed(about["seed"])
    form, parts = TargetForm(about["name"], about["count"], about["temperature"], about["seed"]), []
    for row in tqdm(rows, desc="teacher", unit="row", leave=False):
        for log_p in distributions(teacher, row, form.temperature, words):
            ids, kept = sampled(log_p, form.count, generator) if form.name == "sampled" else topk(log_p, form.count)
            parts.append((ids, kept, -(log_p.exp() * log_p).sum(-1)))
    found = _packed(parts, len(teacher.get_output_embeddings().weight), form)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(found, temporary, metadata={"about": json.dumps(about)})
    temporary.replace(path)


def distributions(
    teacher: PreTrainedModel, row: dict[str, Tensor], temperature: float, words: int | None = None
) -> Iterator[Tensor]:
    """Log-probabilities ["token vocab"] at a temperature of the tokens that are scored, some tokens at a time.

    They are those of the first `words` entries; None takes all.
    """
    inputs = {n: v.to(teacher.device) for n, v in one_row_batch([row]).items() if n in ("input_ids", "position_ids")}
    hidden = teacher.base_model(**inputs, boundaries=row["boundaries"], use_cache=False).last_hidden_state[0]
    head, finish = predict.output_head(teacher)
    for part in (row["labels"] != IGNORED).nonzero()[:, 0].split(predict.CHUNK_TOKENS):
        log_p = predict.log_probabilities(hidden[part.to(hidden.device)], head, finish).cpu()
        padded = words is not None and words < log_p.shape[-1]
        yield (log_p[:, :words] / temperature).log_softmax(-1) if padded or temperature != 1 else log_p


def sampled(
    log_p: Float[Tensor, "token vocab"], count: int, generator: torch.Generator
) -> tuple[Int[Tensor, "token place"], Int[Tensor, "token place"]]:
    """Entries of `count` systematic draws, and how often each came; unused places have 0."""
    cumulated = log_p.double().exp().cumsum(-1)
    offset = torch.rand(len(log_p), 1, generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + offset) / count * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, points, right=True).clamp(max=log_p.shape[-1] - 1)
    first = torch.cat([torch.ones_like(drawn[:, :1]), (drawn[:, 1:] != drawn[:, :-1]).long()], 1)
    place = first.cumsum(1) - 1  # draws come in order of the ids
    width = int(place.max()) + 1
    ids = torch.zeros(len(drawn), width, dtype=torch.long).scatter_(1, place, drawn)
    return ids, torch.zeros_like(ids).scatter_add_(1, place, torch.ones_like(drawn))


def topk(
    log_p: Float[Tensor, "token vocab"], count: int
) -> tuple[Int[Tensor, "token place"], Float[Tensor, "token place"]]:
    """The most probable entries and their probabilities; fewer than `count` in a smaller vocabulary."""
    p, ids = log_p.exp().topk(min(count, log_p.shape[-1]))
    return ids, p


def load_targets(path: Path, rows: Rows) -> Rows:
    """The rows with their targets: `target_ids`, `target_weights` ["token place"] and `target_entropy` ["token"].

    Raises ValueError when the file is damaged or was made for other rows.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no file of targets, or damaged ({error}); delete it to make it again") from error
    if about["rows"] != rows_sha256(rows):
        raise InputError(
            f"{path} was made for rows {about['rows'][:12]}, these are {rows_sha256(rows)[:12]}; compute targets again"
        )
    return [{**row, **extra} for row, extra in zip(rows, _unpacked(rows, found, about), strict=True)]


def _packed(parts: list[tuple[Tensor, Tensor, Tensor]], vocab: int, form: TargetForm) -> dict[str, Tensor]:
    """One flat tensor a kind: unused places are left out."""
    used = [kept > 0 for _, kept, _ in parts]
    ids = torch.cat([ids[mask] for (ids, _, _), mask in zip(parts, used, strict=True)])
    kept = torch.cat([kept[mask] for (_, kept, _), mask in zip(parts, used, strict=True)])
    return {
        "lengths": torch.cat([mask.sum(1) for mask in used]).to(torch.uint8),
        "ids": (ids & 0xFFFF).to(torch.uint16),
        **({"high": (ids >> 16).to(torch.uint8)} if vocab > 2**16 else {}),
        "kept": kept.to(torch.uint8 if form.name == "sampled" else torch.float16),
        "entropy": torch.cat([entropy for _, _, entropy in parts]).to(torch.float16),
    }


def _unpacked(rows: Rows, found: dict[str, Tensor], about: dict) -> Iterator[dict[str, Tensor]]:
    """Row by row, padded to the longest token of the row; tokens that are not scored have weight 0."""
    lengths = found["lengths"].long()
    ids = found["ids"].int() + (found["high"].int() << 16 if "high" in found else 0)
    weights = found["kept"].float() / (about["count"] if about["name"] == "sampled" else 1)
    starts, token = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]), 0
    for row in rows:
        scored = (row["labels"] != IGNORED).nonzero()[:, 0]
        these = slice(token, token + len(scored))
        span, long = slice(int(starts[token]), int(starts[token + len(scored)])), lengths[these]
        width = max(1, int(long.max())) if len(long) else 1
        mask = torch.zeros(len(row["labels"]), width, dtype=torch.bool)
        mask[scored] = torch.arange(width) < long[:, None]
        shape, entropy = mask.shape, torch.zeros(len(row["labels"]))
        entropy[scored] = found["entropy"][these].float()
        yield {
            "target_ids": torch.zeros(shape, dtype=torch.int32).masked_scatter_(mask, ids[span]),
            "target_weights": torch.zeros(shape).masked_scatter_(mask, weights[span]),
            "target_entropy": entropy,
        }
        token += len(scored)
