"""What is made of measured clones: how many fit, and how long a guest stood still."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from bench.forks import PARTS, Part, table
from bench.hundred import Memory
from bench.processes import age, private_memory, used_seconds
from bench.stopped import stopped


def test_as_many_fit_as_their_own_memory_and_what_they_share_leave_room_for():
    memory = Memory(shares=(30, 30), private=20.0, shared=20.0)

    assert memory.fit(100.0) == 4
    assert memory.fit(99.0) == 3
    assert memory.fit(10.0) == 0


def test_the_parts_of_a_fork_are_medians():
    found = [{name: Part(took, took / 2, 10) for name in PARTS} for took in (0.1, 0.2, 0.9)]

    lines = table(found).splitlines()

    assert len(lines) == 2 + len(PARTS)
    assert all(line.endswith("| 100.0 ms | 200.0 ms | 10 |") for line in lines[2:])


def test_a_process_is_asked_what_it_used():
    code = (
        "import time; t = time.process_time()\nwhile time.process_time() < t + 0.2: pass\ninput()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        while used_seconds(process.pid) < 0.2:
            time.sleep(0.01)
        assert age(process.pid) > 0.15
        assert 0 < private_memory(process.pid) < 1 << 30
    finally:
        process.communicate(b"\n")


def test_only_a_busy_thread_that_is_held_stands_still(tmp_path):
    """It is a process here that is called as QEMU calls its processors."""
    code = "open('/proc/self/comm', 'w').write('CPU 0/TCG')\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()

        def hold() -> None:
            process.send_signal(19)  # SIGSTOP
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            time.sleep(0.5)
            process.send_signal(18)  # SIGCONT

        held = stopped(process.pid, hold)
        free = stopped(process.pid, lambda: time.sleep(0.5))
    finally:
        process.kill()
        process.communicate()

    assert held > 0.45
    assert free < held / 2
