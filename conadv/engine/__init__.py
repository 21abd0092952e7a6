"""Running a step: phases, what waits between steps, look-ahead, and the order in which an executor runs things."""
