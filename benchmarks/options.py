"""Types of command-line options, whose errors name the option."""

import argparse
import pathlib


def positive_integer(text: str) -> int:
    """An integer from 1 on."""
    return _integer(text, 1)


def natural_number(text: str) -> int:
    """An integer from 0 on."""
    return _integer(text, 0)


def existing_file(text: str) -> pathlib.Path:
    """The path of a file."""
    path = pathlib.Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def _integer(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer from {least} on, got {text!r}")
    return int(text)
