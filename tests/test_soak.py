"""A short form of tests/soak.py, whose million steps take minutes."""

import soak


def test_memory_stays_and_positions_are_exact():
    found = soak.soak(4000, check_every=200)
    assert found["checks"] == 20 and found["offset"] == 4000 + soak.PROMPT + 1
    # What a step leaves open is made for many at once, so it varies; 3,000 steps that each
    # left one number behind would be 12,000 bytes.
    assert abs(found["active_bytes"][0] - found["active_bytes"][1]) < 8_000
    assert found["resident_bytes"][1] - found["resident_bytes"][0] < 2_000_000
    # Something older than the newest entries is kept: eviction has a choice.
    assert found["oldest_kept"] < 4000 - soak.RULES["top_k"]
