"""Every GPU check and benchmark in one command."""
