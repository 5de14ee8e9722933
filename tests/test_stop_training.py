"""The second Ctrl-C of a training that takes its time to leave."""

import os
import signal
import subprocess
import sys
import threading

from training.train_adapter import stop

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("at work", flush=True)
time.sleep(600)
"""


def test_a_second_ctrl_c_kills_what_saves_for_long():
    command = [sys.executable, "-c", STUBBORN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "at work\n"
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    stop(process)
    assert process.returncode == -signal.SIGKILL
