"""Children end with the process that started them, also when it is gone before they come to ask."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from srlm_mega.launch.child_process import PARENT_PID, RANK_MARK

CHILD = """
import os, sys, time
from pathlib import Path
from srlm_mega.launch.child_process import die_with_parent

folder, agent = Path(sys.argv[1]), os.getppid()
(folder / "pid").write_text(str(os.getpid()))
while os.getppid() == agent:  # killed before this process asks to end with it
    time.sleep(0.01)
die_with_parent()
(folder / "lives").touch()
"""
AGENT = f"""
import os, subprocess, sys
os.environ["{PARENT_PID}"] = str(os.getpid())
subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)
"""


@pytest.mark.parametrize("announced", [True, False])
def test_a_child_whose_parent_was_killed_before_it_asked(announced: bool, tmp_path: Path) -> None:
    """As torchrun's ranks, when the agent is killed while they import. Without the pid they cannot know; of other
    processes it is not believed, as a variable that was left in a shell."""
    (tmp_path / "child.py").write_text(CHILD)
    os.mkfifo(tmp_path / "pid")
    argv = [sys.executable, "-c", AGENT, str(tmp_path / "child.py"), str(tmp_path)]
    variables = {name: value for name, value in os.environ.items() if name != RANK_MARK}
    agent = subprocess.Popen(argv, env=variables | ({RANK_MARK: "0"} if announced else {}))
    child = os.pidfd_open(int((tmp_path / "pid").read_text()))
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    poll = select.poll()
    poll.register(child)
    assert poll.poll(60_000), "the child ends, one way or the other"
    assert (tmp_path / "lives").exists() != announced


WAITER = """
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import psutil
from srlm_mega.launch.child_process import ending_children

try:
    with ThreadPoolExecutor(1) as pool, ending_children():
        asked = pool.submit(subprocess.run, ["sleep", "600"])
        while not psutil.Process().children():
            pass
        sys.exit(4)
finally:
    print(asked.result().returncode)
"""


def test_who_is_interrupted_does_not_wait_for_children_of_threads() -> None:
    done = subprocess.run([sys.executable, "-c", WAITER], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, f"{-signal.SIGKILL}\n"), done.stderr
