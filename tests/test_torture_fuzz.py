"""The fuzzing campaign in its short form, and that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import torture_fuzz


def test_fuzz_short(tmp_path: Path) -> None:
    # Red when: any reader raises something else than ConadvError.
    found = torture_fuzz.run(True, tmp_path)
    assert found["inputs"] >= 10_000
    assert found["crashes"] == 0


def test_a_full_campaign_has_a_million_inputs() -> None:
    assert sum(target.full for target in torture_fuzz.TARGETS.values()) >= 1_000_000


def test_a_crash_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: accepted swallows what is no ConadvError.
    def check(data: bytes) -> None:
        assert len(data) < 20

    target = torture_fuzz.Target(check, lambda: [b"0123456789"], 100, 100)
    monkeypatch.setattr(torture_fuzz, "TARGETS", {"made": target})
    with pytest.raises(AssertionError):
        torture_fuzz.run(True, tmp_path)
    assert '"error": "AssertionError' in (tmp_path / "made.json").read_text()
    with pytest.raises(AssertionError, match="made: "):
        torture_fuzz.run(False, tmp_path)
