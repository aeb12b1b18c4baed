"""`python die_with_parent.py PARENT_PID COMMAND...`: becomes COMMAND, which the kernel kills when the parent dies.

A script of its own rather than a function between fork and exec, where almost nothing is safe in a process that has
threads. Linux only. The kernel watches the thread that started this process, so that thread must live as long.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent_pid, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent_pid):
        sys.exit("the parent is gone")  # it died before the line above could take effect
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
