"""The store's commands: what they say, what they change, and how they refuse."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from hashtab.serving.store import PLAN, KeptModel, Plan, TableStore, User, only_writer, open_store
from hashtab.serving.store.__main__ import main
from hashtab.serving.store.store import PAGE
from tests.serving.store.records import FINGERPRINT, LAYOUT, numbered

HEX = FINGERPRINT.hex()
OTHER = b"12345678"


def fill(store: TableStore, users: int = 3) -> dict[User, bytes]:
    records: dict[User, bytes] = {user: numbered(user) for user in range(users)}
    store.put(FINGERPRINT, records, {"done": b"yes"})
    return records


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_count(store: TableStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(store)
    store.put(OTHER, {"a": b"x"})
    assert main(["count", url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{HEX}             3 users",
        f"{OTHER.hex()}             1 users",
        f"counted 4 records of 2 fingerprints in {store.name}",
    ]


def test_verify_names_and_removes_corrupt_records(
    store: TableStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = fill(store)
    store.put(OTHER, {"a": numbered(1)})  # a record of FINGERPRINT under another one
    store.put(FINGERPRINT, {1: records[1][:-1] + b"\x01"}, {"done": b"yes"})
    assert main(["verify", url]) == 1
    said = capsys.readouterr().out
    assert f"{HEX} user 1: a record's checksum does not fit" in said
    assert f"{OTHER.hex()} user 'a': a record belongs to fingerprint {HEX}" in said
    assert said.splitlines()[-1] == f"verified 4 records in {store.name}: 2 corrupt"
    assert main(["verify", url, "--fingerprint", HEX, "--remove"]) == 1
    assert "verified 3 records" in (said := capsys.readouterr().out)
    assert said.endswith("1 corrupt, removed: encode users again\n")
    assert store.counts() == {FINGERPRINT: 2, OTHER: 1}
    assert store.note(FINGERPRINT, "done") is None
    assert main(["verify", url, "--fingerprint", HEX]) == 0
    assert capsys.readouterr().out == f"verified 2 records in {store.name}: 0 corrupt\n"


@pytest.mark.parametrize("kind", [int, str])
def test_records_move_to_the_other_store_unchanged(
    kind: type[int] | type[str], tmp_path: Path, empty_server: Path
) -> None:
    folder, server, file = str(tmp_path / "store"), f"unix://{empty_server}", tmp_path / "out.arrow"
    records: dict[User, bytes] = {kind(user): numbered(user) for user in range(PAGE + 3)}
    with open_store(folder) as store:
        store.put(FINGERPRINT, records)
        store.put(OTHER, {1: b"x"})
    assert main(["export", folder, str(file), "--fingerprint", HEX]) == 0
    assert main(["import", server, str(file)]) == 0
    back = tmp_path / "back.arrow"
    assert main(["export", server, str(back), "--fingerprint", HEX]) == 0
    assert main(["import", str(tmp_path / "again"), str(back)]) == 0
    for url in (server, str(tmp_path / "again")):
        with open_store(url, readonly=True) as store:
            assert dict(store.items(FINGERPRINT)) == records
            assert store.counts() == {FINGERPRINT: len(records)}
    assert pl.read_ipc(file).columns == ["user", "record"]
    visible = (path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert sorted(visible) == [
        "again",
        "back.arrow",
        "out.arrow",
        "store",
    ]


def test_import_refuses_a_corrupt_file_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "store", tmp_path / "file.arrow"
    with open_store(str(folder)) as store:
        records = fill(store, PAGE + 9)
        store.put(FINGERPRINT, {PAGE + 5: records[1][:-1]})
    assert main(["export", str(folder), str(file), "--fingerprint", HEX]) == 0
    capsys.readouterr()
    assert f"user {PAGE + 5}: a record's checksum" in refused(
        capsys, "import", tmp_path / "new", file
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"ARROW1 not", None])
def test_import_refuses_other_files(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.arrow"
    if content is None:
        pl.DataFrame({"user": [1], "record": [b"x"]}).write_ipc(file)
    else:
        file.write_bytes(content)
    said = refused(capsys, "import", tmp_path / "new", file)
    assert f"{file} is not a whole file of exported records" in said
    assert not (tmp_path / "new").exists()


def test_export_leaves_nothing_when_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    with open_store(str(folder)) as store:
        fill(store)
        store.put(FINGERPRINT, {"a": b"x"})  # beside integers
    said = refused(capsys, "export", folder, tmp_path / "out", "--fingerprint", HEX)
    assert "all integers or all strings" in said
    said = refused(capsys, "export", folder, tmp_path / "out", "--fingerprint", "00" * 8)
    assert f"no records of fingerprint {'00' * 8}" in said
    said = refused(capsys, "export", folder, tmp_path / "no" / "out", "--fingerprint", HEX)
    assert "No such file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_drop(store: TableStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(store)
    store.put(OTHER, {1: b"x"})
    assert main(["drop", url, "--fingerprint", HEX]) == 0
    assert capsys.readouterr().out == f"dropped 3 records of {HEX} from {store.name}\n"
    assert store.counts() == {OTHER: 1}


@pytest.mark.parametrize("text", ["", "12", "xy" * 8, HEX + "00"])
def test_a_wrong_fingerprint_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_store(str(tmp_path)).close()
    said = refused(capsys, "drop", tmp_path, "--fingerprint", text)
    assert f"must be 16 hexadecimal digits, as `count` prints them, got {text!r}" in said


@pytest.mark.parametrize("command", ["count", "verify", "drop", "export"])
def test_a_missing_store_is_not_made(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest: dict[str, list[object]] = {
        "drop": ["--fingerprint", HEX],
        "export": [tmp_path / "f", "--fingerprint", HEX],
    }
    said = refused(capsys, command, tmp_path / "store", *rest.get(command, []))
    assert "holds no store" in said
    assert not (tmp_path / "store").exists()


def test_a_file_with_fingerprint_of_other_length_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = pa.schema([("user", pa.int64()), ("record", pa.binary())])
    schema = schema.with_metadata({"hashtab.fingerprint": LAYOUT.fingerprint.hex()[:-2]})
    batch = pa.record_batch([[1], [numbered(1)]], schema)
    with pa.ipc.new_file(str(tmp_path / "file"), schema) as writer:
        writer.write_batch(batch)
    assert "fingerprint" in refused(capsys, "import", tmp_path / "new", tmp_path / "file")


def test_imported_records_are_not_taken_for_what_the_notes_speak_of(tmp_path: Path) -> None:
    folder, file = str(tmp_path / "store"), tmp_path / "file.arrow"
    with open_store(folder) as store:
        fill(store)
    assert main(["export", folder, str(file), "--fingerprint", HEX]) == 0
    with open_store(folder) as store:
        store.put(FINGERPRINT, {}, {"encoded 0": b"all of it"})
    assert main(["import", folder, str(file)]) == 0
    with open_store(folder, readonly=True) as store:
        assert store.note(FINGERPRINT, "encoded 0") is None


@pytest.mark.parametrize("command", ["import", "drop", "verify"])
def test_what_another_process_writes_is_left_alone(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "store", tmp_path / "file.arrow"
    with open_store(str(folder)) as store:
        fill(store)
    assert main(["export", str(folder), str(file), "--fingerprint", HEX]) == 0
    capsys.readouterr()
    options: dict[str, list[object]] = {
        "import": [file],
        "drop": ["--fingerprint", HEX],
        "verify": ["--remove"],
    }
    with only_writer(str(folder)):
        said = refused(capsys, command, folder, *options[command])
    assert f"another process writes users into {folder}; wait for it or stop it" in said


def test_tables_that_a_service_keeps_are_neither_dropped_nor_replaced(
    store: TableStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = fill(store)
    assert main(["export", url, str(tmp_path / "file"), "--fingerprint", HEX]) == 0
    kept = KeptModel(bundle="", digest="", state="live", since=0)
    plan = Plan().with_model(FINGERPRINT, kept).to_bytes()
    store.change([], lambda change: change.put_value(PLAN, plan))
    capsys.readouterr()
    for command in (["drop", url, "--fingerprint", HEX], ["import", url, str(tmp_path / "file")]):
        assert f"the BSE service keeps the tables of fingerprint {HEX}" in refused(capsys, *command)
    assert dict(store.items(FINGERPRINT)) == records
    assert store.counts() == {FINGERPRINT: 3}
    assert store.fingerprints() == [FINGERPRINT]
