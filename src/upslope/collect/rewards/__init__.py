"""What completions are worth: functions of the user's own in processes with a deadline, and built-in ones."""
