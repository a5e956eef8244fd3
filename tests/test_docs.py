"""What the documents say can be done is done here, or they say why not."""

import json
import re

import pytest
import yaml

from expertgate.server.config import Config
from tests.support.documents import ROOT, run

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [
    *PAGES,
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "expertgate").rglob("*.md")),
]
"""Those whose links are looked at; the commands of these others need hours, or what isn't here."""
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^>]*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def has_its_own_test(page):
    """Its commands need a folder of their own, and are run in it there."""
    return (ROOT / "tests" / "server" / f"test_{page.stem}_docs.py").exists()


def blocks(kind):
    """Each fenced block of this kind, by page and line."""
    found = []
    for page in PAGES:
        if kind == "sh" and has_its_own_test(page):
            continue
        for match in BLOCK.finditer(page.read_text()):
            if match["kind"] == kind:
                line = match.string[: match.start()].count("\n") + 1
                found.append(pytest.param(match, id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def test_the_documents_are_found():
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md"} <= {page.name for page in PAGES}
    assert blocks("sh")


@pytest.mark.parametrize("block", blocks("sh"))
def test_a_command_runs_or_says_why_not(block, tmp_path):
    note = block["note"] or ""
    if note.startswith("not run: "):
        assert len(note) > len("not run: ")
        return
    script = re.sub(r"^\.venv/bin/", "", block["text"], flags=re.MULTILINE)
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles(block):
    compile(block["text"], "block", "exec")


@pytest.mark.parametrize("block", blocks("yaml"))
def test_a_configuration_is_taken(block, tmp_path):
    assert yaml.safe_load(block["text"]) is not None
    if block["text"].startswith("# expertgate.yaml"):
        path = tmp_path / "expertgate.yaml"
        path.write_text(block["text"])
        Config.load(path)


@pytest.mark.parametrize("block", blocks("json"))
def test_json_parses(block):
    text = block["text"]
    # A part of an object, by its key.
    json.loads(f"{{{text}}}" if text.startswith('"') else text)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page):
    text = FENCED.sub("", page.read_text())
    missing = []
    for link, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)]*))?\)", text):
        target = page.parent / link if link else page
        if "://" in link:
            continue
        if not target.exists() or (heading and heading not in headings(target)):
            missing.append(f"{link}#{heading}" if heading else link)
    named = re.findall(r"`((?:tests|expertgate|benchmarks|deploy|docs)/[\w./-]+)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def headings(page):
    """What a link can name of it, as GitHub and its like make that of a heading's words."""
    found = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in found)
    return {each.replace(" ", "-") for each in words}


def test_a_heading_is_found_by_its_words(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, `two`\n```sh\n# three\n```\n## Can't it?\n")
    assert headings(page) == {"one-two", "cant-it"}
