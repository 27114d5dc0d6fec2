"""What a person sees of a command, and where other libraries' words go; every test is a process of its own, as a command is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import logging, os, subprocess, sys, threading, time, warnings
from pathlib import Path
from typing import Annotated
import typer
from cluster.errors import VansError
from pipeline import cli
from pipeline.support import terminal
from pipeline.support.progress import bar, waiting

def noise(what):
    print(f"foreign {what} print"); print(f"foreign {what} stderr", file=sys.stderr)
    warnings.warn(f"foreign {what} warning")
    logging.getLogger("transformers").warning("foreign %s logger", what)
    os.write(1, f"foreign {what} fd 1\\n".encode()); os.write(2, f"foreign {what} fd 2\\n".encode())
    subprocess.run(["sh", "-c", f"echo foreign {what} child; echo foreign {what} child >&2"], check=True)

def broken_thread():
    raise RuntimeError("ours, in a thread")
broken_thread.__globals__["__name__"] = "pipeline.of_the_test"

@cli.app.command()
def trial(how: str = "", out: Annotated[str, typer.Option()] = ""):
    if how != "clean":
        noise("first")
    if out:
        terminal.keep_log_in(Path(out))
    console = terminal.console()
    console.print("our words →")
    logging.getLogger("pipeline.somewhere").warning("our warning %d", 1)
    with bar(console, "work", 2) as progress:
        for _ in range(2):
            if how != "clean":
                noise("second")
            logging.getLogger("actors.somewhere").warning("our warning 2")
            progress.advance("note")
    with waiting(console, "our spinner"):
        print("" if how == "clean" else "foreign third")
    terminal.console(stderr=True).print("ours on stderr")
    if how == "signal":
        terminal.alert("ours at once\\n")
    if how == "thread":
        thread = threading.Thread(target=broken_thread)
        thread.start(), thread.join()
    if how in ("error", "clean"):
        raise VansError("what was wrong")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "abort":
        os.abort()
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "exit":
        raise typer.Exit(3)

import atexit
atexit.register(lambda: os.write(2, b"foreign at the end\\n"))
cli.main()
"""


def trial(*arguments: str, tmp: Path, **environment: str) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of the program above, run as a command."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "trial", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"TMPDIR": str(tmp)} | environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def named_log(text: str) -> Path:
    """Return the file that an error names."""
    found = re.search(r"other libraries' output is in (\S+?\.log)", text)
    assert found is not None, text
    return Path(found[1])


def test_only_our_words_are_seen_and_the_log_of_a_command_that_went_well_is_removed(tmp_path: Path) -> None:
    status, out, err = trial(tmp=tmp_path)
    assert status == 0 and "foreign" not in out + err
    assert out.splitlines() == ["our words →", "work 1/2 note", "work 2/2 note"]
    assert err.splitlines() == ["our warning 1", "our warning 2", "our warning 2", "ours on stderr"]
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_log_which_has_every_library_s_every_word(tmp_path: Path) -> None:
    status, out, err = trial("--how", "error", tmp=tmp_path)
    assert status == 2 and "foreign" not in out + err
    assert err.splitlines()[-2] == "error: what was wrong"
    log = named_log(err.splitlines()[-1]).read_text()
    for kind in ("print", "stderr", "warning", "logger", "fd 1", "fd 2", "child"):
        assert f"foreign first {kind}" in log and log.count(f"foreign second {kind}") >= 2, kind
    assert "foreign third" in log and "foreign at the end" in log and "our w" not in log
    assert log.index("foreign first") < log.index("foreign second") < log.index("foreign third")


def test_an_error_without_libraries_words_names_no_log(tmp_path: Path) -> None:
    status, _, err = trial("--how", "clean", tmp=tmp_path)
    assert status == 2 and err.splitlines()[-1] == "error: what was wrong" and not list(tmp_path.iterdir())


def test_a_bug_shows_its_traceback_and_the_last_words_of_the_libraries(tmp_path: Path) -> None:
    status, _, err = trial("--how", "bug", tmp=tmp_path)
    assert status == 1 and "ZeroDivisionError: a bug" in err and "in trial" in err
    assert named_log(err).is_file() and "  foreign third" in err.splitlines()


def test_a_crash_of_the_process_shows_where_it_was(tmp_path: Path) -> None:
    status, _, err = trial("--how", "abort", tmp=tmp_path)
    assert status == -6 and "Fatal Python error: Aborted" in err and "in trial" in err


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("interrupt", 130, "stopped by Ctrl-C"),
        ("signal", 0, "ours at once"),
        ("thread", 0, "RuntimeError: ours, in a thread"),
        ("exit", 3, ""),
    ],
)
def test_what_a_person_must_see_is_seen(tmp_path: Path, how: str, status: int, said: str) -> None:
    found, out, err = trial("--how", how, tmp=tmp_path)
    assert found == status and said in err and "foreign" not in out + err


def test_the_log_of_a_run_is_in_its_folder_after_those_of_earlier_commands(tmp_path: Path) -> None:
    run, tmp = tmp_path / "run", tmp_path / "tmp"
    run.mkdir(), tmp.mkdir()
    for how in ("", "error"):
        _, _, err = trial("--how", how, "--out", str(run), tmp=tmp)
    assert named_log(err) == run / "libraries.log" and not list(tmp.iterdir())
    log = (run / "libraries.log").read_text()
    assert log.count("--- vans trial, process") == 2 and log.count("foreign third") == 2
    assert log.index("--- vans trial") < log.index("foreign first") < log.index("foreign second")


def test_where_there_is_no_place_for_a_log_the_command_works(tmp_path: Path) -> None:
    status, out, err = trial("--how", "error", "--out", str(tmp_path / "missing"), tmp=tmp_path)
    assert status == 2 and "foreign" not in out + err and named_log(err).parent == tmp_path


def test_everything_is_shown_where_that_is_wanted(tmp_path: Path) -> None:
    status, out, err = trial("--how", "error", tmp=tmp_path, VANS_SHOW_LIBRARIES="1")
    assert (
        status == 2 and "foreign first print" in out and "foreign second fd 2" in err and not list(tmp_path.iterdir())
    )


def test_a_full_disk_under_the_log_ends_nothing(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from pipeline.support import terminal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "with terminal.library_log('vans trial') as log:\n"
        "    [print('foreign ' + 'x' * 100) for _ in range(100)]\n"
        "    terminal.console().print('our words')\n"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert (done.returncode, done.stdout) == (0, "our words\n"), done.stderr


def test_a_terminal_of_few_letters_ends_nothing(tmp_path: Path) -> None:
    status, out, _ = trial(tmp=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert status == 0 and "our words \\u2192" in out


def test_help_and_wrong_usage_are_shown(tmp_path: Path) -> None:
    status, out, _ = trial("--help", tmp=tmp_path)
    assert status == 0 and "--how" in out
    status, _, err = trial("--wrong", tmp=tmp_path)
    assert status == 2 and "No such option" in err
