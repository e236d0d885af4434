"""One file a command: its options and its work. A command is imported when it is asked for."""
