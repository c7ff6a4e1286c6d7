"""Every command on damaged files: a result, or one line; never a traceback, half an output or an escape sequence."""

import json
import shutil

import pytest

from smt_trainer.cli import main

COMMANDS = [
    "select --scores @scores.safetensors --output @out",
    "inspect @delta0",
    "inspect @scores.safetensors @delta1",
    "merge @base @delta0 @out",
    "verify @base @delta0 @merged",
    "unmerge @base @delta0 @merged @out",
    "extract @base @merged @out --block-size 16 --budget 3",
    "diff @delta0 @delta1",
    "compose @base @delta0 @delta1 @out",
    "export @base @delta0 @out --format lora",
    "estimate @base --seq 8",
]


def make_folder(path):
    path.unlink()
    path.mkdir()


def change_values(path):
    """Give every other value of a JSON file, or of a header, another type."""
    data = path.read_bytes()
    length = 0 if path.suffix == ".json" else int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + length] if length else data)
    for key in list(values)[::2]:
        values[key] = {"\x1b[2J": [None]} if isinstance(values[key], (int, str)) else "\x1b[2J\n"
    text = json.dumps(values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] if length else text)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "folder": make_folder,
    "other values": change_values,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_gives_a_result_or_one_line(command, damage, folder, capsys):
    read = [folder / word[1:] for word in command.split() if word.startswith("@") and word != "@out"]
    files = [file for path in read for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    arguments = [str(folder / word[1:]) if word.startswith("@") else word for word in command.split()]
    kept = folder / "kept"
    for file in files:
        shutil.copyfile(file, kept)
        DAMAGES[damage](file)
        status = main(arguments)
        captured = capsys.readouterr()
        assert status in ((0, 1, 2) if command.startswith("verify") else (0, 2)), file
        assert all(line.isprintable() for line in captured.out.splitlines()), file
        if status == 2:
            said = captured.err.splitlines()[-1]
            assert said.startswith("smt: ") and said.isprintable() and not captured.out, file
        assert (folder / "out").exists() == (status == 0 and "@out" in command), file
        assert not list(folder.glob(".*")), file
        shutil.rmtree(folder / "out", ignore_errors=True)
        if file.is_dir():
            file.rmdir()
        kept.replace(file)
