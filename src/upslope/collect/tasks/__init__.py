"""Where prompts come from, and what a good answer is: built-in tasks, files and reasoning-gym."""
