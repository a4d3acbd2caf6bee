"""A command in a terminal of some width: what it sent, and what stood on the screen at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence

_PARTS = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)|(\x1b.?)")


def in_terminal(
    command: Sequence[str], *, columns: int, env: Mapping[str, str], cwd: str | os.PathLike[str] | None = None
) -> tuple[int, str]:
    """The exit code of a command, and everything it sent to a terminal, sequences of control included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=dict(env), cwd=cwd)
    os.close(theirs)
    sent = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not part:
            break
        sent += part
    os.close(ours)
    return process.wait(), sent.decode(errors="replace")


def screen_of(sent: str, *, columns: int) -> list[str]:
    """The lines that a terminal shows after all of `sent`: it wraps, moves up, and clears lines as one does."""
    lines, row, column = [""], 0, 0
    for found in _PARTS.finditer(sent):
        number, letter, control, text, _ = found.groups()
        if letter == "A":
            row = max(0, row - int(number or 1))
        elif letter == "K" and number == "2":
            lines[row] = ""
        elif control == "\r":
            column = 0
        elif control == "\n":
            row, column = row + 1, 0
        elif text:
            for character in text:
                if column == columns:
                    row, column = row + 1, 0
                while len(lines) <= row:
                    lines.append("")
                line = lines[row].ljust(column)
                lines[row] = line[:column] + character + line[column + 1 :]
                column += 1
        while len(lines) <= row:
            lines.append("")
    return [line.rstrip() for line in lines]
