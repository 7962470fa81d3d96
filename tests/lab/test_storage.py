import json
import os

import pytest

from normally.lab.storage import Store, read_json, write_json


def test_what_is_not_finite_becomes_null(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1.5, float("nan")], "y": (float("inf"), "ü")})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {
        "x": [1.5, None],
        "y": [None, "ü"],
    }


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_is_stopped_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    write_json(path, "old")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, stop)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, "new" * 100_000)
    assert read_json(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_read_json_of_nothing_and_of_half_a_file(tmp_path):
    assert read_json(tmp_path / "absent.json") is None
    (tmp_path / "half.json").write_text('{"a": [1, 2', "utf-8")
    assert read_json(tmp_path / "half.json") is None


def test_a_record_counts_only_under_its_fingerprint(tmp_path):
    Store(tmp_path, "one").save("a", 0, {"x": 1}, 0.5, "this machine")
    assert Store(tmp_path, "one").load("a", 0) == {"x": 1}
    assert Store(tmp_path, "one").machines() == ["this machine"]
    assert Store(tmp_path, "two").load("a", 0) is None
    assert Store(tmp_path, "two").machines() == []
