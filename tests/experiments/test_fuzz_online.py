"""Bad requests are refused with the right code and a message that helps, and hurt nobody."""

from pathlib import Path

import pytest

from experiments.fuzz_online import fuzz
from experiments.online.bad_requests import MALFORMED, WRONG, Bad
from experiments.online.fuzz import Answer, judge

REQUESTS = 1600


def test_no_bad_request_is_answered_wrongly(shop_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    found = fuzz(shop_bundle, tmp_path / "work", tmp_path / "failures", REQUESTS, seed=1)
    assert not [fault for one in found.values() for fault in one.faults]
    for one in found.values():
        assert one.sent.total() > 0.9 * REQUESTS / 2
        assert len(one.sent) > 20
        assert {200, 400, 404, 405, 413, 415, 422} <= one.statuses.keys()


BAD = Bad(kind="wrong value", data=b"", statuses=WRONG, names="items")
GOOD_ERROR = b'{"error": "expected an array", "field": "items[0]"}'


def test_a_right_answer_passes() -> None:
    assert judge(BAD, Answer(422, GOOD_ERROR)) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "no answer"),
        (Answer(500, GOOD_ERROR), "answered 500"),
        (Answer(400, GOOD_ERROR), "and not [422]"),
        (Answer(200, b"{}"), "and not [422]"),
        (Answer(422, b"Unprocessable"), "without a message"),
        (Answer(422, b'{"error": "something is wrong"}'), "does not name 'items'"),
    ],
)
def test_a_wrong_answer_is_noticed(answer: Answer | None, said: str) -> None:
    assert said in str(judge(BAD, answer))


def test_only_broken_http_may_be_left_without_an_answer() -> None:
    broken = Bad(kind="no HTTP", data=b"", statuses=MALFORMED, broken=True)
    assert judge(broken, None) is None
