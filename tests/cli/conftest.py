"""The command as a user types it."""

import pytest

from avalab import cli


@pytest.fixture
def avalab(monkeypatch, capsys):
    """Exit code, standard output and standard error of `avalab ARGUMENTS`."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["avalab", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run
