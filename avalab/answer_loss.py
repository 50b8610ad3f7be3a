"""How likely an artefact finds the right answers: the loss of an example's answer given its prompt.

1. An example is rendered and split by `packed_rows.encode`, as in training: the loss counts answer tokens only.
2. Its value is the mean negative log-likelihood of those tokens, in nats; logits exist only where there is loss.
3. What a training set is worth is a mean over draws of the set: each draw trains an artefact of its own, all are scored
   on the same examples, and the rise over a baseline is paired by draw. Its interval is Student's t over draws (1908),
   because chance in the set and in the order of training moves the loss more than the choice of scored examples does.

The loss moves long before the share of right calls does, which needs hundreds of cases to show ten points.

What it does not do: pack, pad or train; or say whether a call that is generated would be right (that is `evaluate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from avalab import artifacts, packed_rows, quality, statistics
from avalab.code import code_of
from avalab.evaluate import Respondent
from avalab.experiment import Run
from avalab.statistics import Estimate

UNIT = "nats/token"


def score(respondent: Respondent, examples: Sequence[dict], cache: Path) -> Float[Tensor, "example"]:
    """Mean loss of each example's answer tokens in nats; read from `cache` when the same bytes were scored before."""
    encoded = [packed_rows.encode(respondent.tokenizer, example["messages"]) for example in examples]
    identity = artifacts.sha256_of_text(str([(e.ids, e.labels) for e in encoded]))
    code = code_of(score)  # losses that older code computed are not trusted
    parts = (
        "answer-loss",
        respondent.artifact.sha256[:16],
        identity[:16],
        code[:8],
        torch.device(respondent.device).type,
    )
    path = cache / f"{'-'.join(parts)}.safetensors"
    try:
        return load_file(path)["loss"]
    except (OSError, KeyError, SafetensorError):  # absent or damaged: measured again
        bar = tqdm(encoded, desc=f"score {respondent.artifact.name}", leave=False)
        losses = torch.tensor([_loss(respondent, example) for example in bar])
        quality.save_atomically({"loss": losses}, path)
        return losses


@torch.inference_mode()
def _loss(respondent: Respondent, example: packed_rows.Encoded) -> float:
    labels = torch.tensor(example.labels)
    counted = (labels != packed_rows.IGNORED).nonzero().squeeze(-1)
    hidden = quality.hidden_states(respondent.model, torch.tensor([example.ids]))[0, counted.to(respondent.device)]
    log_probabilities = quality.log_probabilities(hidden, *quality.output_head(respondent.model)).cpu()
    return -log_probabilities.gather(-1, labels[counted, None]).mean().item()


def record(
    run: Run,
    subject: str,
    losses: Float[Tensor, "draw example"],
    *,
    baseline: Float[Tensor, "_ _"],
    part: str,
    details: dict | None = None,
) -> Estimate:
    """Append `answer_loss:<part>` and its rise over the baseline, `answer_loss_rise:<part>`, which is returned.

    Raises ValueError when the two have another number of draws or examples.
    """
    if losses.shape != baseline.shape:
        raise ValueError(f"cannot pair losses of shape {tuple(losses.shape)} with {tuple(baseline.shape)}")
    rise, about = statistics.over_draws((losses - baseline).mean(-1)), {"unit": UNIT, "engine": "torch"}
    details = {"examples": losses.shape[1], **(details or {})}
    run.record(subject, f"answer_loss:{part}", **vars(statistics.over_draws(losses.mean(-1))), **about, details=details)
    verdict = {"verdict": statistics.verdict(rise)}
    run.record(subject, f"answer_loss_rise:{part}", **vars(rise), **about, details=details | verdict)
    return rise
