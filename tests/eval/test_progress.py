from __future__ import annotations

import pytest

from nsa.eval.progress import progress_bar


def test_bar_shows_what_is_done_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar("Documents", 40) as advance:
        advance(17)
    out, err = capsys.readouterr()
    assert not out
    assert "Documents" in err
    assert "17/40" in err
