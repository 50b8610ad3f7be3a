"""Pictures in a grid with the names that were found."""

import numpy as np
import pytest

from avalab.lab.run import Record
from avalab.report import picture_plots

RECORDS = [Record("19_contrastive", "clip", "recall_at_1:unseen", 0.5, "1", profile="smoke")]


def test_a_grid_says_how_many_first_names_are_right_and_is_written(tmp_path):
    pictures, named = [np.ones((4, 4, 3))] * 7, list("abcdefg")
    found = [["a", "b"]] * 7
    picture = picture_plots.retrieval_grid(RECORDS, pictures, named, found, path=tmp_path / "grid.png")
    assert "the first is right for 1" in picture.alt
    assert (tmp_path / "grid.png").stat().st_size <= 100_000


def test_pictures_without_names_are_refused():
    with pytest.raises(ValueError, match="1 pictures, 0 names and 1 lists"):
        picture_plots.retrieval_grid(RECORDS, [np.ones((4, 4, 3))], [], [["a"]])
