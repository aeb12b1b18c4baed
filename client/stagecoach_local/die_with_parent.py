"""`python die_with_parent.py PARENT_PID COMMAND...`: becomes COMMAND, which the kernel kills when the parent dies.

It is a script, and not a function that runs between fork and exec, because almost nothing is safe there in a process
that has threads. Linux only. The kernel watches the thread that started this process, so that thread has to live as
long as COMMAND should.
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
