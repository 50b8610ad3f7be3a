"""Ways to reason: the search of a tree, verifiers, votes, and the budget that all of them keep."""

import pytest

from avalab.agent import reasoning
from avalab.agent.reasoning import Problem, answer_of, search, solve
from avalab.lab.errors import InputError


@pytest.mark.parametrize("depth_first", [False, True])
def test_a_search_finds_the_one_leaf_that_is_certain(depth_first):
    """Digits of 213, one a level; a node is worth 1 where it begins so, else 0.5 (kept: 3, so nothing is lost)."""

    def worth(node):
        return 1.0 if (2, 1, 3)[: len(node)] == node else 0.5

    found = search(
        (), lambda node: [(*node, d) for d in (1, 2, 3)], worth, lambda node: len(node) == 3,
        more=lambda: True, depth_first=depth_first, kept=3, depth=3,
    )  # fmt: skip
    assert found == (2, 1, 3)


def test_depth_first_opens_the_best_child_before_its_siblings():
    opened = []

    def propose(node):
        opened.append(node)
        return [node + "a", node + "b"]

    search("", propose, lambda n: 1.0 if n.endswith("b") else 0.6, lambda n: False, more=lambda: len(opened) < 4,
           depth_first=True, depth=3)  # fmt: skip
    assert opened[:3] == ["", "b", "bb"]


def test_a_search_without_tokens_gives_its_root_and_one_that_finds_nothing_its_best_node():
    assert search("r", lambda n: [n + "x"], lambda n: 1.0, lambda n: False, more=lambda: False) == "r"
    found = search(
        "", lambda n: [n + "x", n + "y"], lambda n: n.count("y") / 9, lambda n: False, more=lambda: True, depth=3
    )
    assert found == "yyy"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so 3 + 4 = 7\nAnswer: 7.", "7"), ("**Answer:** 12", "12"), ("It is 5, then 6", "6"), ("no idea", ""),
     ("Answer: 1\nAnswer: 2 + 3", "2 + 3"), ("The answer is: x", "x")],
)  # fmt: skip
def test_what_a_chain_ends_in_is_its_answer(text, answer):
    assert answer_of(text) == answer


def test_a_verifier_adds_up_an_expression_without_knowing_the_solution():
    entry = {"metadata": {"numbers": [3, 4, 5], "target": 17}}
    assert reasoning.reaches_target(entry, "3 * 4 + 5")
    assert reasoning.reaches_target(entry, "5 + 4 * 3 = 17")
    for wrong in ("17", "3 + 4 + 5", "3 * 4 + 5 + 0", "4 * 3 + 5 * 1", "import os", ""):
        assert not reasoning.reaches_target(entry, wrong)


def test_the_verifiers_agree_with_the_packages_own_answers():
    gym = pytest.importorskip("reasoning_gym", reason="needs the extra `reasoning`")
    for task, verifier in reasoning.VERIFIERS.items():
        made = gym.create_dataset(task, size=20, seed=1, **reasoning.TASKS[task])
        for entry in made:
            assert verifier(entry, entry["answer"]), (task, entry["question"], entry["answer"])
            assert not verifier(entry, "123456789")
        for problem, entry in zip(reasoning.problems(task, 20, 1), made, strict=True):
            assert problem.score(entry["answer"]) == 1.0
            assert problem.verify(entry["answer"])


def problem(verify=None) -> Problem:
    return Problem("toy", "What is 3 + 4?", lambda answer: float(answer == "7"), verify)


def test_votes_take_the_answer_given_most_often(scripted):
    pad = " word" * 30
    lines = [f"{pad} Answer: {n}" for n in (7, 8, 7)]
    attempt = solve(problem(), "votes", scripted(*lines), tokens=100)
    assert (attempt.answer, attempt.right, attempt.note) == ("7", True, "2 of 3 agree")


def test_draws_end_with_the_first_that_is_verified(scripted):
    speaker = scripted(" Answer: 8", "Answer: 7", "never asked")
    attempt = solve(problem(lambda a: a == "7"), "verified", speaker, tokens=500)
    assert (attempt.answer, attempt.note) == ("7", "verified after 2")
    assert speaker.lines == ["never asked"]


def test_a_tree_that_comes_to_no_answer_says_so(scripted):
    class Endless(scripted):
        def say(self, chat, **options):
            self.lines = ["maybe" if reasoning.JUDGE in chat[-1]["content"] else "3 and so on " * 3]
            return super().say(chat, **options)

    for way in ("breadth", "depth"):
        attempt = solve(problem(), way, Endless(), tokens=100)
        assert not attempt.right
        assert "no leaf" in attempt.note
        assert attempt.tokens <= 100 + reasoning.STEP_TOKENS


def test_a_tree_that_solves_it_is_right(scripted):
    class Solves(scripted):
        def say(self, chat, **options):
            self.lines = ["sure" if reasoning.JUDGE in chat[-1]["content"] else "Answer: 7"]
            return super().say(chat, **options)

    assert solve(problem(), "breadth", Solves(), tokens=100).right


def test_what_cannot_be_solved_is_refused(scripted):
    with pytest.raises(InputError, match="unknown way 'magic'"):
        solve(problem(), "magic", scripted(), tokens=100)
    with pytest.raises(InputError, match="3 tokens are no step"):
        solve(problem(), "chain", scripted(), tokens=3)
    with pytest.raises(InputError, match="toy has no verifier"):
        solve(problem(), "verified", scripted(), tokens=100)
    with pytest.raises(InputError, match="unknown task 'chess'"):
        reasoning.problems("chess", 1, 0)


def test_ways_are_compared_on_the_same_questions(scripted, run):
    class Right(scripted):
        def say(self, chat, **options):
            self.lines = ["Answer: 7"]
            return super().say(chat, **options)

    found = reasoning.compare(
        run, Right(), [problem()] * 3, tokens=40, ways=("chain", "direct", "verified"), engine="x"
    )
    assert [len(found[way]) for way in ("chain", "direct", "verified")] == [3, 3, 0]
    missing = [r for r in run.records if r.value is None]
    assert [r.subject for r in missing] == ["verified"]
    assert "no task among these has a verifier" in missing[0].note
