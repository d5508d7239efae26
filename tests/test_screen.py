"""How lines of several workers come to one screen."""

import pytest

from launch.screen import Lines


@pytest.mark.parametrize(
    "chunks, expected",
    [
        (["a\n", "b\n"], "> a\n> b\n"),
        (["a", "b\nc", "\n"], "> ab\n> c\n"),
        (["a\r\n"], "> a\n"),
        (["a\r", "\nb\n"], "> a\n> b\n"),
        (["1/3\r", "2/3\r3/3", " done\n"], "> 3/3 done\n"),
        (["no end"], "> no end\n"),
        (["\n\n"], "> \n> \n"),
    ],
)
def test_only_whole_lines_are_passed_each_behind_its_prefix(chunks, expected):
    shown = []
    lines = Lines(b"> ", shown.append)
    for chunk in chunks:
        lines.write(chunk.encode())
    lines.close()
    assert b"".join(shown).decode() == expected
