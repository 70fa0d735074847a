"""A short form of tests/long_text.py, whose million tokens take minutes."""

import long_text


def test_memory_stays_and_every_page_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(long_text, "EVERY", 4)
    found = long_text.read(6000, top_k=256)
    assert found["tokens"] == 6000
    settled = [row for row in found["rows"] if row["tokens"] > 1500]
    assert len(settled) >= 2
    assert {row["entries"] for row in settled} == {256}
    active = [row["active_mb"] for row in settled]
    assert max(active) < 1.02 * min(active)
    assert sum(answer["right"] for answer in found["answers"]) >= 7
    long_text.draw(found, tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 1000
