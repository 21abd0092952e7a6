"""The fuzzing campaign in its short form, and that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz_structure, torture_fuzz
from conadv.models import make
from conadv.training import checkpoint


def test_fuzz_short(tmp_path: Path) -> None:
    # Red when: any reader raises something else than ConadvError.
    found = torture_fuzz.run(True, tmp_path)
    assert found["inputs"] >= 10_000
    assert found["crashes"] == 0


def test_a_full_campaign_has_a_million_inputs() -> None:
    assert sum(target.full for target in torture_fuzz.TARGETS.values()) >= 1_150_000


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


def test_structural_changes_reach_every_place_and_leave_the_original() -> None:
    # Red when: changed gives its argument back, or only looks at the first level.
    value = {"a": [1, {"b": 2}], "c": "x"}
    found = [
        fuzz_structure.changed(value, fuzz_structure.Bytes(data))
        for data in fuzz_structure.seeds(250)
    ]
    assert value == {"a": [1, {"b": 2}], "c": "x"}
    assert all(any("c" not in v or v["c"] is odd for v in found) for odd in fuzz_structure.ODD[:3])
    assert any(v.get("a") == [1, {"b": 2}, 1, {"b": 2}] for v in found)
    assert any(v.get("a") == [1, {}] for v in found)
    assert any(v.get("a") == [1, {"b": None}] for v in found)


def test_what_a_checkpoint_says_of_its_images_gets_to_export(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The control of target `state`: without the check of the envelope it finds what ended with exit code 70.
    monkeypatch.setattr(checkpoint, "_images_problem", lambda state: None)
    found = set()
    for data in fuzz_structure.seeds(60):
        try:
            torture_fuzz.accepted(torture_fuzz.TARGETS["state"].check, data)
        except (TypeError, ValueError, AttributeError) as error:
            found.add(type(error).__name__)
    assert found


def test_arguments_get_to_the_model_card(monkeypatch: pytest.MonkeyPatch) -> None:
    # The control of target `args`: with a reader of values that raises it finds an error that is not ours.
    check = torture_fuzz.TARGETS["args"].check
    assert torture_fuzz.accepted(check, b"drop_rate=0.1\0act=gelu")
    monkeypatch.setattr(make, "_value", int)
    with pytest.raises(ValueError):
        torture_fuzz.accepted(check, b"a=2024-99-99")


@pytest.mark.parametrize("name", ["fields", "state"])
def test_what_is_not_changed_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a reader refuses the genuine files, so that nothing behind its first check is tried.
    monkeypatch.setattr(fuzz_structure, "changed", lambda value, *_: value)
    for first in range(4):
        assert torture_fuzz.accepted(torture_fuzz.TARGETS[name].check, bytes([first]))
