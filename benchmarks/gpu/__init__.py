"""Every check and benchmark that needs a GPU, in one command with a time limit."""
