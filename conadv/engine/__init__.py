"""Running a step: its phases, what waits between steps, look-ahead, executors."""
