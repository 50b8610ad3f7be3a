"""Forced tokens, guesses, shared prefixes and batches change how often a model is read, and never an answer."""

import numpy as np
import pytest

from avalab.engines.calling.decoder import Ask, Decoder, looked_up
from avalab.lab.errors import InputError

WORDS, STOP = 40, 0


class Recorder:
    """A model whose next token depends on its slot's last two tokens; it refuses rows that do not join its slots."""

    def __init__(self, slots: int, context: int = 200) -> None:
        self.slots, self.context = slots, context
        self.held: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        self.rows: list[int] = []

    def read(self, rows):
        self.rows.append(len(rows))
        found = []
        for row in rows:
            held = self.held[row.sequence]
            assert row.place == len(held), "a row has to begin where its slot ends"
            held += row.tokens
            places = range(len(held) - row.wanted, len(held))
            found.append(np.stack([self.logits(held[: place + 1]) for place in places]))
        return found

    def logits(self, tokens):
        row = np.zeros(WORDS, np.float32)
        row[(tokens[-1] * 7 + tokens[-2] * 3 + 1) % WORDS if len(tokens) > 1 else 5] = 1
        return row

    def share(self, source, target, place):
        self.held[target] = self.held[source][:place]

    def forget(self, slot, place):
        del self.held[slot][place:]


class Tens:
    """A grammar: after a multiple of ten the two tokens that follow it in counting have to come."""

    def __init__(self) -> None:
        self.due: list[int] = []

    def choose(self, logits):
        return self.due[0] if self.due else int(logits.argmax())

    def accept(self, token):
        if self.due:
            assert token == self.due.pop(0)
        elif token % 10 == 0 and token:
            self.due = [token + 1, token + 2]

    def forced(self):
        found, self.due = self.due, []
        return found

    def allowed(self, tokens):
        return 0 if self.due else next((i + 1 for i, t in enumerate(tokens) if t % 10 == 0), len(tokens))


def prompts(count):
    """Prompts that begin alike, as requests to one agent do, and repeat themselves."""
    return [[3, 9, 27, 1, 3, 9, 27, 1, 4 + i, 5, 4 + i, 5, 2, i + 1] for i in range(count)]


def run(*, slots, forced, guess, at_once=0):
    reader = Recorder(slots)
    decoder = Decoder(reader, (STOP,), forced=forced, guess=guess)
    asks = [Ask(prompt, 24, Tens()) for prompt in prompts(7)]
    return dict(decoder.answers(asks, at_once=at_once)), decoder.tally, reader


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("guess", [0, 5])
def test_every_way_to_skip_readings_gives_the_answers_of_slow_decoding(slots, forced, guess):
    slow, tally, _ = run(slots=1, forced=False, guess=0)
    fast, quick, _ = run(slots=slots, forced=forced, guess=guess)
    assert fast == slow
    assert quick.emitted == tally.emitted == sum(map(len, slow.values()))
    assert quick.readings <= tally.readings


def test_forced_tokens_are_read_with_the_next_ones_and_counted():
    _, slow, _ = run(slots=1, forced=False, guess=0)
    _, fast, _ = run(slots=1, forced=True, guess=0)
    assert fast.forced > 0
    assert fast.readings == slow.readings - fast.forced + unread_ends(fast)
    assert fast.chosen + fast.forced >= fast.emitted


def unread_ends(tally):
    """Forced tokens beyond an answer's longest are dropped unread."""
    return tally.chosen + tally.forced - tally.emitted


def test_the_beginning_that_requests_share_is_read_once():
    _, tally, _ = run(slots=2, forced=True, guess=0)
    assert tally.prompt_tokens == 7 * 14
    assert tally.shared_tokens == 5 * 8  # of eight common tokens; the first two requests begin together


def test_no_more_requests_are_at_work_than_were_asked_for():
    _, _, reader = run(slots=4, forced=True, guess=0, at_once=2)
    assert max(reader.rows) == 2


def test_a_guess_is_what_followed_the_same_words_last():
    assert looked_up([1, 2, 3, 4, 1, 2, 5, 6], [9, 1, 2], 2) == [5, 6]
    assert looked_up([1, 2, 3, 4, 1, 2, 5, 6], [3, 4, 1], 3) == [2, 5, 6]
    assert looked_up([1, 2, 3], [7, 8, 9], 2) == []


@pytest.mark.parametrize(("prompt", "more"), [([1] * 190, 20), ([], 5), ([1], 0)])
def test_a_prompt_without_room_for_its_answer_is_refused_with_both_numbers(prompt, more):
    with pytest.raises(InputError, match=f"a prompt of {len(prompt)} tokens and {more} to come"):
        list(Decoder(Recorder(1), (STOP,)).answers([Ask(prompt, more, Tens())]))
