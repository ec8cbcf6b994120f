"""The domain mixture: proportions, numbers of samples and their order, as pure functions of numbers."""
