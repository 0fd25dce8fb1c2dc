"""Signals that the front process sends to an HTTP worker."""

import signal

# Terminals, container runtimes and `timeout` send SIGINT or SIGTERM to the whole process group. Workers
# ignore both, so that accepted requests finish before the front process stops them.
STOP_WORKER = signal.SIGUSR2
LEAVE_TO_OTHERS = signal.SIGRTMIN  # stop accepting connections, but serve the existing ones
