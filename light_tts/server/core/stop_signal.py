"""What makes an HTTP worker stop."""

import signal

# Terminals, container runtimes and `timeout` send SIGINT or SIGTERM to the
# whole process group: workers ignore both, so that accepted requests finish before the front stops them.
STOP_WORKER = signal.SIGUSR2
