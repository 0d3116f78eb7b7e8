"""Fit predictors to a model from any text, and score them: both watch the model run, experts offloaded as ever."""
