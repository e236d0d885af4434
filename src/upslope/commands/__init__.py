"""One file a command, for those whose work is more than a few lines."""
