"""Agents as data: who asks which model for what, how often, and what each of them insists on.

A file of agents is TOML. `[models]` names the model of each size class, `[defaults]` says what an agent has that says
nothing itself, and `agents` is a list of tables:

    name               a word of its own
    size               small, medium or large: the class, whose model it uses and whose recipes are tried
    model              another model than its class's (an asset, a folder, a hub id)
    task               what it does, for people
    context            tokens of its conversation that stay in memory: its keys and values are its own
    prompt_tokens      tokens that a call reads anew, and `new_tokens` those that it writes
    calls_per_minute   how often it asks
    memory_limit       most memory of its model's weights and its own context, such as "400MiB"; none without
    latency_limit_ms   most milliseconds of a call; none without
    quality_floor      least share of next tokens on which its model agrees with the unshrunk one
    critical           counts `CRITICAL_WEIGHT` times, and is the last to get a new model
    adapter_rank       of an adapter of its own, called `adapter`, on the model; 0 without

Nothing here imports torch.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import ROOT, byte_count

EXAMPLE = ROOT / "data" / "agents.toml"

SIZES = ("small", "medium", "large")

CRITICAL_WEIGHT = 4.0


@dataclass(frozen=True)
class Agent:
    """One agent and its limits; memory in bytes, latency in milliseconds, both None where there is no limit."""

    name: str
    size: str
    model: str
    task: str = ""
    context: int = 512
    prompt_tokens: int = 128
    new_tokens: int = 32
    calls_per_minute: float = 1.0
    memory_limit: int | None = None
    latency_limit_ms: float | None = None
    quality_floor: float = 0.0
    critical: bool = False
    adapter: str = ""
    adapter_rank: int = 0

    @property
    def weight(self) -> float:
        """What its quality counts for: its calls, those of a critical agent several times."""
        return self.calls_per_minute * (CRITICAL_WEIGHT if self.critical else 1.0)


def read_agents(path: Path, *, model: str = "") -> list[Agent]:
    """The agents of a TOML file, in its order; with `model`, all of them use that one.

    Raises MissingFile without the file, InputError naming the agent and the value for what an agent cannot be.
    """
    if not path.is_file():
        raise MissingFile(f"no agents at {path}; the example is {EXAMPLE}")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    if unknown := sorted(set(document) - {"models", "defaults", "agents"}):
        raise InputError(f"{path} has no use for {', '.join(unknown)}; it holds models, defaults and agents")
    models, defaults, rows = (document.get(key, kind()) for key, kind in SECTIONS.items())
    for key, value in zip(SECTIONS, (models, defaults, rows), strict=True):
        if not isinstance(value, SECTIONS[key]):
            raise InputError(f"{key} in {path} is a {type(value).__name__}; it has to be a {SECTIONS[key].__name__}")
    if not rows:
        raise InputError(f"{path} names no agents; each is a table of the list `agents`")
    found = [_agent(row, number, models, defaults) for number, row in enumerate(rows, 1)]
    names = [agent.name for agent in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} names {twice[0]!r} {names.count(twice[0])} times; an agent's name is its own")
    return [replace(agent, model=model) for agent in found] if model else found


SECTIONS = {"models": dict, "defaults": dict, "agents": list}


def _agent(row: object, number: int, models: dict, defaults: dict) -> Agent:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"].strip():
        raise InputError(f"agent {number} has no name; give it one, such as name = 'weather'")
    row = {"size": "small", **defaults, **row}
    name, size = row["name"], row["size"]
    if any(not (letter.isalnum() or letter in "-_.") for letter in name) or name.startswith("."):
        raise InputError(f"agent {name!r} cannot be a file's name; use letters, digits, '-', '_' and '.'")
    known = {field.name for field in fields(Agent)}
    if unknown := sorted(set(row) - known):
        raise InputError(f"agent {name!r} has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if size not in SIZES:
        raise InputError(f"agent {name!r} is of size {size!r}; choose one of {', '.join(SIZES)}")
    model = row.get("model", models.get(size))
    if not isinstance(model, str) or not model:
        raise InputError(f"agent {name!r} has no model; name one, or that of {size!r} below [models]")
    for key, value in row.items():
        row[key] = _checked(name, key, value)
    agent = Agent(**row | {"model": model})
    if agent.adapter_rank and not agent.adapter:
        raise InputError(f"agent {name!r} has adapter_rank {agent.adapter_rank} and no adapter; name it")
    if agent.prompt_tokens + agent.new_tokens > agent.context:
        asked = f"{agent.prompt_tokens} + {agent.new_tokens} tokens a call"
        raise InputError(f"agent {name!r} has {asked} and a context of {agent.context}; raise context")
    return agent


LEAST = {"context": 1, "prompt_tokens": 1, "new_tokens": 1, "adapter_rank": 0}

POSITIVE = ("calls_per_minute", "latency_limit_ms")


def _checked(name: str, key: str, value: object) -> object:
    """A value as an `Agent` holds it. Raises InputError naming agent, key and value for one that it cannot have."""

    def refuse(allowed: str) -> InputError:
        return InputError(f"agent {name!r} has {key} = {value!r}; it has to be {allowed}")

    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if key == "memory_limit":
        if isinstance(value, str):
            return byte_count(value, least=1)
        if not is_number or value < 1:
            raise refuse("a size such as '400MiB'")
        return int(value)
    if key in LEAST and not (isinstance(value, int) and is_number and value >= LEAST[key]):
        raise refuse(f"a whole number of {LEAST[key]} or more")
    if key in POSITIVE and not (is_number and value > 0):
        raise refuse("a number above 0")
    if key == "quality_floor" and not (is_number and 0 <= value <= 1):
        raise refuse("a share from 0 to 1")
    if key == "critical" and not isinstance(value, bool):
        raise refuse("true or false")
    if key in ("name", "size", "model", "task", "adapter") and not isinstance(value, str):
        raise refuse("text")
    return value


def unique_models(agents: list[Agent]) -> dict[str, list[Agent]]:
    """The agents of each model, models in the order in which they are named first."""
    found: dict[str, list[Agent]] = {}
    for agent in agents:
        found.setdefault(agent.model, []).append(agent)
    return found
