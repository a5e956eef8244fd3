"""vLLM loads some plug-ins whatever VLLM_PLUGINS says; one that is installed ends the start."""

import os
import subprocess
import sys

import pytest

from tests.server.running import environment, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    prepare(folder)
    (folder / "keys.yaml").write_text("[]\n")
    return folder


def plant(folder, group, name, value):
    site = folder / f"site-{group}"
    info = site / "spy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    return site


@pytest.mark.parametrize(
    ("group", "name"),
    [("vllm.logits_processors", "spy"), ("vllm.general_plugins", "expertgate")],
)
def test_a_planted_plug_in_ends_the_start(folder, group, name):
    site = plant(folder, group, name, "spy:Spy")
    path = os.pathsep.join([str(site), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-m", "expertgate.server.cli", "serve"],
        cwd=folder,
        env={**environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert group in done.stderr
    assert "spy" in done.stderr


@pytest.mark.parametrize("plugins", ["", "expertgate,another"])
def test_another_list_of_plug_ins_ends_it_too(folder, plugins):
    done = subprocess.run(
        [sys.executable, "-m", "expertgate.server.cli", "serve"],
        cwd=folder,
        env={**environment(), "VLLM_PLUGINS": plugins},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "VLLM_PLUGINS" in done.stderr
