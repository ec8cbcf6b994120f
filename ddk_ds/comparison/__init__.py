"""Comparison of methods: their stages, runs, differences and costs."""
