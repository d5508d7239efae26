"""The output and the exit code of a process when user code calls sys.exit()."""

import pytest

from launch.__main__ import main


@pytest.mark.parametrize(
    "argument, code, expected",
    [
        ("", 0, ""),
        ("None", 0, ""),
        ("0", 0, ""),
        ("3", 3, ""),
        ("'no data'", 1, "launch: no data\n"),
        ("['no', 'data']", 1, "launch: ['no', 'data']\n"),
    ],
)
def test_sys_exit_means_what_it_means_to_python(
    argument, code, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"import sys\nsys.exit({argument})\n")
    assert main(["--config=mine.py"]) == code
    assert capsys.readouterr().err == expected
