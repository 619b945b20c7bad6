"""Layouts over several devices: checked against one process, then timed, under torchrun."""
