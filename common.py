"""Errors that end in one line, progress bars, and files that appear complete or not at all."""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

LOG_SECONDS = 5  # between two lines of a bar in a log


class UserError(Exception):
    """A user's mistake, in one line: the value found, the value expected, and the remedy."""


def run_command(main: Callable[[], None]):
    """Runs the `main` of a command. A UserError prints its line; Ctrl-C and a closed pipe (`| head`) print nothing."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # logs and pipes get each line at once
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT, as shells report it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # printing the rest at exit would raise again
        raise SystemExit(141) from None  # 128 + SIGPIPE


def is_process_0() -> bool:
    """True in the process that prints: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and appends a flag's default to its help, unless it is None or a switch."""

    def _get_help_string(self, action):
        hidden = action.default is None or isinstance(action.default, bool)
        return action.help if hidden else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return "N" if action.type else super()._get_default_metavar_for_optional(action)


class ArgumentParser(argparse.ArgumentParser):
    """Raises a UserError for a wrong flag, where argparse prints the usage of all flags."""

    def __init__(self, description: str | None = None, **settings):
        super().__init__(**{"description": description, "formatter_class": HelpFormatter, **settings})

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def number(least: float, most: float = 2**63 - 1) -> Callable[[str], float]:
    """A `type` for argparse that accepts numbers from `least` to `most`; whole numbers if `least` is an int."""
    kind = type(least)

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        limits = f"from {least} to {most}" if most < 2**63 - 1 else f"of {least} or more"
        raise argparse.ArgumentTypeError(f"{text}: expected a {'whole ' * (kind is int)}number {limits}")

    return parse


# --- progress


class LogFile:
    """stderr, for tqdm: each state of a bar becomes a line of its own."""

    def write(self, text: str):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress_bar(*arguments, **settings) -> tqdm:
    """tqdm's bar, in process 0 only. Where stderr is a file or a pipe, it prints a line every few seconds instead."""
    if not sys.stderr.isatty():
        settings |= dict(file=LogFile(), mininterval=LOG_SECONDS)
    return tqdm(*arguments, disable=not is_process_0(), **settings)


# --- text of files and models, for the terminal


def printable(text: str, keep: str = "") -> str:
    """Replaces each character that could control the terminal, except those in `keep`, by U+FFFD.

    These are control characters, lone surrogates, line and paragraph separators, and marks of writing direction.
    """
    acting = ("Cc", "Cs", "Zl", "Zp")
    marks = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "".join("\ufffd" if (unicodedata.category(c) in acting or c in marks) and c not in keep else c for c in text)


def shorten(names: Iterable) -> str:
    """The first three of many names, each of at most 120 characters: "a, b, c and 4 more"."""
    names = [printable(str(name)[:120]) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def reason(error: BaseException) -> str:
    """The message of an exception in one line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    text = re.sub(r".*inline_container.*unexpected pos.*", "no space left?", text)  # how PyTorch reports a full disk
    text = re.sub(r"Weights only load failed.*WeightsUnpickler error:\s*", "", text, flags=re.DOTALL)  # torch's advice
    return printable(text.split("\n")[0][:200])


# --- files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for writing. It replaces `path` when the block ends without an error; else `path` is unchanged."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # beside it: a rename is atomic only within one file system
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path):
    """Makes renames in a folder outlast a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def append_lines(path: Path, lines: list[str]):
    """Adds lines to a file, which is created if it is absent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:  # one call, so that lines of several processes do not mix
            file.write("".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise write_error(path, error) from None


def write_lines(path: str | Path, lines: list[str]):
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def write_error(path: Path, error: BaseException) -> UserError:
    free = shutil.disk_usage(path.parent).free // 2**20 if path.parent.is_dir() else 0
    return UserError(f"{path}: could not be written ({reason(error)}; {free} MiB are free there); free some "
                     "space or choose another place")  # fmt: skip


def write_json(path: str | Path, data):
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="replace"))


def read_json(path: str | Path, kind: type = object) -> Any:
    """The content of a JSON file, in UTF-8 with or without a BOM. kind: dict or list, where only that is accepted.

    Raises UserError with the position of a syntax error.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason(error)}); check the path and the file") from None
    if not isinstance(data, kind):
        raise UserError(f"{path}: holds a JSON {type(data).__name__}, expected a {kind.__name__}")
    return data
