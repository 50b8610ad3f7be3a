"""The page of a results folder, built from notebooks written by hand."""

import base64
import html.parser
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from avalab.lab.run import Record, save_records
from avalab.report import page, plots

QUESTION = "How small is <small> & still good?"
VOID = {"meta", "img", "br", "link"}


def code(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def printed(text: str) -> dict:
    return new_output("stream", text=text)


def shown(**data: str) -> dict:
    return new_output("display_data", {k.replace("_", "/"): v for k, v in data.items()})


def write_notebook(path, *cells: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)


@pytest.fixture
def lab(tmp_path):
    """A results folder with a notebook that ran, one that failed and one that was never run."""
    folder, notebooks = tmp_path / "results" / "laptop", tmp_path / "notebooks"
    rows = [("bf16", 2.0, 0.0), ("nf4", 1.0, 0.2)]
    facts = {
        "when": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "device": "cpu: X",
        "threads": 2,
        "model": "tiny",
    }
    records = [
        Record("01_small", s, m, v, "", **facts)
        for s, *vs in rows
        for m, v in zip(("artifact_bytes", "kl_divergence"), vs, strict=True)
    ]
    save_records(
        [*records, Record("01_small", "a<b", "perplexity", None, "1", note="no kernel")], folder / "01_small.json"
    )
    picture = plots.pareto(records, path=folder / "figures" / "01_pareto.png")
    write_notebook(
        folder / "01_small.ipynb",
        new_markdown_cell(f"# {QUESTION}\nAn answer would be a number."),
        code(
            "table",
            shown(text_html='<style>x{}</style><table><tr><td onclick="x()">112.4</td></tr></table>'),
            tags=("table",),
        ),
        new_markdown_cell("## What the bytes bought"),
        code("draw", shown(image_png=base64.b64encode(picture.png).decode(), text_plain="a picture")),
        code("print(finding)", printed("**nf4** is 2x smaller & <i>worse</i>.\nSo be it.\n"), tags=("finding",)),
        code("run.save()", shown(text_plain="'saved'")),
    )
    write_notebook(folder / "02_prune.failed.ipynb", new_markdown_cell("# What can be zeroed?"), code("1 / 0"))
    (folder / "02_prune.traceback.txt").write_text("Traceback\n  ...\nZeroDivisionError: <division> by zero\n")
    write_notebook(notebooks / "03_adapt.ipynb", new_markdown_cell("# Does an adapter bring it back?"), code("1"))
    return folder, notebooks


@pytest.fixture
def text(lab):
    return page.build_page(*lab).read_text()


class Structure(html.parser.HTMLParser):
    """Checks that every tag is closed in order, and collects what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.references, self.ids, self.images = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.references += [v for k, v in attrs.items() if k in ("src", "href", "srcset", "data", "action")]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.images += [attrs] if tag == "img" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_every_reference_leads_to_a_file_or_a_section(lab, text):
    structure = Structure(text)
    assert structure.open == []
    for reference in structure.references:
        assert reference[1:] in structure.ids if reference[0] == "#" else (lab[0] / reference).is_file(), reference


def test_the_page_asks_for_nothing_from_elsewhere_runs_nothing_and_knows_no_absolute_path(lab, text):
    assert not re.search(r"https?:|//|@import|url\(|<script|onclick|<link", text)
    assert str(lab[0].parent.parent) not in text


def test_a_notebook_that_ran_shows_its_question_finding_table_and_records(text):
    assert "How small is &lt;small&gt; &amp; still good?" in text
    assert "<p><strong>nf4</strong> is 2x smaller &amp; &lt;i&gt;worse&lt;/i&gt;.</p><p>So be it.</p>" in text
    assert "<table><tr><td>112.4</td></tr></table>" in text, "no style and no handler of the notebook's own"
    assert "All 5 records" in text
    assert "a&lt;b</th><td>perplexity</td><td>not measured</td>" in text
    assert "Measured 2026-01-02T03:04:05+00:00; model tiny; seed 0; commit abc1234; cpu: X; threads 2" in text


def test_a_figure_has_the_heading_above_its_cell_and_the_description_from_its_file(text):
    (image,) = Structure(text).images
    assert image["src"] == "figures/01_pareto.png"
    assert image["alt"] == "KL divergence against artefact of 2 subjects. On the Pareto front: bf16, nf4."
    assert (image["width"], image["height"]) == ("900", "640")
    assert "<strong>What the bytes bought.</strong>" in text


def test_a_failed_notebook_is_named_with_the_last_line_of_its_error_and_its_question(text):
    assert "The last run failed:</strong> ZeroDivisionError: &lt;division&gt; by zero" in text
    assert "What can be zeroed?" in text
    assert 'href="02_prune.failed.ipynb"' in text


def test_an_earlier_good_run_of_a_failed_notebook_stays_on_the_page_and_is_called_that(lab):
    (lab[0] / "01_small.traceback.txt").write_text("KeyError: 'x'\n")
    text = page.build_page(*lab).read_text()
    assert "KeyError: &#39;x&#39;" in text
    assert "Earlier run: <strong>nf4</strong> is 2x smaller" in text


def test_a_notebook_that_was_never_run_is_listed_as_not_run(text):
    assert "Does an adapter bring it back?" in text
    assert "not run" in text
    assert "1 done, 1 failed, 1 not run" in text


def test_the_same_folder_gives_the_same_page(lab, text):
    assert page.build_page(*lab).read_text() == text


def test_without_a_tag_the_last_printed_text_is_the_finding_and_the_text_of_a_picture_is_not(lab):
    folder, notebooks = lab
    picture = shown(image_png="aGk=", text_plain="a picture")
    write_notebook(
        folder / "04_x.ipynb", new_markdown_cell("# Is it?"), code("a", printed("It is.\n")), code("b", picture)
    )
    assert page.read_entry("04_x", folder, notebooks).finding == "It is."


def test_a_table_keeps_its_structure_and_nothing_else():
    link = '<a href="http://x">1 &lt; 2</a>'
    given = f'<div><table class="x"><tr><th scope="col">a<script>x()</script></th><td>{link}</td></tr></table>'
    assert page.only_table(given) == '<table><tr><th scope="col">a</th><td>1 &lt; 2</td></tr></table>'


def test_a_folder_that_does_not_exist_is_refused_with_those_that_do(lab, capsys):
    assert page.main([str(lab[0].parent / "latop")]) == 2
    assert "beside it: laptop" in capsys.readouterr().err


def test_a_damaged_notebook_is_named(lab, capsys):
    (lab[0] / "01_small.ipynb").write_text('{"cells": [')
    assert page.main([str(lab[0])]) == 2
    assert "01_small.ipynb is not a notebook" in capsys.readouterr().err


# --- the table of a README -----------------------------------------------------------------------------------------

README = "# Lab\n\n<!-- findings -->\nold\n<!-- /findings -->\n\nThe end.\n"


@pytest.fixture
def readme(lab):
    path = lab[0].parent.parent / "README.md"
    path.write_text(README)
    return path


def test_the_findings_stand_between_the_markers_with_links_that_lead_somewhere(lab, readme):
    assert page.write_findings(lab[0], readme, lab[1]) == ["02_prune", "03_adapt"]
    text = readme.read_text()
    assert text.splitlines()[2:5] == [
        "<!-- findings -->",
        "- **How small is &lt;small&gt; &amp; still good?** "
        "**nf4** is 2x smaller &amp; &lt;i&gt;worse&lt;/i&gt;. "
        "([01_small](results/laptop/01_small.ipynb), [pareto](results/laptop/figures/01_pareto.png))",
        "<!-- /findings -->",
    ]
    assert text.startswith("# Lab\n\n")
    assert text.endswith("-->\n\nThe end.\n")
    assert all((readme.parent / link).is_file() for link in re.findall(r"\]\((.+?)\)", text))


def test_the_findings_written_twice_are_the_same(lab, readme):
    page.write_findings(lab[0], readme, lab[1])
    once = readme.read_text()
    page.write_findings(lab[0], readme, lab[1])
    assert readme.read_text() == once


def test_a_finding_is_one_line_of_text_and_code_stays_code():
    entry = page.Entry("04_x", "done", "Is a|b?", finding="`a<b` is 1 < 2\nand more")
    assert page.findings_list([entry], "r") == "- **Is a|b?** `a<b` is 1 &lt; 2 ([04_x](r/04_x.ipynb))"


def test_the_page_shows_what_the_longer_run_of_the_same_model_found(lab):
    longer = lab[0].parent / "long"
    finding = code("finding", new_output("stream", name="stdout", text="Longer, it is 3x smaller.\n"))
    write_notebook(longer / "01_small.ipynb", new_markdown_cell(f"# {QUESTION}"), finding)
    assert "3x smaller" not in page.build_page(lab[0].rename(lab[0].with_name("other")), lab[1]).read_text()
    lab[0].with_name("other").rename(lab[0])
    text = page.build_page(lab[0], lab[1]).read_text()
    assert 'In the longer run <a href="../long/index.html#01_small">long</a>: Longer, it is 3x smaller.' in text


@pytest.mark.parametrize("text", ["# Lab\n", "<!-- /findings -->\n<!-- findings -->\n", README + README])
def test_a_readme_without_one_pair_of_markers_is_refused_and_left_as_it_is(lab, readme, capsys, text):
    readme.write_text(text)
    assert page.main([str(lab[0]), "--readme", str(readme)]) == 2
    assert "README.md needs one line <!-- findings -->" in capsys.readouterr().err
    assert readme.read_text() == text


def test_the_choice_for_each_budget_opens_the_page_and_without_one_nothing_does():
    table = '<table>\n<thead><tr><th scope="col">memory</th></tr></thead><tbody><tr><td>1 GiB</td></tr></tbody></table>'
    entries = [page.Entry("01_x", "done", "How small?"), page.Entry("06_y", "done", "Which?", tables=(table,))]
    text = page.render_page("laptop", entries)
    assert text.index("What should I use?") < text.index("1 GiB") < text.index("How small?")
    assert "What should I use?" not in page.render_page("laptop", entries[:1])


def test_results_older_than_their_code_are_named_at_the_top_and_without_any_nothing_is():
    entries = [page.Entry("01_x", "done", "How small?")]
    states = {"01_x": "stale (its code has changed since abc1234)", "02_y": "cannot tell (no git)", "03_z": "current"}
    text = page.render_page("laptop", entries, states)
    assert "Results older than the code they come from: 01_x." in text
    assert "Results that may be older than the code they come from: 02_y." in text
    assert "older than" not in page.render_page("laptop", entries, {"01_x": "current"})


def test_the_age_of_a_result_that_names_no_known_commit_is_left_open(text):
    assert "Results that may be older than the code they come from: 01_small." in text


def test_what_to_use_of_several_models_leads_every_page_once_it_was_measured(lab):
    folder, notebooks = lab
    table = (
        "<table><thead><tr><th>memory</th><th>use</th></tr></thead><tr><th>1 GiB</th><td>a small one</td></tr></table>"
    )
    cells = new_markdown_cell("# Which model?"), code("table", shown(text_html=table), tags=("table",))
    write_notebook(folder.parent / "sizes" / "20_three_sizes.ipynb", *cells)
    beside = page.build_page(folder, notebooks).read_text()
    assert "a small one" in beside.partition("<section")[0]
    assert 'href="../sizes/index.html#20_three_sizes"' in beside
    own = page.build_page(folder.parent / "sizes", notebooks).read_text()
    assert 'From <a href="#20_three_sizes">' in own
