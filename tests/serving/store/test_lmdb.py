"""What only the LMDB store meets: folders, disks, maps that grow, locks of the dead."""

import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import lmdb
import pytest

from hashtab.serving.store import StoreError, lmdb_store, open_store
from tests.serving.store.records import FINGERPRINT


def refused(path: Path, said: str, *, readonly: bool = False) -> None:
    with pytest.raises(StoreError, match=said) as error:
        open_store(str(path), readonly=readonly)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_file_is_no_folder(readonly: bool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file and no store; name a folder", readonly=readonly)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    refused(tmp_path, "holds other files and no store")
    refused(tmp_path, "holds no store; check the path", readonly=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_missing_folder_is_made_only_to_write(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    refused(path, "holds no store", readonly=True)
    assert not (tmp_path / "a").exists()
    open_store(str(path)).close()
    open_store(f"lmdb:{path}", readonly=True).close()


def test_another_programs_lmdb_folder_is_left_alone(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path)) as theirs, theirs.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    refused(tmp_path, "is another program's LMDB folder")
    with lmdb.open(str(tmp_path)) as theirs:
        assert theirs.stat()["entries"] == 1


def test_damaged_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"x" * 8192)
    refused(tmp_path, "is no store or a damaged one; remove it")


def test_a_newer_lmdb_is_named(tmp_path: Path) -> None:
    open_store(str(tmp_path)).close()
    data = bytearray((tmp_path / "data.mdb").read_bytes())
    for page in (0, 4096):
        struct.pack_into("<I", data, page + 20, 999)  # after the page's header and the magic
    (tmp_path / "data.mdb").write_bytes(data)
    refused(tmp_path, "another version of LMDB; install the lmdb that wrote it")


def test_a_store_made_again_at_its_path_is_another(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with open_store(str(path)) as old:
        old.put(FINGERPRINT, {1: b"old"})
        path.rename(tmp_path / "moved")
        with open_store(str(path)) as new:
            assert new.get(FINGERPRINT, [1]) == [None]
        assert old.get(FINGERPRINT, [1]) == [b"old"]


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.close()
    with pytest.raises(StoreError, match="is closed; open it again"):
        store.get(FINGERPRINT, [1])


def test_a_reader_becomes_a_writer_in_one_process(tmp_path: Path) -> None:
    open_store(str(tmp_path)).close()
    with open_store(str(tmp_path), readonly=True) as reader, open_store(str(tmp_path)) as writer:
        writer.put(FINGERPRINT, {1: b"a"})
        assert reader.get(FINGERPRINT, [1]) == [b"a"]


def test_a_full_disk_keeps_what_was_acknowledged(tiny_disk: Path) -> None:
    with open_store(str(tiny_disk / "store")) as store:
        with pytest.raises(StoreError, match="disk is full or broken: free some space"):
            store.put(FINGERPRINT, {1: bytes(100_000)})
        assert store.get(FINGERPRINT, [1]) == [None]
        store.put(FINGERPRINT, {2: b"small"})
        assert store.get(FINGERPRINT, [2]) == [b"small"]


def test_a_read_only_disk_serves_readers(tiny_disk: Path) -> None:
    path = tiny_disk / "store"
    with open_store(str(path)) as store:
        store.put(FINGERPRINT, {1: b"a"})
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    refused(path, "may not be written by this user")
    refused(tiny_disk / "new", "may not be written by this user")
    with open_store(str(path), readonly=True) as store:
        assert store.get(FINGERPRINT, [1]) == [b"a"]
        with pytest.raises(StoreError, match="may not be written by this user"):
            open_store(str(path))
        assert store.get(FINGERPRINT, [1]) == [b"a"]


def test_the_map_grows_under_the_eyes_of_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_store, "FIRST_MAP_BYTES", 1 << 17)
    ended = threading.Event()
    wrong: list[object] = []
    with open_store(str(tmp_path)) as store:
        store.put(FINGERPRINT, {0: bytes(1000)})

        def read() -> None:
            while not ended.is_set():
                if store.get(FINGERPRINT, [0]) != [bytes(1000)]:
                    wrong.append("torn")

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for user in range(1, 40):
            store.put(FINGERPRINT, {user: bytes(100_000)})
        ended.set()
        for reader in readers:
            reader.join()
        assert wrong == []
        assert store.counts() == {FINGERPRINT: 40}


@pytest.mark.timeout(60)
def test_a_writer_killed_inside_its_transaction_blocks_nobody(tmp_path: Path) -> None:
    hold = (
        "import lmdb, sys, time\n"
        "transaction = lmdb.open(sys.argv[1]).begin(write=True)\n"
        "transaction.put(b'torn', bytes(100_000))\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    with open_store(str(tmp_path)) as store:
        store.put(FINGERPRINT, {1: b"a"})
        child = subprocess.Popen(
            [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        with child.stdout:
            child.stdout.readline()
            assert store.get(FINGERPRINT, [1]) == [b"a"]  # a reader does not wait for a writer
            child.send_signal(signal.SIGKILL)
            child.wait()
        store.put(FINGERPRINT, {2: b"b"})
        assert dict(store.items(FINGERPRINT)) == {1: b"a", 2: b"b"}
        assert list(store._pages(b"torn")) == []
