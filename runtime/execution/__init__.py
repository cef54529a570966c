"""Running one step: arrays, attention, the model and the sampler."""
