"""`expertgate check`: what `serve` would say, without serving."""

import pytest

from tests.server.running import expertgate, make_key, prepare


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path)
    make_key(tmp_path, "alice")
    return tmp_path


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_holds_is_summed_up_and_nothing_is_written(folder):
    (folder / "suspended.yaml").write_text("[news, math]\n")
    before = files(folder)
    done = expertgate(folder, "check", "--", "--max-num-seqs", "4")
    assert (done.returncode, done.stderr) == (0, "")
    experts, *_, last = done.stdout.splitlines()
    assert experts.startswith("experts: public")
    assert "suspended: math, news" in done.stdout.splitlines()
    assert last == "all of it holds"
    assert files(folder) == before


def test_what_nobody_has_is_noted(folder):
    """A misspelt `forbid` forbids nobody; what it names may be to come, so it is no fault."""
    path = folder / "policies" / "out.cedar"
    path.write_text('forbid(principal in Group::"nobodys", action, resource);')
    done = expertgate(folder, "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert f'note: {path}:1: nobody is in Group::"nobodys"' in done.stdout.splitlines()
    path.write_text('forbid(principal, action, resource) when { resource.owner == "nobodys" };')
    done = expertgate(folder, "policy", "check")
    assert done.stdout.splitlines()[1:] == [f'note: {path}:1: no expert has the owner "nobodys"']


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("policies/all.cedar", "permit(", "all.cedar"),
        ("keys.yaml", "- {id: alice}\n", "keys.yaml"),
        ("suspended.yaml", "[nobody]\n", "no expert 'nobody'"),
        ("audit-key.pem", "no key", "audit-key.pem"),
    ],
)
def test_a_fault_is_a_line(folder, name, text, words):
    (folder / name).write_text(text)
    done = expertgate(folder, "check")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert "all of it holds" not in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "toy: no *.safetensors files"),
        ("tokenizer.json", "toy: no tokenizer can be made of its files, such as tokenizer.json: "),
    ],
)
def test_so_is_a_file_that_a_checkpoint_lacks(folder, name, words):
    """Where its catalogue states no hashes, nobody else reads weights before the engine does."""
    (folder / "toy" / name).unlink()
    done = expertgate(folder, "check")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("./no-such",), "no such model folder: ./no-such"),
        (("--config", "no-such.yaml"), "no configuration at no-such.yaml"),
        (("--", "--max-model-len", "99999999"), "engine arguments: User-specified max_model_len"),
        (("--", "--enable-lora"), "enable_lora"),
    ],
)
def test_so_is_an_argument_that_does_not_fit(folder, arguments, words):
    done = expertgate(folder, "check", *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert words in done.stderr
