from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from undercroft.api.tokens import TokenFile
from undercroft.model.errors import (
    AlreadyExistsError,
    DataCorruptError,
    DataError,
    InvalidError,
    NotFoundError,
)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.json")


def test_a_token_is_told_once_and_kept_as_a_hash(tokens: TokenFile) -> None:
    text = tokens.create("ada", ["vm.view", "vm.view", "vm.power"])
    assert text.startswith("croft_")
    assert len(text) > 45
    assert text not in tokens.path.read_text()
    assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600
    (token,) = tokens.list()
    assert (token.name, token.privileges) == ("ada", ("vm.view", "vm.power"))
    caller = tokens.caller(text.encode())
    assert caller is not None
    assert caller.name == "token ada"
    assert caller.has("vm.power")
    assert not caller.has("vm.create")
    assert tokens.caller(text[:-1].encode()) is None
    assert tokens.caller(b"") is None


def test_a_running_daemon_sees_changes(tokens: TokenFile) -> None:
    daemon = TokenFile(tokens.path)
    assert daemon.caller(b"x") is None
    text = tokens.create("ada").encode()
    caller = daemon.caller(text)
    assert caller is not None
    assert caller.has("host.check")
    tokens.create("eve")
    assert daemon.caller(text) is not None
    tokens.remove("ada")
    assert daemon.caller(text) is None
    tokens.path.unlink()
    assert daemon.caller(text) is None


def test_what_makes_no_sense(tokens: TokenFile) -> None:
    tokens.create("ada")
    with pytest.raises(AlreadyExistsError):
        tokens.create("ada")
    with pytest.raises(NotFoundError):
        tokens.remove("eve")
    with pytest.raises(InvalidError, match=r"vm\.fly"):
        tokens.create("eve", ["vm.fly"])
    with pytest.raises(InvalidError):
        tokens.create("eve", [])
    with pytest.raises(InvalidError):
        tokens.create("Not A Name")
    assert [token.name for token in tokens.list()] == ["ada"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"tokens": [{"name": 1}]}', b'{"layout": 2}', b"\xff"]
)
def test_a_damaged_file_lets_nobody_in(tokens: TokenFile, content: bytes) -> None:
    tokens.path.write_bytes(content)
    with pytest.raises(DataCorruptError, match=r"tokens\.json"):
        tokens.caller(b"x")
    with pytest.raises(DataCorruptError):
        tokens.create("ada")
    assert tokens.path.read_bytes() == content


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        TokenFile(tmp_path / "none" / "tokens.json").create("ada")


def test_many_at_once_lose_none(tokens: TokenFile) -> None:
    threads = [
        threading.Thread(target=TokenFile(tokens.path).create, args=(f"t{number}",))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {token.name for token in tokens.list()} == {f"t{number}" for number in range(12)}
    assert [path.name for path in tokens.path.parent.iterdir()] == ["tokens.json"]
