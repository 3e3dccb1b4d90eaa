"""Where `python -m eval.score` cannot write its files, its scores are shown all the same."""

from pathlib import Path

import pytest

from tests.eval.submission.scoring import run


@pytest.mark.parametrize("option", ["--json", "--out"])
def test_scores_are_shown_before_they_are_written(sample: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("no folder")
    target = tmp_path / "file" / "deeper"
    entries = ("--entries", sample / "Data_Entry_2017_v2020.csv")
    done = run(sample / "predictions.csv", *entries, "--resamples", 0, option, target)
    assert done.exit_code == 4, done.output
    assert "macro" in done.stdout
    assert done.stderr.startswith("Error: cannot write")
