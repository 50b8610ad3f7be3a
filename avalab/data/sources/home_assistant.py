"""Home Assistant's intents: sentence templates with slots, each of which says every value of its call.

A template such as `set [the] {area} (temp|temperature) to {temperature}` is parsed by hassil, the project's own
library, and one sentence is drawn from it: an alternative, an optional part or none, a value for each slot. The
intents' JSON has no descriptions; those of the tools and slots stand here.
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from pathlib import Path

from avalab.data.sources.catalogue import Catalogue, Step, Task, snake_case, tool_of
from avalab.lab.errors import Unavailable

INTENTS = {
    "HassBroadcast": "Announce a message in the whole home",
    "HassCancelTimer": "Cancel one timer",
    "HassCancelAllTimers": "Cancel every timer",
    "HassClimateGetTemperature": "Read the temperature of a room",
    "HassClimateSetFanMode": "Choose the fan mode of the heating or cooling",
    "HassClimateSetTemperature": "Set the wanted temperature of a room",
    "HassDecreaseTimer": "Take time off a running timer",
    "HassFanSetSpeed": "Set the speed of a fan in per cent",
    "HassGetWeather": "Tell the weather",
    "HassIncreaseTimer": "Add time to a running timer",
    "HassLawnMowerDock": "Send a lawn mower back to its base",
    "HassLawnMowerStartMowing": "Start a lawn mower",
    "HassLightSet": "Set brightness or colour of lights",
    "HassListAddItem": "Add an item to a list",
    "HassListCompleteItem": "Check an item off a list",
    "HassListRemoveItem": "Remove an item from a list",
    "HassMediaNext": "Go to the next track",
    "HassMediaPause": "Pause what is playing",
    "HassMediaPlayerMute": "Mute a media player",
    "HassMediaPlayerUnmute": "Unmute a media player",
    "HassMediaPrevious": "Go to the previous track",
    "HassMediaSearchAndPlay": "Find music or a show and play it",
    "HassMediaUnpause": "Go on playing what was paused",
    "HassPauseTimer": "Pause a timer",
    "HassSetPosition": "Open or close a cover to a position in per cent",
    "HassSetVolume": "Set the volume in per cent",
    "HassSetVolumeRelative": "Turn the volume up or down by a step",
    "HassShoppingListAddItem": "Add an item to the shopping list",
    "HassShoppingListCompleteItem": "Check an item off the shopping list",
    "HassStartTimer": "Start a timer",
    "HassTimerStatus": "Tell how much time is left on a timer",
    "HassUnpauseTimer": "Go on with a paused timer",
    "HassVacuumCleanArea": "Vacuum one room",
    "HassVacuumReturnToBase": "Send a vacuum cleaner back to its base",
    "HassVacuumStart": "Start a vacuum cleaner",
}

SLOTS = {
    "area": "Room of the home.",
    "floor": "Floor of the home.",
    "name": "Name of the device, list or place.",
    "message": "What is announced.",
    "temperature": "Degrees.",
    "fan_mode": "Mode of the fan.",
    "percentage": "Speed in per cent.",
    "hours": "Whole hours.",
    "minutes": "Whole minutes.",
    "seconds": "Whole seconds.",
    "item": "The item.",
    "brightness": "Brightness in per cent.",
    "color": "Colour of the light.",
    "temperature_kelvin": "Colour temperature in kelvin.",
    "position": "Position in per cent, 0 is closed.",
    "device_class": "Kind of device.",
    "volume_level": "Volume in per cent.",
    "volume_step": "Whether up or down, or by how many per cent.",
    "search_query": "What to look for.",
    "media_class": "Kind of media.",
    "conversation_command": "What is done when the time is up.",
    "start_hours": "Hours that the timer was started with.",
    "start_minutes": "Minutes that the timer was started with.",
    "start_seconds": "Seconds that the timer was started with.",
}

FREE = {  # values of slots that take any text
    "area": "kitchen;living room;bedroom;guest room;hallway;garage;attic;dining room;nursery;studio;laundry room",
    "floor": "first;second;ground;upper;top",
    "name": "Rosie;Bruno;Oslo;Lisbon;groceries;camping;north;reading corner;Alma;workshop",
    "message": "dinner is ready;the parcel has come;we leave in ten minutes;please be quiet;the bath is free",
    "search_query": "Nina Simone;Morning Raga;The Long Road Home;Cello Suites;Rain on the Roof;Ella Fitzgerald",
    "timer_name": "pasta;tea;laundry;nap;pizza;eggs",
    "timer_command": "turn off the heater;open the blinds;lock the front door;start the dishwasher",
    "todo_list_item": "oat milk;a tent peg;sunscreen;two torches;batteries",
    "shopping_list_item": "apples;brown rice;olive oil;dish soap;rye bread;lentils",
    "zone": "work;school;home",
}

DRAWS = 3  # sentences of each template


def read(wheel: Path) -> Catalogue:
    """The intents of INTENTS, in one service, and sentences drawn from their templates, the same at every call.

    Raises Unavailable without hassil.
    """
    try:
        from hassil.parse_expression import parse_sentence
    except ImportError:
        raise Unavailable("home-assistant-intents needs hassil; install it: pip install 'avalab[calls]'") from None
    with zipfile.ZipFile(wheel) as archive:
        english = json.loads(archive.read("home_assistant_intents/data/en.json"))
    rules = {name: parse_sentence(text).expression for name, text in english["expansion_rules"].items()}
    schemas, tasks, rng = {}, [], random.Random("home-assistant-intents")
    for intent in INTENTS:
        name, properties = snake_case(intent.removeprefix("Hass")), {}
        for row in english["intents"].get(intent, {"data": ()})["data"]:
            if row.get("slots") or row.get("requires_context", {}).get("area"):
                continue  # values that no sentence says
            for template in row["sentences"]:
                for _ in range(DRAWS):
                    drawer = _Drawer(rules, english["lists"], parse_sentence, rng)
                    text = " ".join(drawer.text(parse_sentence(template).expression).split())
                    properties |= drawer.schemas
                    if drawer.known and drawer.values:
                        step = Step(name, drawer.values)
                        tasks.append(Task("home", text[0].upper() + text[1:], (step,), says_all=True))
        schemas[name] = tool_of(name, INTENTS[intent], properties, ())
    once = {json.dumps([t.title, t.steps[0].arguments]): t for t in tasks}
    return Catalogue({"home": schemas}, tuple(once.values()))


class _Drawer:
    """Draws one sentence of a template; `values` and `schemas` collect its slots, `known` that every rule was there."""

    def __init__(self, rules: dict, lists: dict, parse, rng: random.Random) -> None:
        self.rules, self.lists, self.parse, self.rng = rules, lists, parse, rng
        self.values: dict[str, object] = {}
        self.schemas: dict[str, dict] = {}
        self.known = True

    def text(self, node) -> str:
        """One way to say a part of a template."""
        kind = type(node).__name__
        if kind == "TextChunk":
            return node.original_text
        if kind == "Alternative":
            return self.text(self.rng.choice(node.items))
        if kind == "Permutation":
            return " ".join(self.text(item) for item in self.rng.sample(node.items, len(node.items)))
        if kind == "RuleReference":
            self.known &= node.rule_name in self.rules
            return self.text(self.rules[node.rule_name]) if node.rule_name in self.rules else ""
        if kind == "ListReference":
            return self._slot(node.list_name, node.slot_name)
        return "".join(self.text(item) for item in node.items)

    def _slot(self, listed: str, slot: str) -> str:
        told = self.lists.get(listed, {})
        self.known &= slot in SLOTS
        about = {"description": SLOTS.get(slot, "")}
        if "range" in told:
            low, high, step = (told["range"].get(key, other) for key, other in (("from", 0), ("to", 100), ("step", 1)))
            value = self.rng.randrange(low, high + 1, step) * told["range"].get("multiplier", 1)
            self.values[slot], self.schemas[slot] = value, {"type": "integer", **about}
            return str(abs(value))
        if "values" in told:
            drawn = self.rng.choice(told["values"])
            values = list(dict.fromkeys(row["out"] for row in told["values"]))
            kind = {"type": "string", "enum": values} if isinstance(values[0], str) else {"type": "integer"}
            self.values[slot], self.schemas[slot] = drawn["out"], kind | about
            said = self.text(self.parse(drawn["in"]).expression)
            self.known &= bool(re.search(re.escape(str(drawn["out"])), said))  # what is said is what is passed
            return said
        free = FREE.get(listed)
        self.known &= free is not None
        value = self.rng.choice((free or listed).split(";"))
        self.values[slot], self.schemas[slot] = value, {"type": "string", **about}
        return value
