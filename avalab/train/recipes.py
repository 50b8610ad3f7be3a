"""What training is told: schedules and recipes, each refused when it is made if it cannot be followed.

Nothing here imports torch, so that the command line refuses a number in a tenth of a second; the rooms' modules use
these classes under the names `loop.Schedule`, `finetune.Recipe`, `distill.Recipe` and `qat.Recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite

from avalab.lab.errors import InputError

Map = tuple[tuple[int, int], ...]  # (student's block, teacher's block), counted from zero

ONLINE = "online"  # the teacher reads along

FORMS = ("sampled", "topk")  # of stored targets

TEACHERS = (ONLINE, *FORMS)

KINDS = ("scales", "weights", "blocks", "torchao")  # of training through the rounding

PREFERENCES = ("dpo", "ipo", "cdpo")  # losses of pairs, of `preferences.losses`

SCALINGS = ("linear", "llama3", "yarn")  # of rotary positions, beyond the context that they were trained for

CONTRASTIVE = ("clip", "siglip")  # losses of pictures and texts

MOST_ENTRIES = 255  # of a token's stored targets: how many there are takes a byte


def refuse_outside(
    name: str, value: float, low: float, high: float = inf, *, above: bool = False, below: bool = False
) -> None:
    """Raise ValueError for a number outside [low, high]; `above` and `below` leave out the ends, nan is outside all."""
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    if inside and isfinite(value):
        return
    start = f"above {low:g}" if above else f"{low:g} or more"
    end = "" if high == inf else f" and {'below' if below else 'at most'} {high:g}"
    raise InputError(f"{name} is {value:g}; it has to be {start}{end}")


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and how often; what a step is made of. Times are in steps unless they say otherwise.

    Raises ValueError for a number that no training can follow, such as a learning rate of 0, nan or 1e9.
    """

    learning_rate: float = 1e-3
    epochs: float = 1.0
    rows_per_step: int = 1  # gradient accumulation
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the whole gradient
    checkpoint_every: int = 50
    checkpoint_seconds: float = 30.0  # or after so long, whichever comes first
    patience: int = 0  # evaluations, one every `checkpoint_every`, without improvement before stopping; 0: no stop
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    steps: int = 0  # stop after so many, whatever the epochs; 0: no limit
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_outside("learning rate", self.learning_rate, 0, 1, above=True)
        refuse_outside("number of epochs", self.epochs, 0, 1e6, above=True)
        refuse_outside("number of rows a step", self.rows_per_step, 1)
        refuse_outside("share of warm-up", self.warmup, 0, 1, below=True)
        refuse_outside("weight decay", self.weight_decay, 0)
        refuse_outside("largest norm of a gradient", self.clip, 0, above=True)
        refuse_outside("number of steps between checkpoints", self.checkpoint_every, 1)
        refuse_outside("time between checkpoints in seconds", self.checkpoint_seconds, 0)
        refuse_outside("patience", self.patience, 0)
        refuse_outside("number of steps", self.steps, 0)


@dataclass(frozen=True)
class AdapterRecipe:
    """What is trained and how: the adapter, the rows, the schedule, and the means (which change speed, not results).

    Raises ValueError for numbers that no adapter can have. Rank 0 means the weights themselves, where `distill` asks.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("attention", "mlp")
    row_tokens: int = 1024
    rehearsal_tokens: int = 0  # of general text, held to what the base says there (`losses.rehearsed`)
    first_token_weight: float = 0.0  # of answers' first tokens, which decide between call and refusal
    schedule: Schedule = field(default_factory=Schedule)
    fused: bool = True  # the lab's kernels instead of PEFT's forward pass
    decoded: bool = True  # a 4-bit base is held in bf16 while training

    def __post_init__(self) -> None:
        refuse_outside("rank", self.rank, 0)
        refuse_outside("alpha", self.alpha, 0, above=True)
        refuse_outside("dropout", self.dropout, 0, 1, below=True)
        refuse_outside("number of tokens in a row", self.row_tokens, 2)
        refuse_outside("number of tokens of rehearsal", self.rehearsal_tokens, 0)
        refuse_outside("weight of first tokens", self.first_token_weight, 0)
        if not self.target_modules:
            raise InputError("no target modules; name attention, mlp, or layers by glob or name")


@dataclass(frozen=True)
class DistillRecipe:
    """How the student listens, and how it is trained. Weights of 0 leave a part out.

    Raises ValueError for a recipe that listens to nobody, or in no known way.
    """

    kl: float = 1.0
    temperature: float = 1.0
    reverse: float = 0.0  # share of `kl`
    cross_entropy: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    pairs: int = 4  # of blocks that are compared, evenly spaced
    layer_map: Map = ()  # (student's block, teacher's block); empty: `pairs` of them
    teacher: str = ONLINE
    count: int = 50  # draws or entries a token of stored targets
    training: AdapterRecipe = field(default_factory=AdapterRecipe)

    @property
    def listens(self) -> bool:
        """Whether the teacher's model is needed at all."""
        return any((self.kl, self.hidden, self.attention))

    def __post_init__(self) -> None:
        if self.teacher not in TEACHERS or not 0 <= self.reverse <= 1:
            known = f"choose one of {', '.join(TEACHERS)} and a share in [0, 1]"
            raise InputError(f"teacher {self.teacher!r} with a share of reverse divergence {self.reverse}; {known}")
        weights = (self.kl, self.cross_entropy, self.hidden, self.attention)
        if not all(0 <= weight < inf for weight in weights) or not any(weights):
            raise InputError(
                f"weights of kl, cross_entropy, hidden and attention are {', '.join(f'{w:g}' for w in weights)}; they "
                "have to be 0 or more, one of them above 0"
            )
        refuse_outside("temperature", self.temperature, 0, 1000, above=True)
        refuse_outside("number of pairs of blocks", self.pairs, 1)
        refuse_outside("number of entries a token", self.count, 1, MOST_ENTRIES)
        if self.teacher != ONLINE and (self.reverse or self.hidden or self.attention):
            raise InputError(f"{self.teacher!r} targets know forward divergence only; use the teacher online")


@dataclass(frozen=True)
class BlockTraining:
    """How long each block is trained, on how many windows a step, and how far a step moves at first.

    Raises ValueError for numbers that train nothing.
    """

    steps: int = 40
    windows_per_step: int = 4
    position_rate: float = 0.02  # in quantization steps
    scale_rate: float = 0.002  # relative

    def __post_init__(self) -> None:
        refuse_outside("number of steps of a block", self.steps, 1)
        refuse_outside("number of windows a step", self.windows_per_step, 1)
        refuse_outside("rate of positions", self.position_rate, 0, 1)
        refuse_outside("rate of scales", self.scale_rate, 0, 1)


@dataclass(frozen=True)
class RoundingRecipe:
    """What of a packed artefact is trained, how the teacher is heard, and for how long.

    Raises ValueError for an unknown kind, naming those that there are.
    """

    kind: str = "scales"
    zeros: bool = False  # zero points too
    teacher: str = "sampled"  # cached targets; `online`: it reads along
    count: int = 50  # draws a token
    windows_per_row: int = 2  # read at once; a step costs a rounding of all weights, however many they are
    schedule: Schedule = field(default_factory=lambda: Schedule(learning_rate=3e-3))
    blocks: BlockTraining = field(default_factory=BlockTraining)  # of `blocks` only, which has no schedule

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        refuse_outside("number of windows a row", self.windows_per_row, 1)


@dataclass(frozen=True)
class PreferenceRecipe:
    """Which loss of pairs is trained, how closely the model is held to where it began, and how adapters learn it.

    Raises ValueError for an unknown loss, naming those that there are, and for numbers that no loss can have.
    """

    loss: str = "dpo"
    beta: float = 0.1  # the larger, the less of a margin is asked for, or the sooner it is enough
    smoothing: float = 0.1  # of `cdpo`: share of pairs that are the wrong way round
    training: AdapterRecipe = field(
        default_factory=lambda: AdapterRecipe(schedule=Schedule(learning_rate=1e-4, rows_per_step=2))
    )

    def __post_init__(self) -> None:
        if self.loss not in PREFERENCES:
            raise InputError(f"unknown loss {self.loss!r}; choose one of {', '.join(PREFERENCES)}")
        refuse_outside("beta", self.beta, 0, 100, above=True)
        refuse_outside("smoothing", self.smoothing, 0, 0.5, below=True)
        refuse_outside("rank", self.training.rank, 1)


@dataclass(frozen=True)
class ContextRecipe:
    """How far a model's context is stretched, by which scaling of its positions, and how sparse training attends.

    Raises ValueError for a factor that stretches nothing, an unknown scaling, or a share of a row that is none.
    """

    factor: float = 2.0
    scaling: str = "linear"
    group_share: float = 0.25  # of a row: tokens that attend to each other; 1 is full attention
    training: AdapterRecipe = field(
        default_factory=lambda: AdapterRecipe(schedule=Schedule(learning_rate=2e-4, gradient_checkpointing=True))
    )

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise InputError(f"unknown scaling {self.scaling!r}; choose one of {', '.join(SCALINGS)}")
        refuse_outside("factor", self.factor, 1, 1024)
        refuse_outside("share of a group", self.group_share, 0, 1, above=True)
        refuse_outside("rank", self.training.rank, 1)


@dataclass(frozen=True)
class ImageRecipe:
    """The size of an image tower, its loss, and the batches it learns from.

    Raises ValueError for numbers that no tower or batch can have.
    """

    loss: str = "clip"
    width: int = 32  # channels of the largest picture, a multiple of 8; the smallest has four times as many
    shared: int = 128  # of the space that images and texts share
    batch: int = 256  # pairs: as many texts are wrong for an image
    chunk: int = 64  # images whose activations are in memory
    schedule: Schedule = field(default_factory=lambda: Schedule(learning_rate=2e-3, weight_decay=0.05, steps=400))

    def __post_init__(self) -> None:
        if self.loss not in CONTRASTIVE:
            raise InputError(f"unknown loss {self.loss!r}; choose one of {', '.join(CONTRASTIVE)}")
        for name, least in (("width", 8), ("shared", 2), ("batch", 2), ("chunk", 1)):
            refuse_outside(name, getattr(self, name), least)
        if self.width % 8:
            raise InputError(f"width is {self.width}; it has to be a multiple of 8, the groups of its norms")
        refuse_outside("number of steps", self.schedule.steps, 1)

    @classmethod
    def of(cls, row: dict) -> ImageRecipe:
        """The recipe that `dataclasses.asdict` wrote."""
        return cls(**{**row, "schedule": Schedule(**row["schedule"])})
