"""A file of agents: what it says, and what it is refused for."""

import pytest

from avalab.lab.errors import InputError, MissingFile
from avalab.plan.agents import CRITICAL_WEIGHT, EXAMPLE, read_agents, unique_models

MODELS = '[models]\nsmall = "tiny"\n'


def written(tmp_path, text):
    file = tmp_path / "agents.toml"
    file.write_text(text)
    return file


def test_the_example_holds_69_agents_of_three_models():
    agents = read_agents(EXAMPLE)
    assert len(agents) == len({agent.name for agent in agents}) == 69
    assert {len(members) for members in unique_models(agents).values()} == {30, 25, 14}
    assert {agent.size for agent in agents} == {"small", "medium", "large"}


def test_defaults_fill_what_an_agent_does_not_say_and_a_size_in_words_becomes_bytes(tmp_path):
    file = written(
        tmp_path,
        'agents = [{name = "a"}, {name = "b", context = 99, prompt_tokens = 9, memory_limit = "2MiB", critical = true}]'
        "\n"
        f"{MODELS}[defaults]\ncontext = 200\ncalls_per_minute = 3\n",
    )
    first, second = read_agents(file)
    assert (first.context, second.context, second.memory_limit) == (200, 99, 2 * 2**20)
    assert (first.weight, second.weight) == (3, 3 * CRITICAL_WEIGHT)
    assert [agent.model for agent in read_agents(file, model="other")] == ["other", "other"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{name = "a"}, {name = "a"}', "names 'a' 2 times"),
        ('{name = "a", size = "huge"}', "is of size 'huge'; choose one of small, medium, large"),
        ('{name = "a", size = "large"}', "has no model; name one, or that of 'large'"),
        ('{name = "a", context = -1}', "context = -1; it has to be a whole number of 1 or more"),
        ('{name = "a", latency_limit_ms = 0}', "latency_limit_ms = 0; it has to be a number above 0"),
        ('{name = "a", calls_per_minute = nan}', "calls_per_minute = nan; it has to be a number above 0"),
        ('{name = "a", memory_limit = "much"}', "'much' is not a size"),
        ('{name = "a", memory_limit = -5}', "memory_limit = -5; it has to be a size"),
        ('{name = "a", quality_floor = 1.5}', "quality_floor = 1.5; it has to be a share"),
        ('{name = "a", critical = 1}', "critical = 1; it has to be true or false"),
        ('{name = "a", speed = 1}', "agent 'a' has no 'speed'; it has adapter"),
        ('{name = "../a"}', "cannot be a file's name"),
        ("{size = 'small'}", "agent 1 has no name"),
        ('{name = "a", adapter_rank = 4}', "adapter_rank 4 and no adapter"),
        ('{name = "a", context = 20}', "128 \\+ 32 tokens a call and a context of 20"),
    ],
)
def test_what_an_agent_cannot_be_is_refused_by_name_and_value(rows, said, tmp_path):
    with pytest.raises(InputError, match=said):
        read_agents(written(tmp_path, f"agents = [{rows}]\n{MODELS}"))


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(MissingFile, match=r"no agents at .*the example is"):
        read_agents(tmp_path / "none.toml")
    for text, said in [("agents = [", "is not TOML"), ("", "names no agents"), ("more = 1", "no use for more")]:
        with pytest.raises(InputError, match=said):
            read_agents(written(tmp_path, text))
    with pytest.raises(InputError, match=r"models in .* is a list; it has to be a dict"):
        read_agents(written(tmp_path, 'models = []\nagents = [{name = "a"}]'))
