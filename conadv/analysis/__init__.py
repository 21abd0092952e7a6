"""Pure functions of a run's record (timeline, shares, trace, picture, staleness) and of a trained
model (objective, hessian, sharpness, landscape, and model, which has all of them)."""
