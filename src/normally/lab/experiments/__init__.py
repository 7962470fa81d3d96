"""One claim a file. A module here defines `EXPERIMENT`; `lab list` finds it by itself."""
