"""Kill -9 at random moments under load: nothing is generated that the log doesn't know of.

The kernel keeps what a killed process wrote, so this shows the order of writes and that a log can
be gone on from wherever it was torn; that a record is *on disk* before the engine is asked is shown
by `test_trail.py::test_the_record_is_on_disk_before_the_engine_is_asked`.
"""

import os
import subprocess
import sys

from tests.server.audit.logs import check, records, signing_key

KILLS = int(os.environ.get("EXPERTGATE_TEST_KILLS", "200"))


def test_no_generated_token_lacks_its_record(tmp_path):
    signing_key(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.audit.killed", str(tmp_path), str(KILLS), "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    report = check(tmp_path)
    assert report.faults == []
    found = records(tmp_path)
    assert sum(record["kind"] == "start" for record in found) > KILLS // 2
    recorded = {record["request"] for record in found if record["kind"] == "request"}
    generated = (tmp_path / "generated").read_text().split()
    assert len(set(generated)) > 2 * KILLS
    assert set(generated) <= recorded
    # Some died between the two, or the kills were not at all moments.
    ended = {record["request"] for record in found if record["kind"] == "result"}
    assert recorded - ended
