"""How a benchmark is asked."""

import argparse


def command_line(words: str | None) -> argparse.ArgumentParser:
    """`words`: what the benchmark's module says of itself, all of which `--help` shows."""
    summary, _, rest = (words or "").partition("\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
