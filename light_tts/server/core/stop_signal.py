"""The signals that the front process sends to an HTTP worker."""

import signal

# Terminals, container runtimes and `timeout` send SIGINT or SIGTERM to the
# whole process group: workers ignore both, so that accepted requests finish before the front stops them.
STOP_WORKER = signal.SIGUSR2
LEAVE_TO_OTHERS = signal.SIGRTMIN  # accept no more connections, and serve those that are there
