"""common.py: errors that end in one line, bars of progress, and files that appear complete or not at all."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common import (ArgumentParser, UserError, number, printable, progress_bar, read_json, reason, replacing, run_command, shorten,
                    write_error, write_json)  # fmt: skip


def test_run_command_turns_a_user_error_into_one_line():
    code = "from common import UserError, run_command\ndef main(): raise UserError('a.json: absent')\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: a.json: absent\n")


@pytest.mark.parametrize("raised, status", [(KeyboardInterrupt(), 130), (SystemExit(3), 3)], ids=["Ctrl-C", "exit 3"])
def test_run_command_keeps_the_exit_status(raised, status):
    def main():
        raise raised

    with pytest.raises(SystemExit) as info:
        run_command(main)
    assert info.value.code == status


def test_a_closed_pipe_ends_a_command_without_a_traceback():
    code = "from common import run_command\ndef main():\n    while True: print('x' * 9999)\nrun_command(main)"
    command = f"{sys.executable} -c \"$CODE\" | head -1 | wc -c; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"CODE": code}, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["10000", "141"], "")


def test_run_command_does_not_hide_a_bug():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_help_shows_defaults_and_types_but_no_none_and_no_switch(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = ArgumentParser("Line 1\n    line 2", prog="train.py")
    parser.add_argument("--seed", type=number(0), default=7, help="a seed")
    parser.add_argument("--lr", type=number(0.0), help="a rate")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="a switch")
    text = parser.format_help()
    assert "\nLine 1\n    line 2\n" in text
    assert " ".join(text.split()).endswith("--seed N a seed (default: 7) --lr N a rate --resume, --no-resume a switch")


def test_a_wrong_flag_is_a_user_error():
    parser = ArgumentParser("Trains.")
    parser.add_subparsers().add_parser("loss").add_argument("--seed", type=number(0))
    for arguments, message in (["draw"], "'draw'"), (["loss", "--seed", "x"], "argument --seed: x: expected a whole"):
        with pytest.raises(UserError, match=message):
            parser.parse_args(arguments)


@pytest.mark.parametrize("limits, text, expected", [
    ((1,), "3", 3), ((1,), "0", None), ((1,), "1.0", None), ((0.0, 1.0), "1", 1.0), ((0.0, 1.0), "1.01", None),
    ((0.0,), "nan", None), ((0.0,), "-1", None), ((0,), "-1", None), ((0,), "", None), ((0.0,), "inf", None), ((0,), str(2**64), None),
])  # fmt: skip
def test_number_accepts_its_range(limits, text, expected):
    if expected is None:
        with pytest.raises(argparse.ArgumentTypeError, match=": expected a (whole )?number (of|from)"):
            number(*limits)(text)
    else:
        value = number(*limits)(text)
        assert value == expected and type(value) is type(expected)


# --- progress


BAR = """
import sys, time
import common
from tqdm import tqdm
common.LOG_SECONDS = 0.2
for i in common.progress_bar(range(1000), "reading"):
    time.sleep(0.001)
    if i == 500:
        tqdm.write("skipped: one", file=sys.stderr)
common.progress_bar(total=3, desc="hidden", delay=1, leave=False).close()
"""


def test_a_bar_in_a_log_is_a_line_every_few_seconds():
    done = subprocess.run([sys.executable, "-c", BAR], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    lines = done.stderr.splitlines(keepends=True)
    assert "\r" not in done.stderr and "skipped: one\n" in lines and len(lines) < 20
    lines.remove("skipped: one\n")
    assert all(line.startswith("reading: ") and line.endswith("]\n") for line in lines)
    assert " 1000/1000 " in lines[-1] and len(lines) >= 4


def test_only_process_0_shows_a_bar_and_a_terminal_gets_one_that_moves(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for rank, shown in ((0, True), (1, False)):
        monkeypatch.setenv("RANK", str(rank))
        assert [*progress_bar(range(3), "reading", mininterval=0)] == [0, 1, 2]
        assert ("\rreading: " in capsys.readouterr().err) == shown


# --- text for the terminal


@pytest.mark.parametrize("text, keep, expected", [
    ("a\033[31mb\x07\x9b", "", "a\ufffd[31mb\ufffd\ufffd"), ("a\n\tb\r", "", "a\ufffd\ufffdb\ufffd"),
    ("a\n\tb\r", "\n\t", "a\n\tb\ufffd"), ("\u202eabc\ud83d", "", "\ufffdabc\ufffd"),
    ("A cat, 猫 é 😀.", "", "A cat, 猫 é 😀."),
])  # fmt: skip
def test_printable_replaces_what_could_act_on_the_terminal(text, keep, expected):
    assert printable(text, keep) == expected


@pytest.mark.parametrize("names, expected", [
    ([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d"], "a, b, c and 1 more"),
    (iter(range(9)), "0, 1, 2 and 6 more"), ({"\033": 1}, "\ufffd"), (["x" * 500], "x" * 120),
])  # fmt: skip
def test_shorten_lists_three_names(names, expected):
    assert shorten(names) == expected


def test_reason_is_one_short_line():
    assert reason(OSError(28, "No space left on device", "a.json")) == "No space left on device"
    assert reason(ValueError("bad\033 header\nat byte 7")) == "ValueError: bad\ufffd header"
    assert len(reason(ValueError("x" * 5000))) == 200


def test_reason_omits_the_advice_of_pytorch_to_load_unsafely(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(Exception, match="weights_only") as info:
        torch.load(tmp_path / "a.pth", weights_only=True)
    text = reason(info.value)
    assert "weights_only" not in text and "pathlib" in text and "\n" not in text


# --- files


def test_replacing_renames_a_complete_file(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with replacing(path) as file:
        file.write(b"first")
        assert not path.exists()
    with open(path, "rb") as reader:
        with replacing(path) as file:
            file.write(b"sec")
            file.flush()
            assert path.read_bytes() == b"first"
            file.write(b"ond")
        assert reader.read() == b"first", "the older file was overwritten, not replaced"
    assert path.read_bytes() == b"second" and os.listdir(path.parent) == ["a.bin"]


def test_replacing_syncs_the_content_before_the_rename(tmp_path, monkeypatch):
    calls, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(f"fsync {os.fstat(file).st_size}"))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or rename(*paths))
    with replacing(tmp_path / "a.bin") as file:
        file.write(b"seven b")
    assert calls[:2] == ["fsync 7", "rename"] and len(calls) == 3  # the third is the folder


@pytest.mark.parametrize("raised, expected", [
    (OSError(28, "No space left on device"), UserError), (RuntimeError("PytorchStreamWriter failed"), UserError),
    (KeyboardInterrupt(), KeyboardInterrupt), (ValueError(), ValueError),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.__name__)  # fmt: skip
def test_replacing_keeps_the_older_file_after_an_error(tmp_path, raised, expected):
    path = tmp_path / "a.bin"
    path.write_bytes(b"older")
    with pytest.raises(expected), replacing(path) as file:
        file.write(b"newer")
        raise raised
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["a.bin"]


def test_replacing_reports_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a.bin: could not be written \(.+; \d+ MiB are free there\)"):
        with replacing(tmp_path / "file" / "a.bin"):
            pass


def test_write_error_names_the_cause_and_the_free_space(tmp_path):
    error = write_error(tmp_path / "absent" / "a.bin", OSError(28, "No space left on device"))
    assert isinstance(error, UserError) and str(error).isprintable()
    assert str(error).startswith(f"{tmp_path}/absent/a.bin: could not be written (No space left on device; ")


@pytest.mark.parametrize("data", [{"a": [1, 2.5, None], "é": "猫"}, ["a\n"], 7])
def test_write_json_and_read_json_are_inverse(tmp_path, data):
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    content = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert content.endswith("\n") and json.loads(content) == data


def test_write_json_replaces_a_lone_surrogate(tmp_path):
    write_json(tmp_path / "a.json", {"a": "x\ud83dy"})
    assert read_json(tmp_path / "a.json") == {"a": "x?y"}


def test_read_json_accepts_a_bom(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json", dict) == {"a": 1}


@pytest.mark.parametrize("content, kind, message", [
    (b'{"a": 1,\n  b}', object, r"cannot be read as JSON .*line 2 column 3.*; check the path and the file"),
    (b"", object, "cannot be read as JSON .*line 1 column 1"), (b"\xff\xfe", object, "cannot be read as JSON"),
    (b"[" * 100_000, object, "cannot be read as JSON"), (None, object, "cannot be read as JSON.*No such file"),
    (b"[]", dict, "holds a JSON list, expected a dict"), (b"{}", list, "holds a JSON dict, expected a list"),
], ids=["syntax error", "empty", "not UTF-8", "too deep", "absent", "list", "dict"])  # fmt: skip
def test_read_json_refuses_other_content_in_one_line(tmp_path, content, kind, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as info:
        read_json(path, kind)
    assert str(info.value).startswith(f"{path}: ") and str(info.value).isprintable()
