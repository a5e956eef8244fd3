"""Help is where a benchmark says how it measures."""

from benchmarks.command_line import command_line


def test_help_has_all_that_the_module_says():
    words = "How long it takes.\n\n`python -m benchmarks.it` asks twice:\n\n- cold;\n- warm.\n"
    parser = command_line(words)
    parser.add_argument("--rounds")
    shown = parser.format_help()
    assert all(line in shown.splitlines() for line in words.splitlines())
    assert "--rounds" in shown
    assert command_line(None).format_help()
