"""`tool_parser:` names a way of writing calls of tools that vLLM knows."""

import pytest

from expertgate.server.handlers import check_tool_parser
from expertgate.server.refusals import SettingError


@pytest.mark.parametrize("name", [None, "olmo3", "hermes"])
def test_names_that_vllm_knows_pass(name):
    check_tool_parser(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("olmo4", r"tool_parser olmo4: vLLM has no such parser; did you mean olmo3\?$"),
        ("", r"tool_parser : vLLM has no such parser, only .*hermes.*, olmo3, "),
        ("zzz", r"tool_parser zzz: vLLM has no such parser, only .*hermes.*, olmo3, "),
        ("nope", r"vLLM has no such parser, only apertus, .*"),
        ("none", r"vLLM has no such parser, only apertus, .*; null is for none$"),
    ],
)
def test_another_is_told_which_is_near(name, words):
    with pytest.raises(SettingError, match=words):
        check_tool_parser(name)
