"""The command's first half second, in which it is imported."""

import signal
import subprocess
import sys

INTERRUPTED = """
import os, signal, sys
from expertgate.__main__ import main

class Finder:
    def find_spec(self, name, *_):
        if name == "expertgate.server.config":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["expertgate", "--version"]
signal.signal(signal.SIGINT, signal.{handler})
sys.exit(main())
"""


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_ctrl_c_ends_it_without_a_word():
    done = run(INTERRUPTED.format(handler="default_int_handler"))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_whoever_had_the_signal_ignored_has_it_ignored():
    done = run(INTERRUPTED.format(handler="SIG_IGN"))
    assert (done.returncode, done.stderr) == (0, "")


def test_from_then_on_commands_are_interrupted_as_ever():
    """So that they end what they began."""
    done = run(
        "import signal, sys\n"
        "from expertgate.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['expertgate', '--version']\n"
        "main()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    assert done.returncode == 0, done.stderr
