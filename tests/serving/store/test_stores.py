"""What both stores promise: records and notes by fingerprint and user, in pages, until dropped."""

import threading
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hashtab.serving.store import StoreError, TableStore, User, open_store
from hashtab.serving.store.keys import FORMAT_KEY, is_user_key, note_key, user_key, user_of
from hashtab.serving.store.store import PAGE
from tests.serving.store.records import FINGERPRINT

OTHER = FINGERPRINT.replace(b"a", b"b")  # what a pattern that is not escaped would match too
MANY = 2 * PAGE + 3

few = settings(max_examples=60, deadline=None, derandomize=True)
users = st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20)


@few
@given(st.binary(min_size=8, max_size=8), users, users)
def test_keys_are_unique_and_read_backwards(fingerprint: bytes, user: User, other: User) -> None:
    key = user_key(fingerprint, user)
    assert key.startswith(fingerprint)
    assert user_of(key) == user
    assert (key == user_key(fingerprint, other)) == (user == other)
    assert key not in (note_key(fingerprint, str(other)), FORMAT_KEY)
    assert is_user_key(key)
    assert not is_user_key(note_key(fingerprint, str(other)))
    if isinstance(user, int) and isinstance(other, int):
        assert (key < user_key(fingerprint, other)) == (user < other)


@pytest.mark.parametrize(
    "key", [b"", b"short", FORMAT_KEY, FINGERPRINT + b"i123", b"12345678s\xff"]
)
def test_another_programs_key_names_itself(key: bytes) -> None:
    with pytest.raises(StoreError, match="is not one of a user"):
        user_of(key)


def test_a_new_store_is_empty(store: TableStore) -> None:
    assert store.counts() == {}
    assert store.get(FINGERPRINT, [1, "a"]) == [None, None]
    assert store.get(FINGERPRINT, []) == []
    assert store.note(FINGERPRINT, "a") is None
    assert list(store.users(FINGERPRINT)) == []
    assert store.drop(FINGERPRINT) == 0
    assert store.remove(FINGERPRINT, []) == 0
    store.put(FINGERPRINT, {})


def test_what_was_put_is_there_after_reopening(url: str) -> None:
    limits: list[User] = [0, -1, 2**63 - 1, -(2**63), "", "0", "ü\0*", "x" * 502]
    with open_store(url) as store:
        store.put(FINGERPRINT, {user: repr(user).encode() for user in limits}, {"": b"all"})
        store.put(FINGERPRINT, {}, {"i1": b"\0"})
    with open_store(url, readonly=True) as store:
        assert store.get(FINGERPRINT, limits) == [repr(user).encode() for user in limits]
        assert store.get(FINGERPRINT, ["missing", limits[0]]) == [None, b"0"]
        assert store.get(FINGERPRINT, [np.int64(-1)]) == [b"-1"]  # type: ignore[list-item]
        assert set(store.users(FINGERPRINT)) == set(limits)
        assert [store.note(FINGERPRINT, name) for name in ("", "i1")] == [b"all", b"\0"]


def test_a_put_replaces(store: TableStore) -> None:
    store.put(FINGERPRINT, {1: b"old", 2: b"kept"}, {"n": b"old"})
    store.put(FINGERPRINT, {1: b"new"}, {"n": b"new"})
    assert store.get(FINGERPRINT, [1, 2]) == [b"new", b"kept"]
    assert store.note(FINGERPRINT, "n") == b"new"


def test_fingerprints_do_not_meet(store: TableStore) -> None:
    store.put(FINGERPRINT, {1: b"a", 2: b"b"}, {"n": b"a"})
    store.put(OTHER, {1: b"c"})
    assert store.counts() == {FINGERPRINT: 2, OTHER: 1}
    assert dict(store.items(FINGERPRINT)) == {1: b"a", 2: b"b"}
    assert dict(store.items(OTHER)) == {1: b"c"}
    assert store.note(OTHER, "n") is None
    assert store.drop(FINGERPRINT) == 2
    assert store.counts() == {OTHER: 1}
    assert store.note(FINGERPRINT, "n") is None
    assert store.get(OTHER, [1]) == [b"c"]


def test_long_walks_go_page_by_page(store: TableStore) -> None:
    records = {user: b"%d" % user for user in range(-5, MANY - 5)}
    store.put(FINGERPRINT, records)
    store.put(OTHER, {"x": b""})
    assert sorted(store.users(FINGERPRINT)) == list(records)
    assert dict(store.items(FINGERPRINT)) == records
    assert store.get(FINGERPRINT, list(records)) == list(records.values())
    assert store.counts() == {FINGERPRINT: MANY, OTHER: 1}
    assert store.drop(FINGERPRINT) == MANY


def test_a_walk_goes_on_while_others_write(store: TableStore) -> None:
    store.put(FINGERPRINT, dict.fromkeys(range(MANY), b"a"))
    seen: set[User] = set()
    for user, _ in store.items(FINGERPRINT):
        if not seen:
            store.put(FINGERPRINT, {"new": b"b"})
            assert store.remove(FINGERPRINT, [MANY - 1, 0]) == 2
        seen.add(user)
    assert seen >= set(range(1, MANY - 1))


def test_a_drop_that_was_cut_short_goes_on(
    store: TableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(FINGERPRINT, dict.fromkeys(range(MANY), b"a"), {"done": b"yes"})
    pages = store._user_pages

    def first_page(fingerprint: bytes) -> Iterator[list[bytes]]:
        yield next(filter(None, pages(fingerprint)))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_user_pages", first_page)
        dropped = store.drop(FINGERPRINT)
    assert 0 < dropped < MANY
    assert store.note(FINGERPRINT, "done") is None  # gone before the first record
    assert store.drop(FINGERPRINT) == MANY - dropped
    assert store.counts() == {}


def test_removing_records_takes_the_notes_along(store: TableStore) -> None:
    store.put(FINGERPRINT, {1: b"a", 2: b"b"}, {"done": b"yes"})
    store.put(OTHER, {1: b"c"}, {"done": b"yes"})
    assert store.remove(FINGERPRINT, [1, 3]) == 1
    assert store.counts() == {FINGERPRINT: 1, OTHER: 1}
    assert store.note(FINGERPRINT, "done") is None
    assert store.note(OTHER, "done") == b"yes"


def test_two_stores_of_one_process_are_one(url: str) -> None:
    first = open_store(url)
    with open_store(url) as second, open_store(url, readonly=True) as reader:
        second.put(FINGERPRINT, {1: b"a"})
        assert first.get(FINGERPRINT, [1]) == reader.get(FINGERPRINT, [1]) == [b"a"]
    first.put(FINGERPRINT, {1: b"b"})
    assert first.get(FINGERPRINT, [1]) == [b"b"]
    first.close()
    first.close()


def test_threads_share_a_store(store: TableStore) -> None:
    store.put(FINGERPRINT, {user: b"%d" % user for user in range(50)})
    wrong: list[object] = []

    def work(thread: int) -> None:
        for user in range(50):
            if store.get(FINGERPRINT, [user]) != [b"%d" % user]:
                wrong.append((thread, user))
            if user % 10 == 0:
                store.put(FINGERPRINT, {f"{thread} {user}": b"x"})

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.counts() == {FINGERPRINT: 50 + 4 * 5}


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ("x" * 503, "has 503 bytes of UTF-8, more than 502"),
        ("é" * 252, "has 504 bytes"),
        ("\ud800", "has no UTF-8"),
        (2**63, "user 9223372036854775808 must be an integer of 64 bits or a string"),
        (1.5, "user 1.5 must be"),
        (None, "user None must be"),
    ],
)
def test_a_user_that_is_no_key_is_named(user: User, said: str, store: TableStore) -> None:
    for refused in (
        lambda: store.get(FINGERPRINT, [user]),
        lambda: store.put(FINGERPRINT, {user: b""}),
    ):
        with pytest.raises(StoreError, match=said):
            refused()
    assert store.counts() == {}


def test_a_wrong_fingerprint_or_note_is_refused(store: TableStore) -> None:
    with pytest.raises(StoreError, match="must have 8 bytes, got b'short'"):
        store.get(b"short", [1])
    with pytest.raises(StoreError, match="must have 8 bytes, got b''"):
        store.drop(b"")
    with pytest.raises(StoreError, match=r"note 'n+' has 600 bytes"):
        store.put(FINGERPRINT, {1: b""}, {"n" * 600: b""})
    assert store.counts() == {}


def test_a_reader_makes_and_changes_nothing(url: str) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        open_store(url, readonly=True)
    open_store(url).close()
    with open_store(url, readonly=True) as store:
        for refused in (
            lambda: store.put(FINGERPRINT, {1: b""}),
            lambda: store.remove(FINGERPRINT, [1]),
            lambda: store.drop(FINGERPRINT),
        ):
            with pytest.raises(StoreError, match="open for reading only; open it without"):
                refused()


def test_a_newer_store_says_what_to_install(store: TableStore, url: str) -> None:
    store._write({FORMAT_KEY: b"3"})
    for readonly in (False, True):
        with pytest.raises(StoreError, match="store format 3, this hashtab reads 2; install"):
            open_store(url, readonly=readonly)


def test_an_unknown_kind_of_store_lists_the_known() -> None:
    with pytest.raises(StoreError, match="postgres:// is not known; use a path, lmdb:path, redis"):
        open_store("postgres://user:secret@host/db")


def test_none_in_place_of_a_record_deletes_it_and_no_note(store: TableStore) -> None:
    store.put(FINGERPRINT, {1: b"a", 2: b"b"}, {"done": b"yes"})
    store.put(FINGERPRINT, {1: None, 2: b"c", 3: None})
    assert store.get(FINGERPRINT, [1, 2, 3]) == [None, b"c", None]
    assert store.counts() == {FINGERPRINT: 1}
    assert store.note(FINGERPRINT, "done") == b"yes"
