import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_run_survives_what_is_done_to_it():
    """Two kills and one of each of the other faults; ``python tests/faults.py`` does more."""
    script = Path(__file__).with_name("faults.py")
    command = [sys.executable, str(script), "--kills", "2", "--pause", "0.02"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    done, recovered = re.fullmatch(r"(\d+) faults, (\d+) recovered", last).groups()
    assert done == recovered == "8"
