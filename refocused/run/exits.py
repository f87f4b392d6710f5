"""The exit codes of a run."""

DONE = 0
NOT_FINITE = 65
NO_DATA = 66  # or no checkpoint that can be loaded
INTERNAL = 70
NOT_IN_BUCKET = 74  # the last checkpoint did not get there
STOPPED = 75  # by a signal, and saved
